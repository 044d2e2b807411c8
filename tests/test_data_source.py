"""Sources: what is found on disk, and what is said where it is not."""

import json
import pathlib
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
from sklearn.datasets import load_digits

from bsce_jax.data import source
from bsce_jax.errors import UserError
from tests import datasets


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tfds")
    source.open_split("digits", "test", str(folder))
    return str(folder)


@pytest.fixture
def isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither network nor TensorFlow: that it is looked for is no import of it."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert "tensorflow" not in sys.modules
    yield
    assert "tensorflow" not in sys.modules


def small(data_dir: pathlib.Path, version: str = "1.0.0", value: int = 0) -> None:
    images = [np.full((4, 5, 3), value, np.uint8)] * 3
    datasets.write(data_dir, "small", {"train": (images, [2, 0, 1])}, version=version)


@pytest.mark.usefixtures("isolated")
def test_digits_prepare_themselves_without_tensorflow_or_network(
    tmp_path: pathlib.Path,
) -> None:
    records, info = source.open_split("digits", "train", str(tmp_path))
    bunch = load_digits()
    by_image = {
        np.rint(image * 255 / 16).astype(np.uint8).tobytes(): label
        for image, label in zip(bunch.images, bunch.target, strict=True)
    }
    for row in (0, 700, len(records) - 1):
        record = records[row]
        assert record["image"].shape == (8, 8, 1) and record["image"].dtype == np.uint8
        assert by_image[record["image"].tobytes()] == record["label"]
    assert info.splits["train"].num_examples == len(records) == 1442
    assert info.splits["test"].num_examples == 355
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_prepared_digits_are_not_written_again(
    digits_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    files = sorted(pathlib.Path(digits_dir).rglob("*"))
    before = [path.stat().st_mtime_ns for path in files]
    assert len(source.open_split("digits", "test", digits_dir)[0]) == 355
    assert [path.stat().st_mtime_ns for path in files] == before


def test_the_data_dir_defaults_to_the_variable_then_to_home(
    digits_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", digits_dir)
    assert source.root() == pathlib.Path(digits_dir)
    assert len(source.open_split("digits", "test")[0]) == 355
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert source.root() == pathlib.Path.home() / "tensorflow_datasets"
    assert source.root("~/elsewhere") == pathlib.Path.home() / "elsewhere"


@pytest.mark.slow
def test_two_processes_prepare_digits_at_once(tmp_path: pathlib.Path) -> None:
    code = (
        "import sys, time; from bsce_jax.data import resident; import sklearn.datasets;"
        "open(sys.argv[2], 'w').close();\n"
        "import pathlib\n"
        "while len(list(pathlib.Path(sys.argv[2]).parent.iterdir())) < 2: "
        "time.sleep(0.001)\n"
        "print(resident.load('digits', 'train', sys.argv[1]).images.sum())"
    )
    (tmp_path / "ready").mkdir()
    folder = tmp_path / "tfds"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(tmp_path / "ready" / str(i))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=pathlib.Path(__file__).parents[1],
        )
        for i in range(2)
    ]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert answers[0][0] == answers[1][0] != ""
    assert [path.name for path in folder.iterdir()] == ["digits"]
    assert [path.name for path in (folder / "digits").iterdir()] == ["1.0.0"]


