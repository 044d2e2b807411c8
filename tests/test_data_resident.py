"""Whole splits in memory, and stratified choices of images."""

import hashlib
import io
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bsce_jax.data import prepare, resident, source
from bsce_jax.errors import UserError
from tests import datasets


def random_images(count: int, *shape: int) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    return list(rng.integers(0, 256, (count, *shape), np.uint8))


# 64 x 64 and 600 images: several threads, two chunks.
@pytest.mark.parametrize(("count", "side"), [(600, 4), (600, 64)])
def test_images_are_those_that_tfds_reads(
    tmp_path: pathlib.Path, count: int, side: int
) -> None:
    labels = [i % 7 for i in range(count)]
    split = random_images(count, side, side, 3), labels
    datasets.write(tmp_path, "small", {"train": split})
    arrays = resident.load("small", "train", str(tmp_path))
    records, _ = source.open_split("small", "train", str(tmp_path))
    assert arrays.images.shape == (count, side, side, 3)
    assert (arrays.images.dtype, arrays.labels.dtype) == (np.uint8, np.int32)
    np.testing.assert_array_equal(arrays.labels, [r["label"] for r in records])
    np.testing.assert_array_equal(arrays.images, [r["image"] for r in records])


@pytest.mark.slow
def test_other_processes_decode_to_the_same(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "CHUNKS_WORTH_A_PROCESS", 1)
    split = random_images(1100, 4, 4, 3), [i % 7 for i in range(1100)]
    datasets.write(tmp_path, "small", {"train": split})
    here = resident.load("small", "train", str(tmp_path))
    found = resident.load("small", "train", str(tmp_path), processes=2)
    np.testing.assert_array_equal(found.images, here.images)
    np.testing.assert_array_equal(found.labels, here.labels)
    assert found.digest == here.digest


def test_images_are_averaged_down(tmp_path: pathlib.Path) -> None:
    images = random_images(3, 8, 8, 3)
    datasets.write(tmp_path, "small", {"train": (images, [0, 1, 2])})
    found = resident.load("small", "train", str(tmp_path), image_size=4)
    means = np.stack(images).reshape(3, 4, 2, 4, 2, 3).astype(float).mean((2, 4))
    assert found.images.shape == (3, 4, 4, 3)
    error = np.abs(found.images - means[found.labels])
    assert error.max() <= 1  # Pillow rounds twice, after rows and after columns
    same = resident.load("small", "train", str(tmp_path), image_size=8)
    np.testing.assert_array_equal(same.images, np.stack(images)[same.labels])


def test_images_of_any_size_can_be_brought_to_one(tmp_path: pathlib.Path) -> None:
    images = [np.full((6, 9, 1), 10, np.uint8), np.full((5, 5, 1), 200, np.uint8)]
    datasets.write(tmp_path, "small", {"train": (images, [0, 1])})
    with pytest.raises(UserError, match="differ in size .*set config.data.image_size"):
        resident.load("small", "train", str(tmp_path))
    found = resident.load("small", "train", str(tmp_path), image_size=5)
    assert found.images.shape == (2, 5, 5, 1)
    expected = np.array([10, 200])[found.labels]
    np.testing.assert_array_equal(found.images[:, 0, 0, 0], expected)
    for size in (-1, 6):
        with pytest.raises(UserError, match=f"config.data.image_size={size}: expected"):
            resident.load("small", "train", str(tmp_path), image_size=size)


def test_gray_images_among_coloured_ones_get_three_channels(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gray(image: np.ndarray) -> io.BytesIO:
        file = io.BytesIO()
        Image.fromarray(image[..., 0]).save(file, "PNG")
        file.seek(0)
        return file

    image = np.repeat(random_images(1, 4, 4, 1)[0], 3, axis=-1)
    monkeypatch.setattr("bsce_jax.data.builders.arrays.png", gray)
    datasets.write(tmp_path, "small", {"train": ([image], [0])})
    found = resident.load("small", "train", str(tmp_path))
    np.testing.assert_array_equal(found.images, image[None])


def test_images_without_a_label_are_refused(tmp_path: pathlib.Path) -> None:
    images = random_images(2, 2, 2, 1)
    datasets.write(tmp_path, "small", {"train": (images, [0, -1])})
    with pytest.raises(UserError, match="'train' of small has images without a label"):
        resident.load("small", "train", str(tmp_path))


def test_subset_takes_the_first_of_each_class() -> None:
    labels = np.array([2, 0, 2, 2, 1, 0, 0, 2])
    np.testing.assert_array_equal(resident.subset(labels, 2), [0, 1, 2, 4, 5])
    np.testing.assert_array_equal(resident.subset(labels, 0), np.arange(8))
    np.testing.assert_array_equal(resident.subset(labels, 9), np.arange(8))
    with pytest.raises(UserError, match="per_class: -1 is not allowed"):
        resident.subset(labels, -1)


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 60), min_size=1, max_size=5),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_hold_out_is_a_stratified_partition(
    sizes: list[int], fraction: float, seed: int
) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    labels = np.random.default_rng(0).permutation(labels)
    train, validation = resident.hold_out(labels, fraction, seed)
    together = np.concatenate([train, validation])
    np.testing.assert_array_equal(np.sort(together), np.arange(len(labels)))
    for part in (train, validation):
        assert np.all(np.diff(part) > 0)
    counts = np.bincount(labels[validation], minlength=len(sizes))
    for size, count in zip(sizes, counts, strict=True):
        assert 1 <= count <= size - 1
        assert abs(count - fraction * size) <= 1
    again = resident.hold_out(labels, fraction, seed)
    np.testing.assert_array_equal(again[1], validation)


