"""Builders: digits against scikit-learn, CIFAR-100 against the stock builder."""

import io
import json
import pathlib
import tarfile
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits
from tensorflow_datasets.image_classification import cifar

from bsce_jax.data import resident, source
from bsce_jax.data.builders import arrays, cifar100, digits
from bsce_jax.errors import UserError
from tests import datasets


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_is_lossless(channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    decoded = np.asarray(Image.open(arrays.png(image)))
    np.testing.assert_array_equal(decoded.reshape(image.shape), image)


def test_digits_are_scikit_learns_losslessly_in_a_stratified_split(
    tmp_path: pathlib.Path,
) -> None:
    bunch = load_digits()
    sizes = np.bincount(bunch.target)
    found = []
    for split in ("train", "test"):
        images, labels, _ = resident.load("digits", split, str(tmp_path))
        counts = np.bincount(labels)
        expected = sizes // 5 if split == "test" else sizes - sizes // 5
        np.testing.assert_array_equal(counts, expected)
        levels = np.rint(images[..., 0] * (16 / 255)).reshape(-1, 64)
        found.append(np.column_stack([levels, labels]))
    original = np.column_stack([bunch.images.reshape(-1, 64), bunch.target])
    stored = np.concatenate(found)
    np.testing.assert_array_equal(
        original[np.lexsort(original.T)], stored[np.lexsort(stored.T)]
    )


def test_every_fifth_digit_of_a_class_is_a_test_image() -> None:
    labels = np.array([0, 1, 0, 0, 1, 0, 0, 1, 1, 1, 1, 0])
    expected = np.zeros(12, bool)
    expected[[6, 9]] = True  # the fifth 0 and the fifth 1
    np.testing.assert_array_equal(digits.test_rows(labels), expected)


def test_digits_are_a_registered_tfds_builder(tmp_path: pathlib.Path) -> None:
    assert tfds.builder_cls("digits") is digits.Digits
    assert tfds.builder("digits", data_dir=tmp_path).version == "1.0.0"


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return datasets.cifar100_files(40)


@pytest.fixture(scope="module")
def archive(
    files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    return datasets.write_archive(tmp_path_factory.mktemp("c") / "small.tar.gz", files)


def test_cifar100_equals_what_the_stock_builder_generates(
    files: dict[str, bytes],
    archive: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keys decide the order on disk, so equal keys mean interchangeable folders."""
    ours = cifar100.Cifar100(archive=archive, data_dir=tmp_path)
    stock_class = tfds.builder_cls("cifar100")
    stock = stock_class(data_dir=tmp_path)
    gfile = types.SimpleNamespace(GFile=open)
    fake = types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile))
    monkeypatch.setattr(cifar, "tf", fake)
    for split, generated in ours._split_generators(None).items():
        path = tmp_path / f"{split}.bin"
        path.write_bytes(files[path.name])
        expected = list(stock_class._generate_examples(stock, f"{split}_", [path]))
        found = list(generated)
        assert [key for key, _ in found] == [key for key, _ in expected]
        for (_, mine), (_, theirs) in zip(found, expected, strict=True):
            image = np.asarray(Image.open(mine.pop("image")))
            np.testing.assert_array_equal(image, theirs.pop("image"))
            assert mine == theirs
    assert (ours.name, ours.version) == (stock.name, stock.version)
    assert ours.info.features.to_json() == stock.info.features.to_json()
    assert ours.info.supervised_keys == stock.info.supervised_keys


def test_cifar100_is_prepared_and_read_back(
    files: dict[str, bytes], archive: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = cifar100.prepare(tmp_path, archive)
    assert folder == tmp_path / "cifar100" / "3.0.2"
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record"
    for split in ("train", "test"):
        images, labels, _ = resident.load("cifar100", split, str(tmp_path))
        records = np.frombuffer(files[f"{split}.bin"], np.uint8).reshape(40, -1)
        pixels = records[:, 2:].reshape(40, 3, 32, 32).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(np.sort(labels), np.arange(40))
        np.testing.assert_array_equal(images, pixels[labels])
        index = np.load(folder / f"labels-{split}.npy", allow_pickle=False)
        np.testing.assert_array_equal(index, labels)
        assert index.dtype == np.int32
    records, features = source.open_split("cifar100", "test", str(tmp_path))
    assert features.features["coarse_label"].names == datasets.cifar100_names()[0]
    assert source.class_names("cifar100", str(tmp_path))[41] == "fine_41"
    row = np.frombuffer(files["test.bin"], np.uint8).reshape(40, -1)[
        records[0]["label"]
    ]
    assert records[0]["coarse_label"] == row[0]


def test_the_pickled_edition_is_refused(tmp_path: pathlib.Path) -> None:
    content = {"train": b"x", "test": b"x", "meta": b"x"}
    path = datasets.write_archive(tmp_path / "a.tar.gz", content, "cifar-100-python/")
    with pytest.raises(UserError, match="no usable cifar-100-binary/train.bin"):
        cifar100.read_archive(path)


@pytest.mark.parametrize("missing", cifar100.FILES)
def test_every_file_is_needed(
    missing: str, files: dict[str, bytes], tmp_path: pathlib.Path
) -> None:
    content = {name: data for name, data in files.items() if name != missing}
    path = datasets.write_archive(tmp_path / "a.tar.gz", content)
    with pytest.raises(UserError, match=f"no usable cifar-100-binary/{missing}"):
        cifar100.read_archive(path)


def test_links_and_paths_outside_are_never_followed(
    files: dict[str, bytes], tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "a.tar.gz"
    (tmp_path / "secret").write_bytes(files["train.bin"])
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo("cifar-100-binary/train.bin")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        tar.addfile(link)
        outside = tarfile.TarInfo("../outside")
        outside.size = 1
        tar.addfile(outside, io.BytesIO(b"x"))
    with pytest.raises(UserError, match="no usable cifar-100-binary/train.bin"):
        cifar100.read_archive(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz", "secret"]


def test_a_file_larger_than_cifar100s_is_not_read(
    archive: pathlib.Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar100, "LARGEST", len(files["train.bin"]) - 1)
    with pytest.raises(UserError, match="no usable cifar-100-binary/train.bin"):
        cifar100.read_archive(archive)


def test_damaged_archives_are_one_clear_line(
    files: dict[str, bytes], archive: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "a.tar.gz"
    whole = archive.read_bytes()
    for damaged in (b"", b"not an archive", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"archive {path} cannot be read"):
            cifar100.read_archive(path)
    datasets.write_archive(path, files | {"test.bin": files["test.bin"][:-1]})
    with pytest.raises(UserError, match="a record is not 3074 bytes long"):
        cifar100.read_archive(path)
    with pytest.raises(UserError, match="cannot be read: .*No such file"):
        cifar100.read_archive(tmp_path / "absent.tar.gz")


def test_a_failed_preparation_leaves_nothing(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(UserError):
        cifar100.prepare(tmp_path / "tfds", tmp_path / "a.tar.gz")
    assert list((tmp_path / "tfds").iterdir()) == []
