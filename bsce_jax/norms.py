"""Lengths of vectors and vectors of length 1, with derivatives that are finite at 0.

And the precision in which both, and all losses, are computed.
"""

import jax
import jax.numpy as jnp

SHORTEST = 1e-12
"""Vectors shorter than this are divided by it, and not by their length."""


def widened(x: jax.Array) -> jax.Array:
    """An array of any floating dtype in float32, or float64 where it is that."""
    return x.astype(jnp.result_type(x, jnp.float32))


def norm(x: jax.Array, smallest: float = SHORTEST) -> jax.Array:
    """Euclidean norm over the last axis, ``[..., size] -> [...]``.

    Up to `smallest` it is 0 with derivatives of 0, which is PyTorch's gradient at 0,
    where that of the square root is infinite.
    """
    square = jnp.sum(jnp.square(x), axis=-1)
    positive = square > smallest**2
    # The square root must not see 0, not even where the outer `where` drops what comes
    # of it: its infinite derivative times 0 would be NaN.
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def normalise(x: jax.Array, axis: int = -1) -> jax.Array:
    """x / max(||x||, 1e-12) along an axis, as PyTorch's `functional.normalize`.

    Zero vectors stay zero, and every derivative is finite there: the first is that of
    x / 1e-12.
    """
    square = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    short = square < SHORTEST**2
    length = jnp.sqrt(jnp.where(short, 1.0, square))
    return x / jnp.where(short, SHORTEST, length)
