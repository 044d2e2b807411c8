"""Less-forget constraint: features keep their direction (LUCIR, Hou et al. 2019)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bsce_jax.norms import normalise, widened

NEEDS_OLD_CLASSES = True
"""The term is absent from the program of the base step."""
NEEDS_TEACHER = True
"""The term is refused in a phase without a teacher."""


def less_forget(features: jax.Array, teacher_features: jax.Array) -> jax.Array:
    """One minus the cosine of the student's and the teacher's features.

    Also the POD-flat loss of PODNet, as its authors coded it.

    Args:
      features: ``[batch, size]`` of the student, any floating dtype.
      teacher_features: ``[batch, size]`` of the frozen model of the step before; no
        gradient flows into them.

    Returns:
      ``[batch]`` in [0, 2], computed in float32 (float64 where an input is); 1 where
      one of the vectors is zero.
    """

    def direction(vectors: jax.Array) -> jax.Array:
        return normalise(widened(vectors))

    target = jax.lax.stop_gradient(direction(teacher_features))
    return 1 - jnp.sum(direction(features) * target, axis=1)


def term(
    student: Mapping[str, Any], teacher: Mapping[str, Any], batch: Any, context: Any
) -> tuple[jax.Array, jax.Array]:
    """Less-forget as a term of a training step, on old and new samples alike.

    Args:
      student: outputs of the model in training, with ``"features"`` [batch, size].
      teacher: outputs of the frozen model of the step before, likewise.
      batch: ``valid`` [batch] (0 for padding rows).
      context: not used.

    Returns:
      Values and weights, both ``[batch]``; sum(w * v) / sum(w) is the loss.
    """
    return less_forget(student["features"], teacher["features"]), batch.valid
