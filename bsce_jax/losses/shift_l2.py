"""Penalty on the shift of the new classes' logits (BiC, Wu et al. 2019)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bsce_jax.norms import widened


def shift_l2(shift: jax.Array) -> jax.Array:
    """Half the square of a learned shift, as the authors coded it.

    Args:
      shift: ``[]``, any floating dtype.

    Returns:
      ``[]``, computed in float32 (float64 where the input is).
    """
    return jnp.square(widened(shift)) / 2


def term(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any] | None,
    batch: Any,
    context: Any,
) -> tuple[jax.Array, jax.Array]:
    """The penalty as a term of a training step: one number, whatever the batch.

    Args:
      student: outputs of the model in training, with ``"shift"`` [].
      teacher: not used.
      batch: not used.
      context: not used.

    Returns:
      Value and weight, both ``[1]``, the same on every device; sum(w * v) / sum(w) over
      the devices is the penalty.
    """
    value = shift_l2(student["shift"])[None]
    return value, jnp.ones_like(value)
