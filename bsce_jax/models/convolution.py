"""Convolution without bias, PyTorch's padding and initialisation, NHWC."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


class Convolution(nn.Module):
    """Square convolution, padded by (size - 1) / 2 on every side.

    Weights are drawn from a normal distribution of deviation sqrt(2 / (size^2 *
    features)), He et al.'s fan-out rule.

    Attributes:
      features: output channels.
      size: window size, odd.
      stride: step of the window along height and width.
      chunks: pieces of the batch convolved one by one, see `convolve`.
      dtype: compute type; the weights are at least float32.
    """

    features: int
    size: int = 3
    stride: int = 1
    chunks: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, height, width, channels] -> [batch, height', width', features]."""
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param(
            "kernel", init, shape, jnp.promote_types(self.dtype, jnp.float32)
        )
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
      chunks: pieces of the batch convolved one by one and concatenated. The result is
        the same; the gradient with respect to the kernel becomes a sum over smaller
        convolutions, which XLA:CPU runs faster. For one CPU device only: slicing
        a batch that jit shards over devices would move it between them.

    Returns:
      [batch, ceil(height / stride), ceil(width / stride), features].
    """
    padding = (kernel.shape[0] - 1) // 2
    chunks = max(1, min(chunks, x.shape[0]))
    pieces = [
        lax.conv_general_dilated(
            piece,
            kernel,
            window_strides=(stride, stride),
            padding=((padding, padding), (padding, padding)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        for piece in jnp.array_split(x, chunks)
    ]
    return pieces[0] if chunks == 1 else jnp.concatenate(pieces)


def default_chunks(platform: str, num_devices: int = 1) -> int:
    """The value of `chunks` that suits a machine.

    Args:
      platform: "cpu", "gpu" or "tpu", as `jax.Device.platform` says.
      num_devices: devices that share the batch.

    Returns:
      8 on a single CPU device; 1 elsewhere, which leaves the convolution alone.
    """
    return 8 if platform == "cpu" and num_devices == 1 else 1
