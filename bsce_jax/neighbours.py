"""Nearest neighbours by cosine, in pieces of one size: compiled once, whatever the set.

Between vectors of length 1 the nearest by cosine are the nearest by Euclidean distance.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from bsce_jax.norms import normalise

QUERIES, POOL = 1024, 4096  # vectors of a piece


def nearest(features: ArrayLike, pool: ArrayLike, count: int) -> NDArray[np.int32]:
    """The nearest other vectors of a pool to each vector.

    Args:
      features: float [N, D]; their lengths have no effect.
      pool: bool [N], which of them may be found.
      count: K, how many of them.

    Returns:
      int32 [N, K], rows of `features`, the nearest first, of equal ones the first; no
      vector is its own neighbour. -1 where the pool has too few.
    """
    vectors = np.asarray(features, np.float32)
    rows = np.flatnonzero(np.asarray(pool)).astype(np.int32)
    found = np.full((len(vectors), count), -1, np.int32)
    pieces = [
        (_padded(vectors[part], POOL, 0.0), _padded(part, POOL, -1))
        for part in _parts(rows, POOL)
    ]
    for part in _parts(np.arange(len(vectors), dtype=np.int32), QUERIES):
        queries = _padded(vectors[part], QUERIES, 0.0)
        own = _padded(part, QUERIES, -1)
        best: tuple[ArrayLike, ArrayLike] = (
            np.full((QUERIES, count), -np.inf, np.float32),
            np.full((QUERIES, count), -1, np.int32),
        )
        for piece in pieces:
            best = _merge(queries, own, *piece, *best, count)
        found[part] = np.asarray(best[1])[: len(part)]
    return found


def _parts(rows: NDArray, size: int) -> list[NDArray]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _padded(values: NDArray, size: int, filler: float) -> NDArray:
    widths = [(0, size - len(values))] + [(0, 0)] * (values.ndim - 1)
    return np.pad(values, widths, constant_values=filler)


@functools.partial(jax.jit, static_argnames="count")
def _merge(
    queries: jax.Array,
    own: jax.Array,
    pool: jax.Array,
    rows: jax.Array,
    cosines: jax.Array,
    found: jax.Array,
    count: int,
) -> tuple[jax.Array, jax.Array]:
    """The best of what was found, [Q, K], and of a piece of the pool."""
    with jax.default_matmul_precision("highest"):
        near = jnp.dot(normalise(queries), normalise(pool).T)
    allowed = (rows[None, :] >= 0) & (rows[None, :] != own[:, None])
    near = jnp.where(allowed, near, -jnp.inf)
    every = jnp.concatenate([cosines, near], axis=1)
    names = jnp.concatenate([found, jnp.broadcast_to(rows, near.shape)], axis=1)
    best, places = jax.lax.top_k(every, count)
    names = jnp.take_along_axis(names, places, axis=1)
    return best, jnp.where(best > -jnp.inf, names, -1)
