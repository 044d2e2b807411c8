"""Softmax cross-entropy under a log-prior (Jodelet et al., Eq. 3, 5 and 6)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bsce_jax.errors import UserError
from bsce_jax.norms import widened

CLASSIFICATION = True
"""Another classification loss may take its place: see `config.terms.with_prior`."""
READS_LOG_PRIOR = True
"""A prior acts on this loss, see `config.priors`."""


def label_mask(labels: jax.Array, num_classes: int) -> jax.Array:
    """Where each label is: bool ``[batch, classes]``, no class for one outside.

    Used in the place of a gather, whose transpose is a scatter, which on GPUs is either
    not repeatable or slow.

    Raises:
      UserError: the labels are no vector (one-hot rows would give a wrong loss).
    """
    if labels.ndim != 1:
        raise UserError(
            f"labels have shape {labels.shape}: expected [batch], places of classes"
        )
    return labels[:, None] == jnp.arange(num_classes)[None, :]


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
    scores = widened(logits)
    if log_prior is not None:
        scores = scores + log_prior[None, :]
    is_label = label_mask(labels, scores.shape[1])
    return -jnp.sum(jax.nn.log_softmax(scores), axis=1, where=is_label)


def rescaling(counts: jax.Array) -> jax.Array:
    """Loss rescaling: weights of the classes, inversely proportional to their images.

    Args:
      counts: ``[classes]`` training images of each class, 0 for those not seen.

    Returns:
      ``[classes]``, mean count / count over the classes with images (so that images
      drawn from the training set have a mean weight of 1), 0 for the others.
    """
    present = counts > 0
    mean = jnp.sum(counts) / jnp.maximum(jnp.sum(present), 1)
    return jnp.where(present, mean / jnp.where(present, counts, 1), 0)


def term(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any] | None,
    batch: Any,
    context: Any,
    *,
    rescale: bool = False,
    normalised: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The classification loss as a term of a training step.

    Args:
      student: outputs of the model in training, with ``"logits"`` [batch, classes].
      teacher: not used.
      batch: ``labels`` [batch] int and ``valid`` [batch] (0 for padding rows).
      context: ``log_prior`` [classes], log alpha included, and ``counts`` [classes].
      rescale: weight the samples by `rescaling` (Jodelet et al., Table 6).
      normalised: with `rescale`, divide by the sum of the batch's weights, as
        PyTorch's ``weight=`` does, not by its number of samples.

    Returns:
      Values and weights, both ``[batch]``; sum(w * v) / sum(w) is the loss.
    """
    values = softmax_cross_entropy(student["logits"], batch.labels, context.log_prior)
    return rescaled(values, batch, context, rescale, normalised)


def rescaled(
    values: jax.Array, batch: Any, context: Any, rescale: bool, normalised: bool
) -> tuple[jax.Array, jax.Array]:
    """A classification loss's values and weights, rescaled where that is asked for.

    Args:
      values: ``[batch]``, of the samples.
      batch, context, rescale, normalised: see `term`.

    Returns:
      Values and weights, both ``[batch]``; sum(w * v) / sum(w) is the loss.
    """
    if not rescale:
        return values, batch.valid
    is_label = label_mask(batch.labels, len(context.counts))
    weights = jnp.sum(
        jnp.where(is_label, rescaling(context.counts)[None, :], 0), axis=1
    )
    if normalised:
        return values, batch.valid * weights
    return values * weights, batch.valid
