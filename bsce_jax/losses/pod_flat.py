"""Distillation of the final features, POD-flat (PODNet, Douillard et al. 2020)."""

from collections.abc import Mapping
from typing import Any

import jax

from bsce_jax.losses.less_forget import less_forget

NEEDS_OLD_CLASSES = True
"""The term is absent from the program of the base step."""


def term(
    student: Mapping[str, Any], teacher: Mapping[str, Any], batch: Any, context: Any
) -> tuple[jax.Array, jax.Array]:
    """POD-flat as a term of a training step, on old and new samples alike.

    One minus the cosine, as the authors coded it: half the square of the distance of
    the normalised features.

    Args:
      student: outputs of the model in training, with ``"features"`` [batch, size].
      teacher: outputs of the frozen model of the step before, likewise.
      batch: ``valid`` [batch] (0 for padding rows).
      context: not used.

    Returns:
      Values and weights, both ``[batch]``; sum(w * v) / sum(w) is the loss.
    """
    return less_forget(student["features"], teacher["features"]), batch.valid
