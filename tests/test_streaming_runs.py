"""Whole runs on streamed images: those of resident ones, bit for bit; bad files."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from bsce_jax import predict
from bsce_jax.data import decode, prepare
from bsce_jax.report import results as results_file
from tests import datasets, runs
from tests.test_processes import same_run, together
from tests.test_resume import start_and_wait

OPTIONS = ("--config.prior=balanced", "--config.checkpoint.minutes=0")
STREAMED = (
    *OPTIONS,
    "--config.data.loading=streaming",
    "--config.data.image_size=8",
    "--config.data.random_resized_crop=False",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streaming")
    return runs.config_file(folder, classes=6, base=4, steps=2, epochs=2)


@pytest.fixture(scope="module")
def resident(config):
    runs.here(config, config.parent / "resident", *OPTIONS)
    return config.parent / "resident"


def outcome(workdir):
    """All that is deterministic, but for the hashes of how images were loaded."""
    found = results_file.deterministic(runs.results(workdir))
    other = ("config_hash", "base_hash", "data")
    return {k: v for k, v in found.items() if k not in other}


def test_a_streamed_run_killed_once_has_the_bits_of_a_resident_one(config, resident):
    """The same batches and exemplars, from wherever it goes on."""
    workdir = config.parent / "killed"
    process = start_and_wait(config, workdir, 7, STREAMED)  # inside the second step
    process.kill()
    process.communicate()
    runs.here(config, workdir, *STREAMED)
    assert outcome(workdir) == outcome(resident)


@pytest.mark.slow
def test_two_processes_stream_their_own_rows(config, resident):
    workdir = config.parent / "two"
    with together(config, workdir, *STREAMED) as processes:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    same_run(workdir, resident, hashes=False)


CONFIG = """
from bsce_jax.config import default_config, method_module

def get_config():
    c = default_config()
    method_module({method_file!r}, "il_baseline").configure(c, "digits")
    c.data.name, c.data.data_dir = "photos", {data_dir!r}
    c.data.loading, c.data.image_size, c.data.resize = "streaming", 16, 20
    c.data.padding = 0
    c.scenario.base_classes, c.scenario.steps = 2, 1
    c.memory.per_class = 3
    c.model.width = 4
    c.optim.batch_size = 8
    for phase in (c.phase.base, c.phase.incremental):
        phase.epochs, phase.milestones = 2, ()
    c.evaluation.batch_size = 16
    return c
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """JPEGs of many sizes in three classes; one of each split is cut short."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (3, 3))

    def photo(label: int) -> bytes:
        height, width = rng.integers(18, 60, 2)
        pixels = colours[label] + rng.normal(0, 30, (height, width, 3))
        file = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG")
        return file.getvalue()

    def split(count: int) -> tuple[list[bytes], list[int]]:
        labels = [i % 3 for i in range(count)]
        images = [photo(label) for label in labels]
        images[5] = images[5][:200]
        return images, labels

    datasets.write(folder / "data", "photos", {"train": split(24), "test": split(12)})
    path = folder / "config.py"
    path.write_text(
        CONFIG.format(
            method_file=str(runs.ROOT / "configs" / "x.py"),
            data_dir=str(folder / "data"),
        )
    )
    return path


def lines_of(capsys) -> list[str]:
    """What ended a run."""
    shown = capsys.readouterr().err.splitlines()
    return [line for line in shown if line.startswith("bsce_jax:")]


def test_a_corrupt_image_ends_the_run_or_is_skipped(photos, capsys, caplog):
    workdir = photos.parent / "skipped"
    runs.here(photos, workdir, status=2)
    (line,) = lines_of(capsys)
    assert re.search(r"image (train|test)_00005: .*config.data.corrupt=skip", line)
    caplog.clear()
    runs.here(photos, workdir, "--config.data.corrupt=skip")  # goes on
    for split in ("train", "test"):
        assert f"image {split}_00005: " in caplog.text
    base, last = (s["result"] for s in runs.results(workdir)["steps"])
    assert last["counts"] == [3, 3, 8]  # counts are those of the data set
    # The test image of the third label counts in no accuracy.
    tested = sum(count for *_, count in last["confusion"])
    assert tested == 11
    losses = [base["phases"]["base"], last["phases"]["incremental"]]
    assert np.isfinite([phase["loss"] for phase in losses]).all()
    files_become_images_as_in_the_evaluation(workdir)


def files_become_images_as_in_the_evaluation(workdir):
    """A resize of the shorter side, then the centre."""
    pixels = np.random.default_rng(1).integers(0, 256, (30, 50, 3)).astype(np.uint8)
    path = workdir / "photo.png"
    Image.fromarray(pixels).save(path)
    predictor = runs.load(workdir)
    found = predict.read_image(str(path), predictor.image_shape, predictor.resize)
    expected = decode.test_crop(path.read_bytes(), 16, resize=20)
    np.testing.assert_array_equal(found, expected)
    with runs.small_network():
        assert predict.main([str(workdir), str(path)]) == 0
        path.write_bytes(b"none")
        assert predict.main([str(workdir), str(path)]) == 2


def test_a_damaged_shard_ends_the_run_with_its_name(photos, capsys):
    folder = photos.parent / "data" / "photos" / "1.0.0"
    (shard,) = folder.glob("*train*.array_record*")
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole[: len(whole) // 2])
        runs.here(photos, photos.parent / "cut", status=2)
        shard.unlink()
        runs.here(photos, photos.parent / "missing", status=2)
    finally:
        shard.write_bytes(whole)
    cut, missing = lines_of(capsys)
    assert shard.name in cut and shard.name in missing


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imagenet", "imagenet_subset"])
def test_the_paper_s_configurations_run_on_a_tiny_imagenet(tmp_path, name):
    """A thousand classes of three small JPEGs, prepared by the command; two hosts."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1)):
        for label in range(1000):
            folder = tmp_path / "ILSVRC" / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{split}_{label}_{i}.JPEG")
    data = tmp_path / "data"
    prepare.main(
        ["image_folder", "--name", "imagenet2012", "--data_dir", str(data)]
        + ["--train", str(tmp_path / "ILSVRC" / "train")]
        + ["--test", str(tmp_path / "ILSVRC" / "val")]
    )
    config = f"{runs.ROOT / 'configs' / name}.py:method=lucir,prior=balanced,memory=1"
    overrides = [f"--config.data.data_dir={data}", "--config.model.width=4"]
    overrides += ["--config.data.image_size=16", "--config.data.resize=18"]
    for phase in ("base", "incremental"):
        overrides += [f"--config.phase.{phase}.epochs=1"]
        overrides += [f"--config.phase.{phase}.milestones=()"]
    with together(config, tmp_path / "run", *overrides) as processes:
        for process in processes:
            _, errors = process.communicate(timeout=900)
            assert process.returncode == 0, errors
    found = runs.results(tmp_path / "run")
    classes = 1000 if name == "imagenet" else 100
    assert found["status"] == "done" and len(found["class_names"]) == classes
    seen = [step["result"]["num_seen"] for step in found["steps"]]
    assert seen == list(range(classes // 2, classes + 1, classes // 10))
    # Class order: seed 1993 over the sorted identifiers, as published.
    order = np.random.RandomState(1993).permutation(classes)
    assert found["class_names"] == [f"n{label:08d}" for label in order]
