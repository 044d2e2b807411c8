"""The nearest-mean-of-exemplars classifier (iCaRL; Rebuffi et al. 2017, Algorithm 1).

NumPy in float64: it runs once a step, on features, and its results must not depend on
the matmul precision of an accelerator.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def normalised(vectors: ArrayLike) -> NDArray[np.float64]:
    """Vectors [..., D] of length 1; zero vectors stay zero."""
    vectors = np.asarray(vectors, np.float64)
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-12)


def class_means(
    features: Sequence[ArrayLike], labels: ArrayLike, num_seen: int
) -> NDArray[np.float64]:
    """Normalised means of the classes' exemplars.

    The mean is over the exemplars of the normalised features and over all views of
    them (the images as they are, and mirrored).

    Args:
      features: of the exemplars, float [N, D], one array a view.
      labels: int [N], positions in the class order.
      num_seen: classes.

    Returns:
      [num_seen, D]; a row of NaN for a class without exemplars, which `classify` never
      chooses.
    """
    points = np.mean([normalised(view) for view in features], axis=0)
    labels = np.asarray(labels)
    means = np.full((num_seen, points.shape[1]), np.nan)
    for c in np.unique(labels):
        means[c] = points[labels == c].mean(axis=0)
    return normalised(means)


def classify(features: ArrayLike, means: ArrayLike) -> NDArray[np.int64]:
    """The class whose mean is nearest to an image's normalised features.

    Args:
      features: float [N, D].
      means: float [C, D], from `class_means`; at least one class has a mean.

    Returns:
      int [N].
    """
    means = np.asarray(means)
    # All means have length 1: the nearest has the largest inner product.
    products = normalised(features) @ means.T
    return np.argmax(np.where(np.isnan(means[:, 0]), -np.inf, products), axis=1)
