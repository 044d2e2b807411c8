"""Rows of a head for new classes, from the features of their images.

NumPy: it runs once a step. `head` holds the head's parameters (float32, class axis
last); the features are one array [images, D] for each new class, of the network as the
step before left it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bsce_jax.nearest_mean import normalised


def imprint(
    head: Mapping[str, NDArray], features: Sequence[NDArray], first: int
) -> dict[str, NDArray]:
    """Imprinted rows (LUCIR, Hou et al. 2019, section 3), as the authors' code has it.

    A new row is the mean of the class's normalised features, normalised, times the
    mean length of the old rows.

    Args:
      head: "kernel" [D, C]; what else there is stays.
      features: of each new class, [images, D].
      first: position of the first new class; the old ones are before it.

    Returns:
      The head with new rows; float32.
    """
    kernel = np.array(head["kernel"], np.float64)
    length = np.linalg.norm(kernel[:, :first], axis=0).mean()
    for position, of_class in enumerate(features, start=first):
        mean = normalised(of_class).mean(axis=0)
        kernel[:, position] = length * normalised(mean)
    return {**head, "kernel": kernel.astype(np.float32)}


def k_means(
    head: Mapping[str, NDArray],
    features: Sequence[NDArray],
    first: int,
    rng: np.random.Generator,
) -> dict[str, NDArray]:
    """Proxies that are centres of k-means (PODNet, Douillard et al. 2020, section 3.2).

    As in the authors' code the centres are those of the normalised features, times
    the mean length of the old proxies. A class with fewer images than proxies has each
    centre more than once.

    Args:
      head: "kernel" [D, K, C], K proxies a class; what else there is stays.
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
