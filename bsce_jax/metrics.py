"""Measures of class-incremental learning, on NumPy arrays."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bsce_jax.errors import UserError


def average_incremental_accuracy(accuracies: ArrayLike) -> float:
    """Mean over all steps, base step included, of the accuracy after each step.

    Args:
      accuracies: ``[steps]``, each on the test images of all classes seen by then.

    Returns:
      The mean, in the unit of the accuracies.

    Raises:
      UserError: no accuracies.
    """
    values = np.asarray(accuracies, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise UserError(
            f"accuracies of shape {values.shape}: must be [steps], at least one"
        )
    return float(values.mean())


def forgetting(matrix: Sequence[Sequence[float | None]] | NDArray) -> float:
    """Average forgetting of the classes of earlier steps at the end of a run.

    For the classes of each step but the last: the best accuracy on them after any
    earlier step, minus the accuracy after the last one (Chaudhry et al. 2018).

    Args:
      matrix: ``[steps, steps]``; ``matrix[t][j]`` is the accuracy after step t on the
        classes introduced in step j. Entries above the diagonal are not read, and may
        be NaN or None.

    Returns:
      The mean over steps j, in the unit of the accuracies; negative where the old
      classes improved, 0 where there is one step only.

    Raises:
      UserError: not a square matrix, or an entry on or below the diagonal missing.
    """
    values = np.asarray(matrix, np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or values.size == 0:
        raise UserError(f"matrix of shape {values.shape}: must be [steps, steps]")
    if np.isnan(values[np.tril_indices(len(values))]).any():
        raise UserError("matrix: an accuracy on or below the diagonal is missing")
    last = len(values) - 1
    drops = [values[j:last, j].max() - values[last, j] for j in range(last)]
    return float(np.mean(drops)) if drops else 0.0


def confusion_matrix(
    labels: ArrayLike, predictions: ArrayLike, num_classes: int
) -> NDArray[np.int64]:
    """Counts of true and predicted class.

    Args:
      labels: ``[images]`` int, true classes.
      predictions: ``[images]`` int.
      num_classes: classes of the experiment.

    Returns:
      ``[classes, classes]`` int64, rows the true class, columns the predicted one.

    Raises:
      UserError: shapes differ, or a class is outside ``[0, num_classes)``.
    """
    true, predicted = np.asarray(labels), np.asarray(predictions)
    if true.shape != predicted.shape or true.ndim != 1:
        raise UserError(
            f"labels {true.shape} and predictions {predicted.shape}: must be [images]"
        )
    for name, classes in (("labels", true), ("predictions", predicted)):
        if classes.size and not 0 <= classes.min() <= classes.max() < num_classes:
            raise UserError(f"{name}: a class is outside [0, {num_classes})")
    cells = true.astype(np.int64) * num_classes + predicted.astype(np.int64)
    counts = np.bincount(cells, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).astype(np.int64)


def accuracy(
    confusion: ArrayLike, classes: slice | Sequence[int] | NDArray = slice(None)
) -> float:
    """Accuracy on the images of some classes, predicted among all classes.

    Args:
      confusion: ``[classes, classes]``, from `confusion_matrix`.
      classes: which true classes: ``slice(0, num_base)`` is the base accuracy,
        ``slice(0, num_old)`` the old classes', ``slice(num_old, num_seen)`` the new.

    Returns:
      The fraction of images in [0, 1]; NaN where these classes have no images.
    """
    counts = np.asarray(confusion)
    total = counts[classes].sum()
    return float(counts.diagonal()[classes].sum() / total) if total else float("nan")
