"""Binary cross-entropies of independent outputs (iCaRL, Rebuffi et al. 2017)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bsce_jax.errors import UserError
from bsce_jax.losses.softmax_ce import label_mask
from bsce_jax.norms import widened

OUTPUTS = ("seen", "all")
"""What the mean is over: the classes learned so far, or the whole class axis."""

LIMITS = {"outputs": OUTPUTS}


def sigmoid_binary_cross_entropy(
    logits: jax.Array, targets: jax.Array, seen: jax.Array
) -> jax.Array:
    """Binary cross-entropy of every seen class, averaged over these classes.

    Classification and distillation in one (iCaRL, Algorithm 3), depending on the
    targets. The printed sum over the classes is divided by their number, as in the
    code of inclearn; for that of the authors see `term`.

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
    *,
    outputs: str = "seen",
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
      outputs: "seen", inclearn's mean over the classes seen; or "all", the authors',
        whose sum is divided by the number of all classes from the first step on. (They
        also train the outputs of classes to come, towards 0.)

    Returns:
      Values and weights, both ``[batch]``; sum(w * v) / sum(w) is the loss.

    Raises:
      UserError: `outputs` has no such value.
    """
    if outputs not in OUTPUTS:
        names = ", ".join(OUTPUTS)
        raise UserError(f"sigmoid_bce: outputs={outputs!r}, allowed: {names}")
    logits = student["logits"]
    dtype = jnp.result_type(logits, jnp.float32)
    is_label = label_mask(batch.labels, logits.shape[1])
    targets = is_label.astype(dtype)
    if teacher is not None:
        known = jax.nn.sigmoid(teacher["logits"].astype(dtype))
        targets = jnp.where(context.old[None, :], known, targets)
    values = sigmoid_binary_cross_entropy(logits, targets, context.seen)
    if outputs == "all":
        values *= jnp.sum(context.seen) / logits.shape[1]
    return values, batch.valid
