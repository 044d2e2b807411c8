"""Squared distance of normalised features (SPB, Wu, Gong and Li 2021)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bsce_jax.norms import normalise, widened

NEEDS_OLD_CLASSES = True
"""The term is absent from the program of the base step."""
NEEDS_TEACHER = True
"""The term is refused in a phase without a teacher."""


def feature_mse(features: jax.Array, teacher_features: jax.Array) -> jax.Array:
    """Square of the distance of the student's and the teacher's features' directions.

    ``||x / ||x|| - y / ||y|| ||^2``, which is two minus twice the cosine (Wu et al.
    2021): a sum over the features, not a mean.

    Args:
      features: ``[..., size]`` of the student, any floating dtype.
      teacher_features: ``[..., size]`` of the frozen model of the step before; no
        gradient flows into them.

    Returns:
      ``[...]`` in [0, 4], computed in float32 (float64 where an input is); 1 where one
      of the vectors is zero.
    """

    def direction(vectors: jax.Array) -> jax.Array:
        return normalise(widened(vectors))

    target = jax.lax.stop_gradient(direction(teacher_features))
    # For vectors nearly equal the form with the cosine would lose half of the digits.
    return jnp.sum(jnp.square(direction(features) - target), axis=-1)


def term(
    student: Mapping[str, Any], teacher: Mapping[str, Any], batch: Any, context: Any
) -> tuple[jax.Array, jax.Array]:
    """SPB's distillation as a term of a training step, on all samples.

    Args:
      student: outputs of the model in training, with ``"features"`` [batch, size] or,
        taking their place, ``"views"`` [batch, rotations, size], those of several
        rotations of each image, over which the mean is taken.
      teacher: outputs of the frozen model of the step before, likewise.
      batch: ``valid`` [batch] (0 for padding rows).
      context: not used.

    Returns:
      Values and weights, both ``[batch]``; sum(w * v) / sum(w) is the loss.
    """
    if "views" in student:
        values = jnp.mean(feature_mse(student["views"], teacher["views"]), axis=1)
    else:
        values = feature_mse(student["features"], teacher["features"])
    return values, batch.valid
