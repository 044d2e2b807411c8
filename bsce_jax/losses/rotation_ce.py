"""Prediction of an image's rotation (SPB-I, Wu, Gong and Li 2021)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bsce_jax.norms import widened

NEEDS_AUXILIARY = True


def rotation_cross_entropy(logits: jax.Array) -> jax.Array:
    """Cross-entropy of the predicted rotations, averaged over an image's views.

    Args:
      logits: ``[batch, rotations, rotations]``, any floating dtype: those of view r,
        the image turned r times, for each rotation; r is the right answer.

    Returns:
      ``[batch]``, computed in float32 (float64 where the input is).
    """
    scores = widened(logits)
    number = jnp.arange(scores.shape[1])
    is_label = (number[:, None] == number[None, :])[None]
    log_probabilities = jax.nn.log_softmax(scores, axis=2)
    return -jnp.mean(jnp.sum(log_probabilities, axis=2, where=is_label), axis=1)


def term(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any] | None,
    batch: Any,
    context: Any,
) -> tuple[jax.Array, jax.Array]:
    """Self-supervision by rotations as a term of a training step, in every step.

    Args:
      student: outputs of the model in training, with ``"rotations"`` [batch, 4, 4],
        for each of four views the logits of four rotations.
      teacher: not used.
      batch: ``valid`` [batch] (0 for padding rows).
      context: not used.

    Returns:
      Values and weights, both ``[batch]``; sum(w * v) / sum(w) is the loss.
    """
    return rotation_cross_entropy(student["rotations"]), batch.valid
