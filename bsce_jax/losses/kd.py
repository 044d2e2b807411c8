"""Knowledge distillation on the logits of the old classes (Jodelet et al., Eq. 2)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bsce_jax.log_prior import EXCLUDED
from bsce_jax.norms import widened

NEEDS_OLD_CLASSES = True
"""The term is absent from the program of the base step."""
NEEDS_TEACHER = True
"""The term is refused in a phase without a teacher."""

LIMITS = {"temperature": (1e-3, 1e3)}


def knowledge_distillation(
    logits: jax.Array,
    teacher_logits: jax.Array,
    old: jax.Array,
    temperature: float = 2.0,
) -> jax.Array:
    """Cross-entropy from the teacher's to the student's softened probabilities.

    ``-T^2 * sum_k q_k log p_k`` over the old classes k, with q and p the softmax over
    the old classes of the teacher's and the student's logits divided by T (Eq. 2). It
    differs from T^2 times the KL divergence by a constant, and has its gradient.

    Args:
      logits: ``[batch, classes]`` of the student, any floating dtype.
      teacher_logits: ``[batch, classes]`` of the frozen model of the step before; no
        gradient flows into them.
      old: ``[classes]`` bool, classes learned in an earlier step.
      temperature: T, above 0.

    Returns:
      ``[batch]``, computed in float32 (float64 where an input is); 0 where no class is
      old.
    """
    old = old[None, :]

    def soften(scores: jax.Array) -> jax.Array:
        scores = widened(scores)
        return jnp.where(old, scores / temperature, EXCLUDED)

    targets = jax.nn.softmax(soften(jax.lax.stop_gradient(teacher_logits)))
    log_probabilities = jax.nn.log_softmax(soften(logits))
    # The mask matters where no class is old: both softmaxes are then uniform, not 0.
    return -(temperature**2) * jnp.sum(targets * log_probabilities, axis=1, where=old)


def term(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    batch: Any,
    context: Any,
    *,
    temperature: float = 2.0,
) -> tuple[jax.Array, jax.Array]:
    """Distillation from the teacher as a term of a training step.

    Args:
      student: outputs of the model in training, with ``"logits"`` [batch, classes].
      teacher: outputs of the frozen model of the step before, likewise.
      batch: ``valid`` [batch] (0 for padding rows).
      context: ``old`` [classes] bool.
      temperature: T, above 0.

    Returns:
      Values and weights, both ``[batch]``; sum(w * v) / sum(w) is the loss.
    """
    values = knowledge_distillation(
        student["logits"], teacher["logits"], context.old, temperature
    )
    return values, batch.valid
