"""Cross-entropy with neighbours that share the label (DDE, Hu et al. 2021)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bsce_jax.losses.softmax_ce import label_mask, rescaled, softmax_cross_entropy

READS_LOG_PRIOR = True
"""A prior acts on this loss, see `config.priors`."""

WITHOUT_OLD_CLASSES = "softmax_ce"
"""What the term is in the base step, which runs with either can therefore share."""


def colliding_effect(
    logits: jax.Array,
    labels: jax.Array,
    neighbour_logits: jax.Array,
    valid: jax.Array,
    log_prior: jax.Array | None = None,
) -> jax.Array:
    """Negative log-likelihood averaged with that of the neighbours (DCE).

    ``-log(p_y / 2 + q_y / 2)``, p_y being the label's probability and q_y its mean
    probability over the neighbours' softmax; without any neighbour ``-log p_y``.

    Args:
      logits: ``[batch, classes]``, any floating dtype.
      labels: ``[batch]`` int, positions in the class order.
      neighbour_logits: ``[batch, K, classes]``; no gradient flows into them.
      valid: ``[batch, K]``, 0 where there is no neighbour.
      log_prior: ``[classes]``, added to all logits; None for the standard softmax.

    Returns:
      ``[batch]``, computed in float32 (float64 where an input is). A label outside
      ``[0, classes)`` has value and gradient 0.
    """
    own = -softmax_cross_entropy(logits, labels, log_prior)
    near = jax.lax.stop_gradient(neighbour_logits)
    near = near.astype(own.dtype)
    if log_prior is not None:
        near = near + log_prior[None, None, :]
    is_label = label_mask(labels, logits.shape[1])[:, None, :]
    each = jnp.sum(jax.nn.log_softmax(near), axis=2, where=is_label)
    count = jnp.sum(valid > 0, axis=1)
    # The mean in logarithms: exp would lose probabilities below 1e-38.
    total = jax.nn.logsumexp(jnp.where(valid > 0, each, -jnp.inf), axis=1)
    mean = jnp.where(count > 0, total, 0) - jnp.log(jnp.maximum(count, 1))
    both = jnp.logaddexp(own, mean.astype(own.dtype)) - jnp.log(2.0).astype(own.dtype)
    within = jnp.any(is_label[:, 0], axis=1)
    return jnp.where(within, -jnp.where(count > 0, both, own), 0)


def term(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any] | None,
    batch: Any,
    context: Any,
    *,
    rescale: bool = False,
    normalised: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """DDE's classification loss as a term of a training step.

    Args:
      student: outputs of the model in training, with ``"logits"`` [batch, classes],
        and ``"neighbour_logits"`` [batch, K, classes] and ``"neighbours_valid"``
        [batch, K] where there are neighbours: without them it is the cross-entropy.
      teacher: not used.
      batch: ``labels`` [batch] int and ``valid`` [batch] (0 for padding rows).
      context: ``log_prior`` [classes], log alpha included, and ``counts`` [classes].
      rescale, normalised: loss rescaling, see `bsce_jax.losses.softmax_ce.term`.

    Returns:
      Values and weights, both ``[batch]``; sum(w * v) / sum(w) is the loss.
    """
    logits, labels, prior = student["logits"], batch.labels, context.log_prior
    if "neighbour_logits" in student:
        near, valid = student["neighbour_logits"], student["neighbours_valid"]
        values = colliding_effect(logits, labels, near, valid, prior)
    else:
        values = softmax_cross_entropy(logits, labels, prior)
    return rescaled(values, batch, context, rescale, normalised)
