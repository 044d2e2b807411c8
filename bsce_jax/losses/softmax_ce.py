"""Softmax cross-entropy under a log-prior (Jodelet et al., Eq. 1, 3, 5 and 6)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def softmax_cross_entropy(
    logits: jax.Array, labels: jax.Array, log_prior: jax.Array | None = None
) -> jax.Array:
    """Cross-entropy of the softmax of ``logits + log_prior``.

    With the vectors of `bsce_jax.log_prior` this is the standard, the Balanced, the
    alpha-weighted and the Relaxed Balanced Softmax cross-entropy. Prediction uses the
    logits alone.

    Args:
      logits: ``[batch, classes]``, any floating dtype.
      labels: ``[batch]`` int, positions in the class order.
      log_prior: ``[classes]``, or None for the standard softmax over all classes.

    Returns:
      ``[batch]``, computed in float32 (float64 where an input is). A label outside
      ``[0, classes)`` has value and gradient 0.
    """
    scores = logits.astype(jnp.result_type(logits, jnp.float32))
    if log_prior is not None:
        scores = scores + log_prior[None, :]
    # A mask, not a gather: its transpose is no scatter, which on GPUs is either not
    # repeatable or slow.
    is_label = labels[:, None] == jnp.arange(scores.shape[1])[None, :]
    return -jnp.sum(jax.nn.log_softmax(scores), axis=1, where=is_label)


def term(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any] | None,
    batch: Any,
    context: Any,
) -> tuple[jax.Array, jax.Array]:
    """The classification loss as a term of a training step.

    Args:
      student: outputs of the model in training, with ``"logits"`` [batch, classes].
      teacher: not used.
      batch: ``labels`` [batch] int and ``valid`` [batch] (0 for padding rows).
      context: ``log_prior`` [classes], log alpha included.

    Returns:
      Values and weights, both ``[batch]``; sum(w * v) / sum(w) is the loss.
    """
    values = softmax_cross_entropy(student["logits"], batch.labels, context.log_prior)
    return values, batch.valid
