"""Distance along the geodesic between old and new features (GeoDL, Simon et al. 2021).

The features of a batch span a subspace, in the old model and in the current one. The
kernel of the flow between the two (Gong et al. 2012) says how similar two features are
on the way, and the loss is one minus the cosine under this kernel.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bsce_jax.errors import UserError
from bsce_jax.norms import norm, normalise, widened

NEEDS_OLD_CLASSES = True
"""The term is absent from the program of the base step."""
NEEDS_TEACHER = True
"""The term is refused in a phase without a teacher."""

_FEWEST = 4  # valid rows
_SMALLEST_ANGLE = 1e-6
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

LIMITS = {"size": (1, 64)}


def adaptive_average_pool(maps: jax.Array, size: int = 2) -> jax.Array:
    """Means of size x size windows, as PyTorch's `adaptive_avg_pool2d` places them.

    Window i of a side of length n has its pixels ``floor(i n / size)`` to
    ``ceil((i + 1) n / size) - 1``: windows overlap where `size` does not divide n.

    Args:
      maps: ``[batch, height, width, channels]``, any floating dtype.
      size: windows along each side, at least 1.

    Returns:
      ``[batch, size * size * channels]``, flattened, in float32 (float64 where the
      input is).

    Raises:
      UserError: `size` is below 1.
    """
    if size < 1:
        raise UserError(f"geodesic: size={size!r}, allowed: at least 1")
    maps = widened(maps)

    def windows(length: int) -> list[slice]:
        ends = [-(-(i + 1) * length // size) for i in range(size)]
        return [slice(i * length // size, end) for i, end in enumerate(ends)]

    rows, columns = windows(maps.shape[1]), windows(maps.shape[2])
    means = [jnp.mean(maps[:, r, c], axis=(1, 2)) for r in rows for c in columns]
    return jnp.concatenate(means, axis=1)


def geodesic_kernel(
    features: jax.Array, teacher_features: jax.Array, valid: jax.Array
) -> jax.Array:
    """Kernel of the geodesic flow from the teacher's subspace to the student's.

    ``G = integral of F(t) F(t)^T from t = 0 to 1``, where F(t) = A cos(t theta) + B
    sin(t theta) leads from one subspace's basis A to the other's by the principal
    angles theta (Simon et al. 2021; in closed form by Gong et al. 2012). The subspaces
    have n = min(rows, size) - 2 dimensions, the leading left singular vectors of the
    normalised features, of each of which its own mean was subtracted, as the authors
    coded it. Unlike in their code, which approximates a generalised singular value
    decomposition, the angles are exact.

    Args:
      features: ``[batch, size]`` of the student, of the whole batch, any floating
        dtype. No gradient flows through the kernel.
      teacher_features: ``[batch, size]`` of the frozen model of the step before.
      valid: ``[batch]``, 0 for padding rows, which take no part.

    Returns:
      ``[size, size]``, symmetric, without negative eigenvalues up to rounding, in
      float32 (float64 where an input is). Its trace is the dimension: n, or less where
      the features of either model span less; 0 with fewer than three rows.
    """
    rows = jnp.sum(valid > 0)
    start, start_rank = _subspace(teacher_features, valid)
    end, end_rank = _subspace(features, valid)
    size, limit = start.shape
    dimension = jnp.minimum(jnp.minimum(rows, size) - 2, start_rank)
    kept = jnp.arange(limit) < jnp.minimum(dimension, end_rank)
    start, end = (jnp.where(kept[None, :], basis, 0) for basis in (start, end))
    # Dimensions that are left out get a cosine of 2, which no pair of directions has:
    # they do not mix with those kept, and their columns of A and B are 0.
    missing = jnp.diag(jnp.where(kept, 0, 2).astype(start.dtype))
    left, cosines, right = jnp.linalg.svd(_matmul(start.T, end) + missing)
    a = _matmul(start, left)
    aside = _matmul(end, right.T) - a * cosines[None, :]
    # The arc cosine alone would lose half of the digits of small angles.
    theta = jnp.maximum(jnp.arctan2(norm(aside.T), cosines), _SMALLEST_ANGLE)
    sine, sinc = jnp.sin(theta), jnp.sin(2 * theta) / (2 * theta)
    # B sin(theta) takes the place of B, which an angle of 0 leaves undetermined.
    first, cross = (1 + sinc) / 2, sine / (2 * theta)
    second = (1 - sinc) / (2 * jnp.square(sine))
    kernel = _matmul(a * first[None, :] + aside * cross[None, :], a.T)
    return kernel + _matmul(a * cross[None, :] + aside * second[None, :], aside.T)


def _subspace(features: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Orthonormal columns [size, min(batch, size) - 2], and how many have a meaning."""
    features = jax.lax.stop_gradient(features)
    features = widened(features)
    points = normalise(jnp.where(valid[:, None] > 0, features, 0))
    # The mean over a sample's own features (sic), not over the samples.
    points -= jnp.mean(points, axis=1, keepdims=True)
    vectors, lengths, _ = jnp.linalg.svd(points.T, full_matrices=False)
    smallest = lengths[0] * max(points.shape) * jnp.finfo(points.dtype).eps
    limit = max(min(points.shape) - 2, 1)
    return vectors[:, :limit], jnp.sum(lengths > smallest)


