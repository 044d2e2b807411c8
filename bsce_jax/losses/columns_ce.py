"""Softmax cross-entropy over the new classes alone (SPB, Wu, Gong and Li 2021)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bsce_jax.errors import UserError
from bsce_jax.log_prior import EXCLUDED
from bsce_jax.losses.softmax_ce import label_mask, softmax_cross_entropy

COLUMNS = ("new", "seen")
"""What the softmax may run over: this step's classes, or all learned so far."""

LIMITS = {"columns": COLUMNS}


def columns_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    columns: jax.Array,
) -> jax.Array:
    """Cross-entropy whose softmax runs over chosen classes (Wu et al. 2021, Eq. 1).

    Args:
      logits: ``[batch, classes]``, any floating dtype.
      labels: ``[batch]`` int, positions in the class order.
      columns: ``[classes]`` bool, the classes chosen.

    Returns:
      ``[batch]``, computed in float32 (float64 where an input is). A label that is not
      chosen has value and gradient 0.
    """
    prior = jnp.where(columns, 0.0, EXCLUDED)
    values = softmax_cross_entropy(logits, labels, prior)
    return jnp.where(_among(labels, columns), values, 0)


def _among(labels: jax.Array, columns: jax.Array) -> jax.Array:
    """Whether labels are chosen classes, [batch] bool."""
    is_label = label_mask(labels, len(columns))
    return jnp.any(is_label & columns[None, :], axis=1)


def term(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any] | None,
    batch: Any,
    context: Any,
    *,
    columns: str = "new",
) -> tuple[jax.Array, jax.Array]:
    """SPB's classification loss as a term of a training step.

    Args:
      student: outputs of the model in training, with ``"logits"`` [batch, classes] or,
        taking their place, ``"perspectives"`` [batch, rotations, classes], those of
        several heads, each on its rotation, over which the mean is taken.
      teacher: not used.
      batch: ``labels`` [batch] int and ``valid`` [batch] (0 for padding rows).
      context: ``old`` and ``seen`` [classes] bool.
      columns: "new", as printed, the classes of this step; or "seen".

    Returns:
      Values and weights, both ``[batch]``; sum(w * v) / sum(w) is the loss. Samples
      whose class is not among the columns have weight 0.

    Raises:
      UserError: `columns` has no such value.
    """
    if columns not in COLUMNS:
        names = ", ".join(COLUMNS)
        raise UserError(f"columns_ce: columns={columns!r}, allowed: {names}")
    new = context.seen & ~context.old
    chosen = new if columns == "new" else context.seen

    def loss(logits: jax.Array) -> jax.Array:
        return columns_cross_entropy(logits, batch.labels, chosen)

    if "perspectives" in student:
        each = jax.vmap(loss, in_axes=1, out_axes=1)(student["perspectives"])
        values = jnp.mean(each, axis=1)
    else:
        values = loss(student["logits"])
    return values, batch.valid * _among(batch.labels, chosen)
