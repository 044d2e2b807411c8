"""Views of test images of which features can be asked for."""

import jax.numpy as jnp

from bsce_jax.compute.state import Array

VIEWS = ("plain", "mirrored", "rotated90", "rotated180", "rotated270")


def viewed(images: Array, view: Array) -> Array:
    """The images as a view wants them; only square images are rotated.

    Args:
      images: [B, H, W, channels].
      view: [] int32, position in VIEWS; traced.
    """
    seen = jnp.where(view == VIEWS.index("mirrored"), images[:, :, ::-1], images)
    if images.shape[1] == images.shape[2]:
        for turns in (1, 2, 3):
            turned = jnp.rot90(images, turns, axes=(1, 2))
            seen = jnp.where(view == VIEWS.index(f"rotated{90 * turns}"), turned, seen)
    return seen
