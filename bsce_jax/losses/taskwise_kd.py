"""Distillation in which tasks do not compete (SS-IL, Ahn et al. 2021; EEIL, 2018)."""

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


def taskwise_distillation(
    logits: jax.Array,
    teacher_logits: jax.Array,
    task_ids: jax.Array,
    temperature: float = 2.0,
) -> jax.Array:
    """Divergence of the student from the teacher within each old task, summed.

    ``T^2 * sum_t KL(q_t || p_t)`` over the old tasks t, with q_t and p_t the softmax of
    the teacher's and of the student's logits over the columns of the task alone, both
    divided by T (the task-wise knowledge distillation of Ahn et al. 2021). Its mean is
    the sum of T^2 times PyTorch's ``kl_div(..., "batchmean")`` of each task.

    Args:
      logits: ``[batch, classes]`` of the student, any floating dtype.
      teacher_logits: ``[batch, classes]`` of the frozen model; no gradient flows into
        them.
      task_ids: ``[classes]`` int, the task of a class, below ``classes``; negative for
        a class that takes no part.
      temperature: T, above 0.

    Returns:
      ``[batch]``, at least 0 up to rounding, computed in float32 (float64 where an
      input is); 0 where no class takes part.
    """
    targets = _log_softmax(jax.lax.stop_gradient(teacher_logits), task_ids, temperature)
    gap = targets - _log_softmax(logits, task_ids, temperature)
    return temperature**2 * jnp.sum(jnp.exp(targets) * gap, axis=1)


def _log_softmax(
    logits: jax.Array, task_ids: jax.Array, temperature: float
) -> jax.Array:
    """Log-probabilities of each class within its task, [batch, classes].

    Of classes that take no part they are constant, and finite: their probability, or
    what they differ by, is exactly 0.
    """
    old = task_ids >= 0
    logits = widened(logits)
    scores = jnp.where(old[None, :], logits / temperature, EXCLUDED)
    # The maximum of each task, or a task far below another's would vanish. It needs no
    # gradient, which also keeps the transposes of both of these, scatters, out.
    segments = jnp.maximum(task_ids, 0)
    highest = jax.ops.segment_max(
        jax.lax.stop_gradient(scores).T, segments, num_segments=len(task_ids)
    )
    scores -= highest[segments].T
    # Each task's sum, at each of its classes: a product, whose transpose is another.
    same = task_ids[:, None] == task_ids[None, :]
    total = jnp.matmul(
        jnp.exp(scores), same.astype(scores.dtype), precision=jax.lax.Precision.HIGHEST
    )
    return scores - jnp.log(jnp.where(old[None, :], total, 1))


def term(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    batch: Any,
    context: Any,
    *,
    temperature: float = 2.0,
    squared: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Task-wise distillation as a term of a training step, on all samples.

    Args:
      student: outputs of the model in training, with ``"logits"`` [batch, classes].
      teacher: outputs of the frozen model, likewise.
      batch: ``valid`` [batch] (0 for padding rows).
      context: ``taught`` [classes] bool, the classes that the teacher knows, and
        ``task_ids`` [classes] int, the step that introduces each class.
      temperature: T, above 0.
      squared: multiply by T^2 (SS-IL). EEIL does not; its cross-entropies of the
        softened outputs (Castro et al. 2018) differ from these divergences by
        the teacher's entropy alone, which is a constant.

    Returns:
      Values and weights, both ``[batch]``; sum(w * v) / sum(w) is the loss.
    """
    values = taskwise_distillation(
        student["logits"],
        teacher["logits"],
        jnp.where(context.taught, context.task_ids, -1),
        temperature,
    )
    return values if squared else values / temperature**2, batch.valid
