"""Neural gas (Martinetz and Schulten 1991): vertices spread over a set of vectors.

It places the vertices of TPCIL's graphs (Tao et al. 2020). NumPy in float64: it runs
once a step, one class at a time.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

PASSES = 10  # over the vectors
STEP = (0.1, 0.01)  # of a vertex towards a vector, first and last
REACH = (10.0, 0.1)  # in ranks of nearness, first and last


def fit(vectors: ArrayLike, count: int, rng: np.random.Generator) -> Floats:
    """Vertices of a set of vectors.

    They start as `count` of the vectors. Every vector, in random order, pulls every
    vertex: ``w += step * exp(-k / reach) * (v - w)``, k = 0 for the nearest vertex, 1
    for the next; step and reach fall geometrically.

    Args:
      vectors: float [N, D], N > 0.
      count: of vertices; no more than N are made.
      rng: of the start and of the orders.

    Returns:
      [min(count, N), D].
    """
    vectors = np.asarray(vectors, np.float64)
    number = len(vectors)
    vertices = vectors[rng.permutation(number)[:count]].copy()
    last = max(PASSES * number - 1, 1)
    done = 0
    for _ in range(PASSES):
        for vector in vectors[rng.permutation(number)]:
            part = done / last
            step, reach = (a * (b / a) ** part for a, b in (STEP, REACH))
            away = vector - vertices
            ranks = np.argsort(np.argsort(np.sum(away**2, axis=1)))
            vertices += step * np.exp(-ranks / reach)[:, None] * away
            done += 1
    return vertices


def representatives(vectors: ArrayLike, vertices: ArrayLike) -> NDArray[np.int64]:
    """The vector nearest to each vertex, none twice.

    Args:
      vectors: float [N, D].
      vertices: float [V, D], V at most N.

    Returns:
      [V] rows of `vectors`, those first whose vertices are nearest to most vectors.
    """
    vectors, vertices = (np.asarray(x, np.float64) for x in (vectors, vertices))
    squares = np.sum(vectors**2, axis=1)[:, None] + np.sum(vertices**2, axis=1)
    away = squares - 2 * vectors @ vertices.T
    won = np.bincount(np.argmin(away, axis=1), minlength=len(vertices))
    found = []
    for vertex in np.argsort(-won, kind="stable"):
        found.append(int(np.argmin(away[:, vertex])))
        away[found[-1]] = np.inf
    return np.array(found, np.int64)
