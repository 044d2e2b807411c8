"""Margin ranking of old classes over the new ones nearest (LUCIR, Hou et al. 2019)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bsce_jax.errors import UserError
from bsce_jax.losses.softmax_ce import label_mask
from bsce_jax.norms import widened

NEEDS_OLD_CLASSES = True
"""The term is absent from the program of the base step."""
NEEDS_SIMILARITIES = True
"""The term reads what a cosine or local similarity head gives besides its logits."""

LIMITS = {"k": (1, 1000), "margin": (0, 100)}


def margin_ranking(
    cosines: jax.Array,
    labels: jax.Array,
    old: jax.Array,
    new: jax.Array,
    k: int = 2,
    margin: float = 0.5,
) -> tuple[jax.Array, jax.Array]:
    """Separates samples of old classes from the new classes most similar to them.

    ``max(0, cos_j - cos_y + margin)``, averaged over the K highest cosines cos_j of new
    classes, where K is the smaller of `k` and the number of new classes. The mean over
    the samples of old classes is then that over all their pairs (y, j).

    Args:
      cosines: ``[batch, classes]`` cosines of features and class weights, without the
        learned scale, any floating dtype. Gradients flow through both of a pair.
      labels: ``[batch]`` int, positions in the class order.
      old: ``[classes]`` bool, classes learned in an earlier step.
      new: ``[classes]`` bool, classes learned in this step; how many may be traced.
      k: new classes that a sample is compared with, at least 1.
      margin: by which the cosine with the true class should lead.

    Returns:
      Values, computed in float32 (float64 where an input is), and weights, 1 for
      samples of old classes and 0 for others, both ``[batch]``. sum(w * v) / sum(w) is
      the loss; without a sample of an old class, or without a new class, it is 0.

    Raises:
      UserError: `k` is below 1.
    """
    if k < 1:
        raise UserError(f"margin_ranking: k={k!r}, allowed: at least 1")
    cosines = widened(cosines)
    classes = jnp.arange(cosines.shape[1])[None, :]
    is_label = label_mask(labels, cosines.shape[1])
    of_label = jnp.sum(cosines, axis=1, where=is_label)
    values = jnp.zeros_like(of_label)
    left = jnp.broadcast_to(new[None, :], cosines.shape)
    # Masks, not top_k and a gather: the transpose of a gather is a scatter, which on
    # GPUs is either not repeatable or slow.
    for _ in range(min(k, cosines.shape[1])):
        highest = jnp.argmax(jnp.where(left, cosines, -jnp.inf), axis=1)
        chosen = left & (highest[:, None] == classes)
        gap = jnp.sum(cosines, axis=1, where=chosen) - of_label + margin
        values += jnp.where(jnp.any(chosen, axis=1), jnp.maximum(gap, 0), 0)
        left &= ~chosen
    values /= jnp.clip(jnp.sum(new), 1, k)
    weights = jnp.any(is_label & old[None, :], axis=1).astype(values.dtype)
    return values, weights


def term(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any] | None,
    batch: Any,
    context: Any,
    *,
    k: int = 2,
    margin: float = 0.5,
) -> tuple[jax.Array, jax.Array]:
    """Margin ranking as a term of a training step, on samples of old classes.

    Args:
      student: outputs of the model in training, with ``"similarities"`` [batch,
        classes], the cosines without their scale.
      teacher: not used.
      batch: ``labels`` [batch] int and ``valid`` [batch] (0 for padding rows).
      context: ``old`` and ``seen`` [classes] bool.
      k: new classes that a sample is compared with, at least 1.
      margin: by which the cosine with the true class should lead.

    Returns:
      Values and weights, both ``[batch]``; sum(w * v) / sum(w) is the loss.
    """
    new = context.seen & ~context.old
    values, weights = margin_ranking(
        student["similarities"], batch.labels, context.old, new, k, margin
    )
    return values, weights * batch.valid
