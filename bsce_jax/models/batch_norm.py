"""Batch normalisation over the valid rows of the global batch, as PyTorch counts.

Two things set it apart from `flax.linen.BatchNorm`: padding rows are left out exactly,
also on a device that holds nothing else, and the stored running variance is the
unbiased one (factor n / (n - 1)), as in PyTorch.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Outputs = tuple[jax.Array, jax.Array, jax.Array]


class BatchNorm(nn.Module):
    """Normalises the last axis; statistics in float32 whatever the compute type.

    Attributes:
      momentum: weight of the old running statistics (PyTorch's momentum is 1 minus it).
      epsilon: added to the variance.
      zero_init: start with a scale of 0 instead of 1.
      dtype: type of the output.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    zero_init: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool,
        valid: jax.Array | None = None,
        axis_name: str | None = None,
    ) -> jax.Array:
        """Applies the layer, and in training moves the running statistics.

        Args:
          x: activations [batch, height, width, channels].
          train: use the batch's statistics; else the running ones.
          valid: mask [batch], 0 for padding rows, not differentiated; None is all 1.
            Padding rows are normalised like the others but enter no statistic.
          axis_name: the pmap axis over which the batch is split; None where `x` is
            the whole batch, also when jit shards it.

        Returns:
          [batch, height, width, channels] of type `dtype`. The collection
          `batch_stats` is updated when `train` and the collection is mutable.
        """
        stat_dtype = jnp.promote_types(self.dtype, jnp.float32)
        shape = (x.shape[-1],)
        init = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        scale = self.param("scale", init, shape, stat_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, stat_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, stat_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, shape, stat_dtype)
        if not train:
            y = _affine(x, mean.value, var.value, scale, bias, self.epsilon)
            return y.astype(self.dtype)
        if valid is None:
            valid = jnp.ones(x.shape[0], stat_dtype)
        count = _global_sum(valid.astype(stat_dtype).sum(), axis_name)
        count = count * (x.shape[1] * x.shape[2])
        weights = valid.astype(stat_dtype) / jnp.maximum(count, 1)
        y, batch_mean, batch_var = normalise(
            axis_name, self.epsilon, x, scale, bias, weights, mean.value
        )
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            unbiased = batch_var * (count / jnp.maximum(count - 1, 1))
            # A batch of padding alone says nothing: leave the running values alone.
            step = (1 - self.momentum) * (count > 0).astype(stat_dtype)
            mean.value += step * (batch_mean - mean.value)
            var.value += step * (unbiased - var.value)
        return y.astype(self.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def normalise(
    axis_name: str | None,
    epsilon: float,
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    weights: jax.Array,
    near: jax.Array,
) -> Outputs:
    """Normalises by the batch's own weighted mean and variance.

    Both are from one pass over the activations, and one sum over the devices: the
    variance is E[(x - near)^2] - (E[x] - near)^2, in which little cancels as long as
    `near` is within a few standard deviations of the mean.

    The hand-written derivative needs two reductions over the batch where automatic
    differentiation of the two-pass variance needs four. It is linear in the tangents
    and built from this very function, so reverse mode, and forward over reverse, work.

    Args:
      axis_name: pmap axis to sum over, or None.
      epsilon: added to the variance.
      x: [batch, height, width, channels].
      scale: [channels].
      bias: [channels].
      weights: [batch], weight of each pixel of a row; weights summed over the pixels of
        the global batch are 1 (or 0: no valid row). Constants: not differentiated.
      near: [channels], a guess of the mean. Constant: nothing depends on it but
        rounding.

    Returns:
      y [batch, height, width, channels], mean [channels] and biased variance
      [channels], all of the type of `scale`.
    """
    x = x.astype(scale.dtype)
    squares = jnp.square(x - _wide(near))
    mean, square = _weighted_sums(x, squares, weights, axis_name)
    var = jnp.maximum(square - jnp.square(mean - near), 0)
    return _affine(x, mean, var, scale, bias, epsilon), mean, var


@normalise.defjvp
def _normalise_jvp(
    axis_name: str | None,
    epsilon: float,
    primals: tuple[jax.Array, ...],
    tangents: tuple[jax.Array, ...],
) -> tuple[Outputs, Outputs]:
    x, scale, bias, weights, _ = primals
    x_dot, scale_dot, bias_dot, *_ = tangents
    y, mean, var = normalise(axis_name, epsilon, *primals)
    x, x_dot = x.astype(scale.dtype), x_dot.astype(scale.dtype)
    inverse = lax.rsqrt(var + epsilon)
    mean_dot, cross = _weighted_sums(x_dot, x * x_dot, weights, axis_name)
    # Tangent of half the variance. Left uncentred, so that its transpose reads the
    # activations themselves: centred copies cost memory and a pass for each layer.
    half_dot = cross - mean * mean_dot
    # y = gain * x + offset: the two vectors carry all that is not elementwise, which
    # leaves the transpose one sum of the cotangent and one of its product with x.
    gain = scale * inverse
    gain_dot = scale_dot * inverse - gain * half_dot * jnp.square(inverse)
    offset_dot = bias_dot - gain * mean_dot - gain_dot * mean
    y_dot = x_dot * _wide(gain) + x * _wide(gain_dot) + _wide(offset_dot)
    return (y, mean, var), (y_dot, mean_dot, 2 * half_dot)


def _affine(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
) -> jax.Array:
    """(x - mean) * scale / deviation + bias, channels last, in the type of `scale`."""
    gain = scale * lax.rsqrt(var + epsilon)
    return x.astype(scale.dtype) * _wide(gain) + _wide(bias - mean * gain)


def _wide(values: jax.Array) -> jax.Array:
    """[channels] -> [1, 1, 1, channels]."""
    return values[None, None, None, :]


def _weighted_sums(
    x: jax.Array, y: jax.Array, weights: jax.Array, axis_name: str | None
) -> jax.Array:
    """Sums over the pixels of the global batch, rows weighted: [B, H, W, C] -> [2, C].

    XLA reads what both have in common once, and devices exchange both at once.
    """
    # Each row's pixels first: the mask then costs nothing.
    rows = jnp.stack([x.sum(axis=(1, 2)), y.sum(axis=(1, 2))], axis=1)
    return _global_sum((rows * weights[:, None, None]).sum(axis=0), axis_name)


def _global_sum(x: jax.Array, axis_name: str | None) -> jax.Array:
    return x if axis_name is None else lax.psum(x, axis_name)
