"""PODNet (Douillard et al. 2020, section 3.2): new proxies are centres of k-means."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bsce_jax.nearest_mean import normalised

HEADS = ("local_similarity",)


def begin(
    head: dict[str, NDArray],
    features: Sequence[NDArray],
    first: int,
    rng: np.random.Generator,
) -> dict[str, NDArray]:
    """New proxies: the k-means centres of a class, as long as the old ones.

    As in the authors' code the centres are those of the normalised features, times
    the mean length of the old proxies. A class with fewer images than proxies has each
    centre more than once.

    Args:
      head: "kernel" [D, K, C], K proxies a class, and "scale" [].
      features: of each new class, [images, D].
      first: position of the first new class; the old ones are before it.
      rng: seeds k-means.

    Returns:
      The head with new proxies; float32.
    """
    kernel = np.array(head["kernel"], np.float32)
    proxies = kernel.shape[1]
    length = np.linalg.norm(kernel[:, :, :first], axis=0).mean()
    for position, of_class in enumerate(features, start=first):
        seed = int(rng.integers(2**31))
        centres = _centres(of_class, proxies, seed)
        kernel[:, :, position] = length * centres.T
    return {**head, "kernel": kernel}


def _centres(features: NDArray, count: int, seed: int) -> NDArray:
    """K-means centres [count, D] of the normalised features [images, D]."""
    from sklearn.cluster import KMeans  # slow to import, and only needed here
    from threadpoolctl import threadpool_limits

    points = normalised(features)
    clusters = min(count, len(np.unique(points, axis=0)))
    # One thread: several would add up the centres in an order that is not repeatable.
    with threadpool_limits(limits=1):
        found = KMeans(clusters, n_init=10, random_state=seed).fit(points)
    return np.resize(found.cluster_centers_, (count, points.shape[1]))
