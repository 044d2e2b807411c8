"""Binary cross-entropies of independent outputs (iCaRL, Rebuffi et al. 2017)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bsce_jax.losses.softmax_ce import label_mask
from bsce_jax.norms import widened


def sigmoid_binary_cross_entropy(
    logits: jax.Array, targets: jax.Array, seen: jax.Array
) -> jax.Array:
    """Binary cross-entropy of every seen class, averaged over these classes.

    Classification and distillation in one (iCaRL, Algorithm 3), depending on the
    targets. The printed sum over the classes is divided by their number, as in the
    code of inclearn; that of the authors divides by the number of all classes, seen or
    not.

    Args:
      logits: ``[batch, classes]``, any floating dtype.
      targets: ``[batch, classes]`` in [0, 1]; no gradient flows into them.
      seen: ``[classes]`` bool, the only classes that take part.

    Returns:
      ``[batch]``, computed in float32 (float64 where an input is); 0 where no class is
      seen.
    """
    scores = widened(logits)
    targets = jax.lax.stop_gradient(targets)
    # Softplus on both sides: no logarithm of a rounded probability, and no difference
    # of large numbers.
    losses = targets * jax.nn.softplus(-scores)
    losses += (1 - targets) * jax.nn.softplus(scores)
    total = jnp.sum(losses, axis=1, where=seen[None, :])
    return total / jnp.maximum(jnp.sum(seen), 1)


def term(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any] | None,
    batch: Any,
    context: Any,
) -> tuple[jax.Array, jax.Array]:
    """iCaRL's loss as a term of a training step.

    The targets of the old classes are the teacher's probabilities, for every sample,
    also for those of the old classes; the targets of the others are one-hot.

    Args:
      student: outputs of the model in training, with ``"logits"`` [batch, classes].
      teacher: outputs of the frozen model of the step before, likewise; None in the
        base step, where all targets are one-hot.
      batch: ``labels`` [batch] int and ``valid`` [batch] (0 for padding rows).
      context: ``old`` and ``seen`` [classes] bool.

    Returns:
      Values and weights, both ``[batch]``; sum(w * v) / sum(w) is the loss.
    """
    logits = student["logits"]
    dtype = jnp.result_type(logits, jnp.float32)
    is_label = label_mask(batch.labels, logits.shape[1])
    targets = is_label.astype(dtype)
    if teacher is not None:
        known = jax.nn.sigmoid(teacher["logits"].astype(dtype))
        targets = jnp.where(context.old[None, :], known, targets)
    values = sigmoid_binary_cross_entropy(logits, targets, context.seen)
    return values, batch.valid
