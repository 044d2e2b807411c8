"""Classification heads: features to one logit for each class of the experiment."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from bsce_jax.errors import UserError

NAMES = ("linear",)


class LinearHead(nn.Module):
    """Weights and bias over the whole class axis, initialised as PyTorch's Linear.

    Both are drawn from U(-1/sqrt(d), 1/sqrt(d)), d being the number of features.

    Attributes:
      num_classes: length of the class axis, classes not yet seen included.
    """

    num_classes: int

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """[batch, features] -> logits [batch, classes], of the type of `features`."""
        size, dtype = features.shape[-1], features.dtype

        def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            limit = size**-0.5
            return jax.random.uniform(key, shape, dtype, -limit, limit)

        kernel = self.param("kernel", init, (size, self.num_classes))
        bias = self.param("bias", init, (self.num_classes,))
        return jnp.dot(features, kernel) + bias[None, :]


def create(name: str, num_classes: int) -> nn.Module:
    """Builds a head by name.

    Raises:
      UserError: the name is not one of `NAMES`.
    """
    if name not in NAMES:
        raise UserError(f"head={name!r} is unknown; allowed: {', '.join(NAMES)}")
    return LinearHead(num_classes, name="head")
