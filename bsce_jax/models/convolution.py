"""Convolution without bias, PyTorch's padding and initialisation, NHWC."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero


class Convolution(nn.Module):
    """Square convolution, padded by (size - 1) / 2 on every side.

    Weights are drawn from a normal distribution of deviation sqrt(2 / (size^2 *
    features)), He et al.'s fan-out rule.

    Attributes:
      features: output channels.
      size: window size, odd.
      stride: step of the window along height and width.
      chunks: pieces of the batch for the gradient on CPU, see `convolve`.
      dtype: compute type; the weights are at least float32.
      scaled: whether each kernel, of one input and one output channel, has a factor of
        its own, 1 at first (Mnemonics, Liu et al. 2020).
    """

    features: int
    size: int = 3
    stride: int = 1
    chunks: int = 1
    dtype: jnp.dtype = jnp.float32
    scaled: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, height, width, channels] -> [batch, height', width', features]."""
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        shape = (self.size, self.size, x.shape[-1], self.features)
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        kernel = self.param("kernel", init, shape, dtype)
        if self.scaled:
            ones = nn.initializers.ones
            kernel *= self.param("kernel_scale", ones, (1, 1, *shape[2:]), dtype)
        return convolve(
            x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.chunks
        )


def convolve(
    x: jax.Array, kernel: jax.Array, stride: int = 1, chunks: int = 1
) -> jax.Array:
    """Convolves with symmetric padding of (size - 1) / 2.

    Args:
      x: [batch, height, width, channels].
      kernel: [size, size, channels, features].
      stride: step of the window.
      chunks: with more than 1, the gradient with respect to the kernel is a sum over
        that many pieces of the batch, and a 1x1 convolution is a matrix product. Same
        results; made for XLA:CPU, whose kernel gradients are slow for large batches.
        For one device only: slicing a batch that jit shards would move it about.

    Returns:
      [batch, ceil(height / stride), ceil(width / stride), features].
    """
    if chunks == 1:
        return _convolve(x, kernel, stride)
    if kernel.shape[0] == 1:
        return jnp.dot(x[:, ::stride, ::stride, :], kernel[0, 0])
    return _convolve_in_chunks(x, kernel, stride, min(chunks, x.shape[0]))


def _convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    padding = (kernel.shape[0] - 1) // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _convolve_in_chunks(
    x: jax.Array, kernel: jax.Array, stride: int, chunks: int
) -> jax.Array:
    return _convolve(x, kernel, stride)


def _convolve_in_chunks_jvp(
    stride: int, chunks: int, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    # Only the term in the kernel's tangent is cut in pieces: reverse mode transposes
    # it into the sum of the pieces' gradients. (A custom_vjp would rule out the
    # forward-over-reverse derivative of the meta gradient.)
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    y = _convolve_in_chunks(x, kernel, stride, chunks)
    y_dot = jnp.zeros_like(y)
    if not isinstance(x_dot, SymbolicZero):
        y_dot += _convolve_in_chunks(x_dot, kernel, stride, chunks)
    if not isinstance(kernel_dot, SymbolicZero):
        pieces = jnp.array_split(x, chunks)
        y_dot += jnp.concatenate([_convolve(p, kernel_dot, stride) for p in pieces])
    return y, y_dot


_convolve_in_chunks.defjvp(_convolve_in_chunks_jvp, symbolic_zeros=True)


def default_chunks(platform: str, num_devices: int = 1) -> int:
    """The value of `chunks` that suits a machine.

    Args:
      platform: "cpu", "gpu" or "tpu", as `jax.Device.platform` says.
      num_devices: devices that share the batch.

    Returns:
      8 on a single CPU device; 1 elsewhere, which leaves the convolution alone. (8 is
      for 32x32 images by the hundred; batches of 8x8 images are faster with 1.)
    """
    return 8 if platform == "cpu" and num_devices == 1 else 1
