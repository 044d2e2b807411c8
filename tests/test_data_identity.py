"""A run goes on with the data that it began with, or says what differs."""

import numpy as np
import pytest

from bsce_jax.data import source
from tests import datasets, runs


def write(folder, train, labels, test=4):
    """Eight-pixel images of six classes: `train` of each, of the values of labels."""
    rng = np.random.default_rng(0)

    def split(count):
        of = np.repeat(np.arange(6), count)
        return rng.integers(0, 255, (len(of), 8, 8, 1)).astype(np.uint8), labels(of)

    datasets.write(folder, "blobs", {"train": split(train), "test": split(test)})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished run and its configuration."""
    folder = tmp_path_factory.mktemp("identity")
    config = runs.config_file(folder, classes=6, base=4, steps=1)
    write(folder / "first", 8, lambda labels: labels)
    runs.here(config, folder / "run", f"--config.data.data_dir={folder / 'first'}")
    return config, folder


def line(capsys) -> str:
    (found,) = capsys.readouterr().err.strip().splitlines()
    return found


@pytest.mark.parametrize(
    ("train", "labels", "test", "message"),
    [
        (9, lambda labels: labels, 4, "54 training images here, 48 there"),
        (8, lambda labels: labels, 5, "30 test images here, 24 there"),
        (8, lambda labels: labels[::-1], 4, "other training images, labels or order"),
    ],
)
def test_other_data_are_refused(base, tmp_path, capsys, train, labels, test, message):
    config, folder = base
    write(tmp_path, train, labels, test)
    elsewhere = f"--config.data.data_dir={tmp_path}"
    runs.here(config, folder / "run", elsewhere, status=2)
    found = line(capsys)
    assert message in found and "belongs to a run on other data" in found
    taken = f"--config.init_from={folder / 'run'}"
    runs.here(config, tmp_path / "new", elsewhere, taken, status=2)
    found = line(capsys)
    assert message in found and "its data are others" in found
    assert not (tmp_path / "new" / "results.json").exists()


def test_the_same_data_in_another_folder_are_the_same(base, tmp_path):
    config, folder = base
    write(tmp_path, 8, lambda labels: labels)
    elsewhere = f"--config.data.data_dir={tmp_path}"
    taken = f"--config.init_from={folder / 'run'}"
    runs.here(config, tmp_path / "new", elsewhere, taken)
    ours, theirs = (runs.results(f) for f in (tmp_path / "new", folder / "run"))
    assert ours["data"] == theirs["data"] and ours["base_hash"] == theirs["base_hash"]


def test_a_streamed_split_is_known_by_labels_and_sizes(tmp_path):
    found = []
    for name, train, labels in (
        ("a", 8, lambda labels: labels),
        ("b", 8, lambda labels: labels),
        ("c", 8, lambda labels: labels[::-1]),
    ):
        write(tmp_path / name, train, labels)
        given = "blobs", "train", str(tmp_path / name)
        found.append(source.digest(*given, source.labels(*given)))
    assert found[0] == found[1] != found[2]
