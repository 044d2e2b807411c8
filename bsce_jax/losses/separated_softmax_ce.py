"""Separated softmax (SS-IL, Ahn et al. 2021): old and new classes do not compete."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bsce_jax.log_prior import EXCLUDED
from bsce_jax.losses.softmax_ce import (
    label_mask,
    rescaled,
    softmax_cross_entropy,
)

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
    is_label = label_mask(labels, logits.shape[1])
    values = jnp.zeros((), jnp.float32)
    for group in (old, new):
        prior = jnp.where(group, 0.0, EXCLUDED)
        within = jnp.any(is_label & group[None, :], axis=1)
        values += jnp.where(within, softmax_cross_entropy(logits, labels, prior), 0.0)
    return values


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
