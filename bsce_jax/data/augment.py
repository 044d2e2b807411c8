"""Augmentation and normalisation of raw images, compiled: uint8 in, float out.

The randomness of an image depends on its key alone, which is that of an update and of
the image's row in the global batch, never on the device that computes it. Options are
static Python values: bind them before jit.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Published (mean, standard deviation) per channel, of pixels in [0, 1].
NORMALIZATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    # Hou et al., 2019 (LUCIR), their code
    "cifar100_lucir": ((0.5071, 0.4866, 0.4409), (0.2009, 0.1984, 0.2023)),
    # Douillard et al., 2020 (PODNet), their code
    "cifar100_podnet": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    # the usual values for ImageNet
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # measured on the training split of the package's own builder
    "digits": ((0.3052,), (0.3760,)),
}


def keys(key: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns one key an image, [B], from the update's key and rows [B] int.

    `rows` are numbers in the global batch: a device passes those of its own share. The
    key may also be one an image, [B].
    """
    of_image = 0 if key.ndim else None
    return jax.vmap(jax.random.fold_in, in_axes=(of_image, 0))(key, rows)


def random_crop(images: jax.Array, keys: jax.Array, padding: int) -> jax.Array:
    """Shifts each image by up to `padding` pixels, zeros (black) coming in.

    The padding is on raw pixels, before normalisation, as in the authors' code.

    Args:
      images: [B, H, W, Ch], any dtype.
      keys: [B] keys.
      padding: pixels added on each side before a window of H x W is cut out.

    Returns:
      [B, H, W, Ch] of the same dtype.
    """
    if padding == 0:
        return images
    border = ((0, 0), (padding, padding), (padding, padding), (0, 0))

    def crop(image: jax.Array, key: jax.Array) -> jax.Array:
        # randint would compile three random generators where this compiles one.
        shift = jax.random.uniform(key, (2,), jnp.float32) * (2 * padding + 1)
        top, left = shift.astype(jnp.int32)
        return jax.lax.dynamic_slice(image, (top, left, jnp.int32(0)), images.shape[1:])

    return jax.vmap(crop)(jnp.pad(images, border), keys)


def random_flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability 1/2: [B, H, W, Ch]."""
    flip = jax.vmap(lambda key: jax.random.bernoulli(key, jnp.float32(0.5)))(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def random_brightness(images: jax.Array, keys: jax.Array, amount: float) -> jax.Array:
    """Multiplies each image by a factor from U(1 - amount, 1 + amount).

    The colour jitter of PODNet has amount 63/255. Results are cut to [0, 255] and
    rounded down, as Pillow does it.

    Args:
      images: uint8 [B, H, W, Ch].
      keys: [B] keys.
      amount: at least 0; factors are never negative.

    Returns:
      uint8 [B, H, W, Ch].
    """
    low, high = max(0.0, 1.0 - amount), 1.0 + amount
    draw = functools.partial(jax.random.uniform, minval=low, maxval=high)
    factor = jax.vmap(lambda key: draw(key, (), jnp.float32))(keys)
    scaled = images.astype(jnp.float32) * factor[:, None, None, None]
    return jnp.minimum(scaled, 255.0).astype(jnp.uint8)


def normalize(
    images: jax.Array,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Returns (images / 255 - mean) / std, computed in float32.

    Args:
      images: uint8 [B, H, W, Ch].
      mean: Ch numbers, of pixels in [0, 1].
      std: Ch numbers.
      dtype: of the result.

    Raises:
      ValueError: mean or std does not have one number a channel.
    """
    channels = images.shape[-1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"mean {tuple(mean)} and std {tuple(std)} need {channels} numbers each, "
            "one a channel"
        )
    centre, scale = (
        jnp.asarray(numbers, jnp.float32).reshape(1, 1, 1, channels)
        for numbers in (mean, std)
    )
    return ((images.astype(jnp.float32) / 255 - centre) / scale).astype(dtype)


def train_images(
    images: jax.Array,
    key: jax.Array,
    rows: jax.Array,
    *,
    padding: int,
    flip: bool,
    brightness: float,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Augments and normalises training images: crop, flip, brightness, normalise.

    Args:
      images: uint8 [B, H, W, Ch].
      key: the update's key, or one an image, [B]: see `keys`.
      rows: [B] int, row of each image in the global batch.
      padding: of `random_crop`; 0 for none.
      flip: whether to mirror half of the images.
      brightness: of `random_brightness`; 0 for none.
      mean, std, dtype: of `normalize`.

    Returns:
      [B, H, W, Ch] of the given dtype.
    """
    # Three keys an image whatever is on: the flips do not change with the padding.
    split = jax.vmap(functools.partial(jax.random.split, num=3), out_axes=1)
    crop_keys, flip_keys, brightness_keys = split(keys(key, rows))
    images = random_crop(images, crop_keys, padding)
    if flip:
        images = random_flip(images, flip_keys)
    if brightness:
        images = random_brightness(images, brightness_keys, brightness)
    return normalize(images, mean, std, dtype)


def test_images(
    images: jax.Array,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Normalises images for evaluation: uint8 [B, H, W, Ch] to the given dtype."""
    return normalize(images, mean, std, dtype)