def test_hold_out_depends_on_the_seed_and_on_a_class_alone() -> None:
    labels = np.repeat([0, 1, 2], 50)
    _, first = resident.hold_out(labels, 0.2, 0)
    _, second = resident.hold_out(labels, 0.2, 1)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(
        first[first < 50], resident.hold_out(labels[:50], 0.2, 0)[1]
    )
    assert not np.array_equal(first[:10] + 50, first[10:20])  # classes differ


def test_hold_out_none_and_refusals() -> None:
    labels = np.array([0, 0, 1])
    train, validation = resident.hold_out(labels, 0.0, 0)
    np.testing.assert_array_equal(train, [0, 1, 2])
    assert validation.size == 0
    for fraction in (-0.1, 1.0):
        with pytest.raises(UserError, match="fraction: .* is not allowed"):
            resident.hold_out(labels, fraction, 0)
    with pytest.raises(UserError, match="class 1 has a single image"):
        resident.hold_out(labels, 0.5, 0)


HASHES = {
    "train": "4e457917601a66aed021f5fa37957b56c6319557c0a8ed5484de3c390af45430",
    "test": "4cb8e5d9309da489bf6b19cc10cd96c3ae6f8daf225380b605aaee4c0d6aee19",
}


def official_files(folder: pathlib.Path) -> dict[str, bytes]:
    """The binary files of CIFAR-100, from 30 x 20 mosaics of 600 images a class."""
    labels = np.load(folder / "labels.npz")
    paths = sorted(folder.glob("*.webp"))
    assert len(paths) == 100
    tiles = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    tiles = tiles.reshape(100, 20, 32, 30, 32, 3).transpose(0, 1, 3, 5, 2, 4)
    tiles = tiles.reshape(100, 600, -1)  # one byte plane a channel
    files = datasets.cifar100_files(1)
    for split, first in (("train", 0), ("test", 500)):
        fine = labels[f"y_{split}"].astype(int)
        rank = np.empty(len(fine), int)
        for label in range(100):
            rank[fine == label] = np.arange(np.sum(fine == label))
        coarse = labels[f"y_{split}_coarse"].astype(np.uint8)
        head = np.stack([coarse, fine.astype(np.uint8)], axis=1)
        pixels = tiles[fine, first + rank]
        files[f"{split}.bin"] = np.concatenate([head, pixels], axis=1).tobytes()
    return files


@pytest.mark.slow
def test_real_cifar100_survives_every_pixel(
    shared: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = shared / "data" / "cifar100"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    path = datasets.write_archive(tmp_path / "a.tar.gz", official_files(folder))
    prepared = prepare.prepare_cifar100(str(tmp_path), str(path), verify=False)
    builder = tfds.builder_from_directory(prepared)
    skip = {"image": tfds.decode.SkipDecoding()}
    for split, expected in HASHES.items():
        images, *_ = resident.load("cifar100", split, str(tmp_path))
        records = builder.as_data_source(split, decoders=skip)
        order = np.argsort([record["id"] for record in records])
        found = hashlib.sha256(np.ascontiguousarray(images[order]).tobytes())
        assert found.hexdigest() == expected


def test_an_image_that_is_none_is_named(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    good = datasets.arrays.png(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)).read()
    split = ([good, good[: len(good) // 2], good], [0, 1, 0])
    datasets.write(tmp_path, "torn", {"train": split})
    with pytest.raises(
        UserError, match="image train_00001 of torn cannot be decoded: .*truncated"
    ):
        resident.load("torn", "train", str(tmp_path))
