"""Metadata of a prepared data set that somebody else has written, or damaged."""

import json
import pathlib
import shutil
import sys
from typing import Any

import numpy as np
import pytest

from bsce_jax.data import metadata, source
from bsce_jax.errors import UserError
from tests import datasets


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("made")
    images = [np.zeros((4, 5, 3), np.uint8)] * 3
    datasets.write(folder, "small", {"train": (images, [2, 0, 1])})
    return folder


@pytest.fixture
def folder(made: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """Of a version of the data set "small", to be damaged."""
    return pathlib.Path(shutil.copytree(made, tmp_path / "data"), "small", "1.0.0")


def use(folder: pathlib.Path) -> None:
    """All that a run asks of a data set."""
    where = str(folder.parent.parent)
    source.class_names("small", where)
    source.channels("small", where)
    labels = source.labels("small", "train[:2]", where)
    source.digest("small", "train[:2]", where, labels)
    source.open_encoded("small", "train", where)[0][0]
    source.open_split("small", "train", where)


def refused(folder: pathlib.Path, message: str = ".") -> None:
    with pytest.raises(UserError, match=message) as error:
        use(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def features(name: str) -> list[Any]:
    """The places where tfds finds the class of a feature."""
    dictionary = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    inner = {"image": {"type": name, "content": {}}}
    return [
        {"pythonClassName": name},
        {"python_class_name": name},
        {"type": name, "content": {}},
        {"type": dictionary, "content": inner},
        {
            "pythonClassName": dictionary,
            "featuresDict": {"features": {"image": {"pythonClassName": name}}},
        },
        {
            "pythonClassName": dictionary,
            "jsonFeature": {"json": json.dumps(inner)},
        },
        {
            "type": dictionary,
            "content": json.dumps({"features": {"image": {"pythonClassName": name}}}),
            "proto_cls": "tensorflow_datasets.FeaturesDict",
        },
    ]


@pytest.mark.parametrize("place", range(7))
def test_no_code_is_imported_that_a_data_set_names(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    (folder / "planted.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(folder)
    written = features("planted.Feature")
    assert len(written) == 7
    (folder / "features.json").write_text(json.dumps(written[place]))
    refused(folder, "names 'planted.Feature': expected a class of tensorflow_datasets")
    assert "planted" not in sys.modules


def test_a_class_of_tfds_itself_may_be_named(folder: pathlib.Path) -> None:
    use(folder)
    found = metadata.open_version(folder)
    assert set(found.info.features) == {"id", "image", "label"}


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize(
    "content", ["", "null", "{}", '["a"]', "[" * 5000 + "]" * 5000]
)
def test_broken_metadata_are_one_line(
    folder: pathlib.Path, name: str, content: str
) -> None:
    (folder / name).write_text(content)
    refused(folder)


def test_missing_features_are_one_line(folder: pathlib.Path) -> None:
    (folder / "features.json").unlink()
    refused(folder, r"features.json does not exist: expected the features of a data")


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("features.json", "featuresDict.features.label.classLabel.numClasses", "9" * 9),
        ("features.json", "featuresDict.features.image.image.shape.dimensions", ["-1"]),
        ("features.json", "featuresDict.features.image.image.dtype", "uint99"),
        ("features.json", "featuresDict.features", 3),
        ("features.json", "pythonClassName", "tensorflow_datasets.core.Nothing"),
        ("features.json", "pythonClassName", "tensorflow_datasets.none.Nothing"),
        ("dataset_info.json", "splits", {}),
        ("dataset_info.json", "splits.0.shardLengths", ["-5"]),
        ("dataset_info.json", "splits.0.shardLengths", ["many"]),
        ("dataset_info.json", "splits.0.filepathTemplate", "{NOTHING}"),
        ("dataset_info.json", "fileFormat", "pickle"),
        ("dataset_info.json", "version", "newest"),
        ("dataset_info.json", "name", ""),
    ],
)
def test_a_damaged_field_is_one_line(
    folder: pathlib.Path, name: str, place: str, value: Any
) -> None:
    whole: Any = json.loads((folder / name).read_text())
    *parents, field = place.split(".")
    part = whole
    for parent in parents:
        part = part[int(parent) if parent.isdigit() else parent]
    assert field in part
    part[field] = value
    (folder / name).write_text(json.dumps(whole))
    refused(folder)
