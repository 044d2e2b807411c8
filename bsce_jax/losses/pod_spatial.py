"""Distillation of pooled feature maps, POD-spatial (PODNet, Douillard et al. 2020)."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bsce_jax.norms import norm, normalise, widened

NEEDS_OLD_CLASSES = True
"""The term is absent from the program of the base step."""
NEEDS_TEACHER = True
"""The term is refused in a phase without a teacher."""


def pod_spatial(
    maps: Sequence[jax.Array], teacher_maps: Sequence[jax.Array]
) -> jax.Array:
    """Distance of the student's and the teacher's pooled maps, averaged over the maps.

    A map is squared and summed over its width and over its height, the two sums are
    concatenated and normalised to length 1; of two such vectors it is the Euclidean
    distance, not its square, with gradient 0 where they are equal up to rounding. All
    this as the authors coded it.

    Args:
      maps: ``[batch, height, width, channels]`` each, of the student, any floating
        dtype; at least one. The authors' are taken before the ReLU.
      teacher_maps: likewise, as many, of the frozen model of the step before; no
        gradient flows into them.

    Returns:
      ``[batch]`` in [0, sqrt(2)], computed in float32 (float64 where an input is).

    Raises:
      ValueError: there are no maps, or not as many of both.
    """
    distances = [
        _distance(_pooled(ours), jax.lax.stop_gradient(_pooled(theirs)))
        for ours, theirs in zip(maps, teacher_maps, strict=True)
    ]
    return jnp.mean(jnp.stack(distances), axis=0)


def _distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Euclidean distance of unit vectors, [batch, size] each -> [batch]."""
    difference = a - b
    # Compiled, the two sides of equal maps may differ by rounding errors; the gradient
    # of their distance would be as large as any other's, in a meaningless direction.
    return norm(difference, 8 * float(jnp.finfo(difference.dtype).eps))


def _pooled(values: jax.Array) -> jax.Array:
    """[batch, H, W, C] -> unit vectors [batch, (H + W) C]."""
    energy = jnp.square(widened(values))
    sums = [jnp.sum(energy, axis=2), jnp.sum(energy, axis=1)]  # [B, H, C], [B, W, C]
    pooled = jnp.concatenate(sums, axis=1)
    return normalise(pooled.reshape(len(pooled), -1))


def term(
    student: Mapping[str, Any], teacher: Mapping[str, Any], batch: Any, context: Any
) -> tuple[jax.Array, jax.Array]:
    """POD-spatial as a term of a training step, on old and new samples alike.

    Args:
      student: outputs of the model in training, with ``"maps"``, a list of [batch,
        height, width, channels].
      teacher: outputs of the frozen model of the step before, likewise.
      batch: ``valid`` [batch] (0 for padding rows).
      context: not used.

    Returns:
      Values and weights, both ``[batch]``; sum(w * v) / sum(w) is the loss.
    """
    return pod_spatial(student["maps"], teacher["maps"]), batch.valid
