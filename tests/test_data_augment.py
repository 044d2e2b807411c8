"""Augmentation: every window, exact pixels, the same on any number of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image, ImageEnhance

from bsce_jax.data import augment, resident

MEAN, STD = augment.NORMALIZATION["cifar100_lucir"]
OPTIONS = {"padding": 4, "flip": True, "brightness": 0.25, "mean": MEAN, "std": STD}
KEY = jax.random.key(7)


def images_of(count: int, side: int = 8, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(side)
    return rng.integers(1, 256, (count, side, side, channels), np.uint8)


def keys_of(count: int) -> jax.Array:
    return augment.keys(KEY, jnp.arange(count))


def test_keys_depend_on_the_row_alone() -> None:
    expected = [jax.random.fold_in(KEY, row) for row in (5, 2, 5)]
    found = augment.keys(KEY, jnp.array([5, 2, 5]))
    np.testing.assert_array_equal(
        jax.random.key_data(found), [jax.random.key_data(key) for key in expected]
    )


def test_crops_are_windows_of_the_zero_padded_image_all_equally_likely() -> None:
    count, padding = 4050, 2
    image = images_of(1, side=5)[0]
    batch = jnp.broadcast_to(image, (count, *image.shape))
    found = np.asarray(augment.random_crop(batch, keys_of(count), padding))
    assert found.dtype == np.uint8
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    windows = {
        padded[y : y + 5, x : x + 5].tobytes(): 5 * y + x
        for y in range(5)
        for x in range(5)
    }
    assert len(windows) == 25
    hits = np.bincount([windows[crop.tobytes()] for crop in found], minlength=25)
    expected = count / 25
    chi_square = np.sum((hits - expected) ** 2 / expected)
    assert chi_square < 43  # 99 % of 24 degrees of freedom


def test_no_padding_changes_nothing() -> None:
    batch = jnp.asarray(images_of(4))
    assert augment.random_crop(batch, keys_of(4), 0) is batch


def test_the_border_is_black_before_normalisation() -> None:
    white = jnp.full((64, 8, 8, 3), 255, jnp.uint8)
    options = OPTIONS | {"brightness": 0.0}
    found = np.asarray(augment.train_images(white, KEY, jnp.arange(64), **options))
    black, full = -np.array(MEAN) / STD, (1 - np.array(MEAN)) / STD
    distance = [np.abs(found - value).max(-1) for value in (black, full)]
    assert np.minimum(*distance).max() < 1e-6  # nothing but black and white
    assert 0.2 < np.mean(distance[0] < 1e-6) < 0.7


def test_flips_mirror_half_of_the_images_left_to_right() -> None:
    batch = images_of(1000, side=4)
    found = np.asarray(augment.random_flip(jnp.asarray(batch), keys_of(1000)))
    mirrored = np.array([np.fliplr(image) for image in batch])
    flipped = np.all(found == mirrored, axis=(1, 2, 3))
    np.testing.assert_array_equal(found[~flipped], batch[~flipped])
    assert abs(flipped.mean() - 0.5) < 0.05


def test_brightness_is_pillows() -> None:
    batch = images_of(64, side=16)
    keys = keys_of(64)
    found = np.asarray(augment.random_brightness(jnp.asarray(batch), keys, 0.9))
    assert found.dtype == np.uint8
    draw = functools.partial(jax.random.uniform, minval=0.1, maxval=1.9)
    factors = np.array([draw(key) for key in keys])
    assert factors.min() < 0.4 and factors.max() > 1.6
    for image, factor, mine in zip(batch, factors, found, strict=True):
        enhancer = ImageEnhance.Brightness(Image.fromarray(image))
        np.testing.assert_array_equal(mine, enhancer.enhance(float(factor)))


def test_brightness_stays_in_its_range_and_never_turns_negative() -> None:
    gray = jnp.full((2000, 1, 1, 1), 100, jnp.uint8)
    found = np.asarray(augment.random_brightness(gray, keys_of(2000), 0.25)).ravel()
    assert (found.min(), found.max()) in {(75, 124), (75, 125)}
    assert len(np.unique(found)) >= 50
    wild = np.asarray(augment.random_brightness(gray, keys_of(2000), 2.0)).ravel()
    assert wild.min() < 5 and wild.max() == 255
    assert np.mean(wild == 0) < 0.02


@pytest.mark.parametrize("channels", [1, 3])
def test_normalisation_is_the_formula(channels: int) -> None:
    batch = images_of(4, channels=channels)
    mean, std = [0.4, 0.5, 0.1][:channels], [0.2, 0.3, 0.25][:channels]
    expected = (batch.astype(np.float64) / 255 - mean) / std
    found = augment.test_images(jnp.asarray(batch), mean=mean, std=std)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    half = augment.normalize(jnp.asarray(batch), mean, std, jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, found.astype(jnp.bfloat16))


def test_normalisation_needs_a_number_a_channel() -> None:
    with pytest.raises(ValueError, match="need 1 numbers each"):
        augment.normalize(jnp.zeros((1, 2, 2, 1), jnp.uint8), MEAN, STD)


def test_published_constants() -> None:
    assert augment.NORMALIZATION["imagenet"] == (
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )
    assert MEAN == (0.5071, 0.4866, 0.4409) and STD == (0.2009, 0.1984, 0.2023)


def test_digits_constants_are_those_of_the_training_split(tmp_path: object) -> None:
    pixels = resident.load("digits", "train", str(tmp_path)).images / 255
    mean, std = augment.NORMALIZATION["digits"]
    np.testing.assert_allclose([pixels.mean(), pixels.std()], [*mean, *std], atol=1e-4)


def test_without_options_training_images_are_only_normalised() -> None:
    batch = jnp.asarray(images_of(4))
    off = OPTIONS | {"padding": 0, "flip": False, "brightness": 0.0}
    found = augment.train_images(batch, KEY, jnp.arange(4), **off)
    np.testing.assert_array_equal(found, augment.test_images(batch, mean=MEAN, std=STD))


def test_one_option_does_not_move_another() -> None:
    batch = jnp.asarray(images_of(64, side=6))
    rows = jnp.arange(64)
    plain = OPTIONS | {"brightness": 0.0, "padding": 0}
    flips = np.asarray(augment.train_images(batch, KEY, rows, **plain))
    both = OPTIONS | {"brightness": 0.0, "padding": 1}
    found = np.asarray(augment.train_images(batch, KEY, rows, **both))
    black = (-np.array(MEAN) / STD)[None, :]
    for image, cropped in zip(flips, found, strict=True):
        inside = np.abs(cropped - black).max(-1) > 1e-6  # pixels are at least 1
        assert np.isin(cropped[inside].round(4), image.round(4)).all()
    crops_only = OPTIONS | {"brightness": 0.0, "padding": 1, "flip": False}
    crops = np.asarray(augment.train_images(batch, KEY, rows, **crops_only))
    same = np.all(crops == found, axis=(1, 2, 3))
    mirrored = np.all(crops[:, :, ::-1] == found, axis=(1, 2, 3))
    assert np.all(same | mirrored) and 0 < same.sum() < 64


def test_crops_and_flips_are_independent() -> None:
    count = 3600
    image = images_of(1, side=4, channels=1)[0]
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    windows = {}
    for i, (y, x) in enumerate(np.ndindex(3, 3)):
        window = padded[y : y + 4, x : x + 4]
        windows[window.tobytes()] = 2 * i
        windows[np.fliplr(window).tobytes()] = 2 * i + 1
    options = {"padding": 1, "flip": True, "brightness": 0.0}
    batch = jnp.broadcast_to(image, (count, *image.shape))
    found = augment.train_images(
        batch, KEY, jnp.arange(count), mean=[0.0], std=[1 / 255], **options
    )
    pixels = np.rint(found).astype(np.uint8)
    hits = np.bincount([windows[p.tobytes()] for p in pixels], minlength=18)
    chi_square = np.sum((hits - count / 18) ** 2 / (count / 18))
    assert chi_square < 33.4  # 99 % of 17 degrees of freedom


def test_the_key_and_the_row_decide() -> None:
    image = images_of(1)
    batch = jnp.broadcast_to(image, (32, *image.shape[1:]))
    rows = jnp.arange(32)
    train = jax.jit(functools.partial(augment.train_images, **OPTIONS))
    first = np.asarray(train(batch, KEY, rows))
    other = train(batch, jax.random.key(8), rows)
    assert len({found.tobytes() for found in first}) == 32
    assert not np.array_equal(first, other)
    part = train(batch[:4], KEY, rows[10:14])
    np.testing.assert_array_equal(part, first[10:14])


@pytest.mark.slow
def test_the_images_are_the_same_in_float64_mode(x64: None) -> None:
    batch, rows = images_of(16), np.arange(16)
    wide = augment.train_images(batch, KEY, rows, **OPTIONS)
    with jax.enable_x64(False):
        narrow = augment.train_images(batch, KEY, rows, **OPTIONS)
    assert wide.dtype == narrow.dtype == jnp.float32
    np.testing.assert_array_equal(wide, narrow)


def test_eight_devices_make_the_images_of_one() -> None:
    assert jax.device_count() == 8
    batch, rows = images_of(8), np.arange(8, dtype=np.int32)
    train = functools.partial(augment.train_images, **OPTIONS)
    one = np.asarray(jax.jit(train)(batch, KEY, rows))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    arguments = (
        jax.device_put(batch, split),
        jax.device_put(KEY, NamedSharding(mesh, PartitionSpec())),
        jax.device_put(rows, split),
    )
    compiled = jax.jit(train, out_shardings=split).lower(*arguments).compile()
    np.testing.assert_array_equal(compiled(*arguments), one)
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text()
    mapped = jax.pmap(train, in_axes=(0, None, 0))
    shares = mapped(batch[:, None], KEY, rows[:, None])
    np.testing.assert_array_equal(np.asarray(shares)[:, 0], one)
