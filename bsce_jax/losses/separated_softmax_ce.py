"""Separated softmax (SS-IL, Ahn et al. 2021): old and new classes do not compete."""

from collections.abc import Mapping
from typing import Any

import jax

from bsce_jax.losses.columns_ce import columns_cross_entropy
from bsce_jax.losses.softmax_ce import rescaled

CLASSIFICATION = True
"""Another classification loss may take its place: see `config.terms.with_prior`."""

WITHOUT_OLD_CLASSES = "softmax_ce"
"""What the term is in the base step, which runs with either can therefore share."""


def separated_softmax_cross_entropy(
    logits: jax.Array, labels: jax.Array, old: jax.Array, new: jax.Array
) -> jax.Array:
    """Cross-entropy over the old classes or over the new ones, as the label is.

    Args:
      logits: ``[batch, classes]``, any floating dtype.
      labels: ``[batch]`` int, positions in the class order.
      old: ``[classes]`` bool, classes learned in an earlier step.
      new: ``[classes]`` bool, classes learned in this step.

    Returns:
      ``[batch]``, computed in float32 (float64 where an input is). A label that is
      neither old nor new has value and gradient 0.
    """
    among_old = columns_cross_entropy(logits, labels, old)
    return among_old + columns_cross_entropy(logits, labels, new)


def term(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any] | None,
    batch: Any,
    context: Any,
    *,
    rescale: bool = False,
    normalised: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Separated softmax cross-entropy as a term of a training step.

    Args:
      student: outputs of the model in training, with ``"logits"`` [batch, classes].
      teacher: not used.
      batch: ``labels`` [batch] int and ``valid`` [batch] (0 for padding rows).
      context: ``old`` and ``seen`` [classes] bool, and ``counts`` [classes].
      rescale, normalised: loss rescaling, see `bsce_jax.losses.softmax_ce.term`.

    Returns:
      Values and weights, both ``[batch]``; sum(w * v) / sum(w) is the loss.
    """
    new = context.seen & ~context.old
    values = separated_softmax_cross_entropy(
        student["logits"], batch.labels, context.old, new
    )
    return rescaled(values, batch, context, rescale, normalised)