def geodesic(
    features: jax.Array, teacher_features: jax.Array, kernel: jax.Array
) -> jax.Array:
    """One minus the cosine of student and teacher under a kernel.

    ``1 - y^T G x / sqrt(y^T G y * x^T G x)`` with x and y the student's and the
    teacher's features (Simon et al. 2021); their length has no effect.

    Args:
      features: ``[batch, size]`` of the student, any floating dtype.
      teacher_features: ``[batch, size]`` of the frozen model of the step before; no
        gradient flows into them.
      kernel: ``[size, size]`` G, from `geodesic_kernel`.

    Returns:
      ``[batch]`` in [0, 2] up to rounding, computed in float32 (float64 where an input
      is); 1 where the kernel maps one of the vectors to zero.
    """

    def direction(vectors: jax.Array) -> jax.Array:
        return normalise(widened(vectors))

    x = direction(features)
    y = jax.lax.stop_gradient(direction(teacher_features))
    mapped, target = _matmul(x, kernel), _matmul(y, kernel)
    inner = jnp.sum(target * x, axis=1)
    squares = jnp.sum(mapped * x, axis=1), jnp.sum(target * y, axis=1)
    # Rounding may turn a square of 0 into one of about an eps, of either sign.
    tiny = 8 * float(jnp.finfo(inner.dtype).eps)
    positive = (squares[0] > tiny) & (squares[1] > tiny)
    lengths = [jnp.sqrt(jnp.where(positive, square, 1)) for square in squares]
    return 1 - jnp.where(positive, inner / (lengths[0] * lengths[1]), 0)


def term(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    batch: Any,
    context: Any,
    *,
    size: int = 2,
) -> tuple[jax.Array, jax.Array]:
    """GeoDL's distillation as a term of a training step, on all samples.

    Args:
      student: outputs of the model in training, with ``"maps"``, a list of [batch,
        height, width, channels], of which the last is what the network pools.
      teacher: outputs of the frozen model of the step before, likewise.
      batch: ``valid`` [batch] (0 for padding rows), and ``whole``, which gathers the
        rows of all devices: the kernel is that of the global batch.
      context: not used.
      size: the maps are pooled to size x size, 2 as in the authors' code.

    Returns:
      Values and weights, both ``[batch]``; sum(w * v) / sum(w) is the loss. All values
      are 0 where the global batch has fewer than four valid rows.

    Raises:
      UserError: `size` is below 1.
    """
    ours = adaptive_average_pool(student["maps"][-1], size)
    theirs = adaptive_average_pool(teacher["maps"][-1], size)
    valid = batch.whole(batch.valid)
    kernel = geodesic_kernel(
        batch.whole(jax.lax.stop_gradient(ours)), batch.whole(theirs), valid
    )
    enough = jnp.sum(valid > 0) >= _FEWEST
    return jnp.where(enough, geodesic(ours, theirs, kernel), 0), batch.valid
