"""Four rotations of a batch of square images, as one batch four times as long."""

import jax
import jax.numpy as jnp

VIEWS = ("plain", "rotated90", "rotated180", "rotated270")


def stacked(images: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All rotations of all images, one rotation after another.

    Args:
      images: [B, H, H, channels].
      valid: [B].

    Returns:
      [4 B, H, H, channels] and [4 B].
    """
    turned = [jnp.rot90(images, turns, axes=(1, 2)) for turns in range(len(VIEWS))]
    return jnp.concatenate(turned), jnp.tile(valid, len(VIEWS))


def by_image(values: jax.Array) -> jax.Array:
    """What was found for `stacked` images: [4 B, ...] -> [B, 4, ...]."""
    return jnp.moveaxis(values.reshape(len(VIEWS), -1, *values.shape[1:]), 0, 1)
