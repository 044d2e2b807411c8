"""Class-incremental scenarios: the order of the classes and their split into steps.

Labels are re-indexed once by their position in the class order, so that everywhere
else the classes of a step are a range, the old classes ``[0, num_old)`` and the seen
ones ``[0, num_seen)``.
"""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bsce_jax.errors import UserError

ClassOrder = str | Sequence[int] | NDArray[np.integer]


def class_order(num_classes: int, order: ClassOrder = "seed1993") -> NDArray[np.int64]:
    """The order in which classes are learned.

    Args:
      num_classes: classes of the experiment.
      order: one of

        * "seed<N>": NumPy's legacy generator seeded with N; "seed1993" is the order of
          LUCIR and of Jodelet et al. (CIFAR-100: 68, 56, 78, ...);
        * "icarl": the order of the original iCaRL on CIFAR-100, used by PODNet, DDE and
          BiC (87, 0, 52, ...);
        * "natural": 0, 1, 2, ...;
        * the classes themselves, each once.

    Returns:
      ``[num_classes]`` int64: the class at each position.

    Raises:
      UserError: an unknown order, one of another number of classes, or a sequence that
        is no permutation.
    """
    if num_classes < 1:
        raise UserError(f"num_classes={num_classes}: must be at least 1")
    if not isinstance(order, str):
        return _permutation(order, num_classes)
    if order == "natural":
        return np.arange(num_classes, dtype=np.int64)
    if order == "icarl":
        return _icarl_order(num_classes)
    seed = re.fullmatch(r"seed(\d+)", order)
    if seed is None or int(seed[1]) >= 2**32:
        raise UserError(
            f"class_order={order!r}: must be 'seed<N>' with N below 2**32, 'icarl', "
            "'natural' or the classes themselves"
        )
    return np.random.RandomState(int(seed[1])).permutation(num_classes).astype(np.int64)


def class_groups(num_classes: int, base_classes: int, steps: int) -> tuple[range, ...]:
    """Splits the positions of the class order into the steps of a run.

    Args:
      num_classes: classes of the experiment.
      base_classes: classes of the base step, which `steps` equal increments follow; 0
        for `steps` equal groups, the first of which is the base step.
      steps: at least 1.

    Returns:
      The positions learned in each step, base step first.

    Raises:
      UserError: the classes cannot be divided so.
    """
    if num_classes < 1:
        raise UserError(f"num_classes={num_classes}: must be at least 1")
    if steps < 1:
        raise UserError(f"steps={steps}: must be at least 1")
    if not 0 <= base_classes < num_classes:
        raise UserError(
            f"base_classes={base_classes}: must be from 0 to {num_classes - 1}, "
            f"with {num_classes} classes"
        )
    size, rest = divmod(num_classes - base_classes, steps)
    if rest:
        raise UserError(
            f"steps={steps}: the {num_classes - base_classes} classes to divide are no "
            "multiple of it"
        )
    base = (range(base_classes),) if base_classes else ()
    starts = range(base_classes, num_classes, size)
    return base + tuple(range(start, start + size) for start in starts)


def imagenet_subset(kind: str) -> NDArray[np.int64]:
    """The classes of ImageNet-Subset, of which two are in use.

    Args:
      kind: "first100", the first hundred identifiers (Jodelet et al., PODNet, BiC), or
        "lucir", a hundred drawn with seed 1993 (LUCIR, Mnemonics, DDE).

    Returns:
      ``[100]`` int64, increasing indices into the 1000 sorted WordNet identifiers.

    Raises:
      UserError: unknown kind.
    """
    if kind == "first100":
        return np.arange(100, dtype=np.int64)
    if kind == "lucir":
        drawn = np.random.RandomState(1993).permutation(1000)[:100]
        return np.sort(drawn).astype(np.int64)
    raise UserError(f"kind={kind!r}: must be 'first100' or 'lucir'")


def label_positions(
    order: Sequence[int] | NDArray[np.integer], num_source_classes: int
) -> NDArray[np.int32]:
    """The table that re-indexes labels.

    Args:
      order: ``[classes]`` source labels in class order: `class_order`, or for a subset
        ``subset[class_order(len(subset))]``.
      num_source_classes: labels of the data set.

    Returns:
      ``[num_source_classes]`` int32: the position of each source label in the class
      order, -1 for a label that is not used.

    Raises:
      UserError: a label twice, or outside ``[0, num_source_classes)``.
    """
    labels = np.asarray(order, np.int64)
    if labels.size and not 0 <= labels.min() <= labels.max() < num_source_classes:
        raise UserError(f"class_order: a class is outside [0, {num_source_classes})")
    if len(np.unique(labels)) != len(labels):
        raise UserError("class_order: a class occurs twice")
    positions = np.full(num_source_classes, -1, np.int32)
    positions[labels] = np.arange(len(labels))
    return positions


def _permutation(
    order: Sequence[int] | NDArray[np.integer], num_classes: int
) -> NDArray[np.int64]:
    classes = np.asarray(order)
    if not (
        np.issubdtype(classes.dtype, np.integer)
        and np.array_equal(np.sort(classes, axis=None), np.arange(num_classes))
        and classes.ndim == 1
    ):
        raise UserError(
            f"class_order: {classes.size} classes given; must be each class from 0 to "
            f"{num_classes - 1} once"
        )
    return classes.astype(np.int64)


def _icarl_order(num_classes: int) -> NDArray[np.int64]:
    if num_classes != 100:
        raise UserError(f"class_order='icarl': is for 100 classes, not {num_classes}")
    # iCaRL's loader shuffled the 500 images of each of the 100 classes with the same
    # generator before the classes were shuffled.
    generator = np.random.RandomState(1993)
    for _ in range(100):
        generator.permutation(500)
    return generator.permutation(100).astype(np.int64)