def test_the_loser_of_a_race_uses_the_winners_folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bsce_jax.data.builders import digits

    def faster_elsewhere(labels: np.ndarray) -> np.ndarray:
        monkeypatch.undo()
        source.open_split("digits", "test", str(tmp_path))  # the other process
        return digits.test_rows(labels)

    monkeypatch.setattr(digits, "test_rows", faster_elsewhere)
    assert len(source.open_split("digits", "test", str(tmp_path))[0]) == 355
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_a_folder_that_cannot_be_written_is_one_clear_line(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write digits to .*file/digits/1.0.0"):
        source.open_split("digits", "train", str(tmp_path / "file"))


def test_the_newest_version_is_read_unless_one_is_named(tmp_path: pathlib.Path) -> None:
    small(tmp_path, "2.0.0", 2)
    small(tmp_path, "10.0.0", 10)
    (tmp_path / "small" / "11.0.0").mkdir()  # incomplete
    (tmp_path / "small" / "12.0.0.incomplete").mkdir()
    newest, _ = source.open_split("small", "train", str(tmp_path))
    assert newest[0]["image"].shape == (4, 5, 3) and newest[0]["image"].max() == 10
    named, _ = source.open_split("small:2.0.0", "train", str(tmp_path))
    assert named[0]["image"].max() == 2
    with pytest.raises(UserError, match=r"'small:3.0.0' .* no version 3.0.0"):
        source.open_split("small:3.0.0", "train", str(tmp_path))


def test_labels_names_and_pairs_agree_with_the_records(digits_dir: str) -> None:
    records, _ = source.open_split("digits", "test", digits_dir)
    pairs, _ = source.open_encoded("digits", "test", digits_dir)
    expected = [records[row]["label"] for row in range(len(records))]
    found = source.labels("digits", "test", digits_dir)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)
    image, label = pairs[7]
    assert image[1:4] == b"PNG" and label == expected[7]
    assert pairs.__getitems__([7, 3]) == [pairs[7], pairs[3]]
    assert pickle.loads(pickle.dumps(pairs))[7] == pairs[7]  # for worker processes
    assert source.class_names("digits", digits_dir) == tuple("0123456789")


def test_class_names_default_to_numbers(tmp_path: pathlib.Path) -> None:
    small(tmp_path)
    assert source.class_names("small", str(tmp_path)) == ("0", "1", "2")
    images = [np.zeros((2, 2, 1), np.uint8)]
    datasets.write(tmp_path, "pets", {"train": (images, [1])}, names=["cat", "dog"])
    assert source.class_names("pets", str(tmp_path)) == ("cat", "dog")


def test_sub_splits_are_read(digits_dir: str) -> None:
    whole = source.labels("digits", "test", digits_dir)
    part = source.labels("digits", "test[5:20]", digits_dir)
    np.testing.assert_array_equal(part, whole[5:20])


@pytest.mark.usefixtures("isolated")
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("cifar100", "python -m bsce_jax.data.prepare cifar100 --data_dir {}"),
        ("imagenet2012", "prepare image_folder --name imagenet2012 --train FOLDER"),
        ("my_birds", "image_folder --name my_birds .* --data_dir {}"),
        ("mnist:3.0.1", "pip install 'bsce_jax\\[prepare\\]' && python -c .*mnist"),
    ],
)
def test_what_is_not_prepared_is_one_line_at_once(
    tmp_path: pathlib.Path, name: str, command: str
) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=command.format(tmp_path)) as caught:
        source.open_split(name, "train", str(tmp_path))
    assert time.monotonic() - started < 5
    assert f"{tmp_path}/{name.partition(':')[0]}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("split", ["val", "", "train]["])
def test_an_unknown_split_is_refused(digits_dir: str, split: str) -> None:
    with pytest.raises(UserError, match="expected a split of digits, or a part"):
        source.open_split("digits", split, digits_dir)


def test_tfrecord_is_refused(tmp_path: pathlib.Path) -> None:
    small(tmp_path)
    path = tmp_path / "small" / "1.0.0" / "dataset_info.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"fileFormat": "tfrecord"})
    )
    with pytest.raises(
        UserError, match="tfrecord.* array_record: .*image_folder --name small"
    ):
        source.open_split("small", "train", str(tmp_path))


def test_a_data_set_without_one_class_an_image_is_refused(
    tmp_path: pathlib.Path,
) -> None:
    small(tmp_path)
    path = tmp_path / "small" / "1.0.0" / "features.json"
    path.write_text(path.read_text().replace('"label"', '"mood"'))
    with pytest.raises(UserError, match="small is not one of images with a class each"):
        source.labels("small", "train", str(tmp_path))
