"""Topology preservation after TPCIL (Tao et al. 2020), from its description alone."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bsce_jax.norms import normalise, widened

NEEDS_OLD_CLASSES = True
NEEDS_TEACHER = True


def topology(
    features: jax.Array, teacher_features: jax.Array, valid: jax.Array
) -> jax.Array:
    """Minus Pearson's correlation of the edges between images, then and now.

    The edge between two images is the cosine of their features; every pair i < j of
    images that are there counts.

    Args:
      features: ``[N, size]`` of the network in training, any floating dtype.
      teacher_features: ``[N, size]`` of the network before; no gradient flows into
        them.
      valid: ``[N]``, 0 for rows that only fill up.

    Returns:
      ``[]`` in [-1, 1], in float32 (float64 where an input is); 0 where the edges do
      not vary.
    """
    count = len(features)
    pairs = jnp.triu(jnp.ones((count, count), bool), 1)
    there = valid > 0
    weights = (pairs & there[:, None] & there[None, :]).astype(jnp.float32)

    def edges(vectors: jax.Array) -> jax.Array:
        directions = normalise(widened(vectors))
        cosines = jnp.dot(directions, directions.T)
        mean = jnp.sum(weights * cosines) / jnp.maximum(jnp.sum(weights), 1)
        centred = weights * (cosines - mean)
        return centred / jnp.sqrt(jnp.sum(jnp.square(centred)) + 1e-8)

    before = jax.lax.stop_gradient(edges(teacher_features))
    return -jnp.sum(edges(features) * before)


def term(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    batch: Any,
    context: Any,
) -> tuple[jax.Array, jax.Array]:
    """Topology preservation as a term of a training step.

    Args:
      student: outputs of the model in training, with ``"vertices"`` [M, size], the
        features of the memory's images beside the batch.
      teacher: outputs of the model before, likewise, of the same images.
      batch: with ``beside["memory"]``, whose rows of all devices take part.
      context: not used.

    Returns:
      One value and its weight, both ``[1]`` and the same on every device.
    """
    memory = batch.beside["memory"]
    value = topology(
        memory.whole(student["vertices"]),
        memory.whole(teacher["vertices"]),
        memory.whole(memory.valid),
    )
    return value[None], jnp.ones((1,), value.dtype)
