"""Streaming linear discriminant analysis (Deep SLDA, Hayes and Kanan 2020).

Class means and one covariance of all classes, learned from features one sample at a
time. NumPy in float64: it runs once a step, on features, and its results must not
depend on the matmul precision of an accelerator.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_CHUNK = 8192  # samples whose differences from the means are in memory together


def shrunk_covariance(centred: ArrayLike) -> Floats:
    """Covariance of samples of mean zero, shrunk towards a multiple of the identity.

    Oracle approximating shrinkage (Chen et al. 2010, Eq. 23) in the variant of
    scikit-learn's `OAS`, which the authors of SLDA call: without the terms in 2 / size,
    which vanish for many features.

    Args:
      centred: float [N, D], at least one sample; each had its class mean subtracted.

    Returns:
      [D, D].
    """
    centred = np.asarray(centred, np.float64)
    samples, size = centred.shape
    covariance = centred.T @ centred / samples
    mean = np.trace(covariance) / size
    square = np.mean(covariance**2)
    away = (samples + 1) * (square - mean**2 / size)
    shrinkage = min((square + mean**2) / away, 1.0) if away > 0 else 1.0
    return (1 - shrinkage) * covariance + shrinkage * mean * np.eye(size)


def stream(
    covariance: ArrayLike,
    means: ArrayLike,
    counts: ArrayLike,
    n: int,
    features: ArrayLike,
    labels: ArrayLike,
) -> tuple[Floats, Floats, NDArray[np.int64], int]:
    """Learns samples in their order, as if one at a time.

    For each sample x of class y, with the mean before its update, ``S <- (n S + n / (n
    + 1) (x - mean_y) (x - mean_y)^T) / (n + 1)`` and ``mean_y <- mean_y + (x - mean_y)
    / (count_y + 1)``; then count_y and n grow by one.

    n S is a plain sum of outer products, and the means before the updates follow from
    cumulative sums of each class: hence no loop over the samples.

    Args:
      covariance: float [D, D], S.
      means: float [C, D]; a class without samples starts from its row: zeros, in the
        authors' code.
      counts: int [C], samples that the means are of.
      n: samples that the covariance is of.
      features: float [N, D].
      labels: int [N], rows of `means`.

    Returns:
      covariance, means, counts and n after the last sample; new arrays.
    """
    means, counts = np.array(means, np.float64), np.array(counts, np.int64)
    features, labels = np.asarray(features), np.asarray(labels)
    total = n * np.asarray(covariance, np.float64)
    for begin in range(0, len(labels), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        aside = _learn(means, counts, features[part], labels[part])
        before = n + begin + np.arange(len(aside))
        total += (aside * (before / (before + 1))[:, None]).T @ aside
    n += len(labels)
    after = total / n if n else np.array(covariance, np.float64)
    return after, means, counts, n


def _learn(
    means: Floats, counts: NDArray[np.int64], features: ArrayLike, labels: NDArray
) -> Floats:
    """Moves means and counts in place; each sample minus the mean before it, [N, D]."""
    aside = np.array(features, np.float64)
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        # From the mean that there is: sums of differences lose fewer digits.
        away = aside[rows] - means[c]
        sums = np.cumsum(away, axis=0)
        before = counts[c] + np.arange(1, len(rows))
        aside[rows[0]] = away[0]
        aside[rows[1:]] = away[1:] - sums[:-1] / before[:, None]
        counts[c] += len(rows)
        means[c] += sums[-1] / counts[c]
    return aside


def classifier(
    covariance: ArrayLike, means: ArrayLike, shrinkage: float = 1e-4
) -> tuple[Floats, Floats]:
    """The linear classifier: ``scores = features @ weights + biases``.

    ``x^T L m_k - m_k^T L m_k / 2`` with L the inverse of ``(1 - e) S + e I``.

    Args:
      covariance: float [D, D], S.
      means: float [C, D], m.
      shrinkage: e.

    Returns:
      weights [D, C] and biases [C].
    """
    covariance = np.asarray(covariance, np.float64)
    means = np.asarray(means, np.float64)
    mixed = (1 - shrinkage) * covariance + shrinkage * np.eye(len(covariance))
    weights: Floats = np.linalg.pinv(mixed, hermitian=True) @ means.T
    return weights, -0.5 * np.sum(means.T * weights, axis=0)
