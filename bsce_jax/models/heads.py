"""Classification heads: features to one logit for each class of the experiment.

Every head answers as the networks do, with logits [batch, classes] and a dict of what
else loss terms look at.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from bsce_jax.errors import UserError
from bsce_jax.norms import normalise

NAMES = {
    "linear": "weights and bias",
    "cosine": "scaled cosine of features and class embeddings (LUCIR)",
    "local_similarity": "softmax-weighted cosines of several proxies (PODNet)",
    "perspectives": "four cosine heads (SPB-M)",
}
PERSPECTIVES = 4

Answer = tuple[jax.Array, dict[str, jax.Array]]


class LinearHead(nn.Module):
    """Weights and bias over the whole class axis, initialised as PyTorch's Linear.

    Both are drawn from U(-1/sqrt(d), 1/sqrt(d)), d being the number of features.

    Attributes:
      num_classes: length of the class axis, classes not yet seen included.
    """

    num_classes: int

    @nn.compact
    def __call__(self, features: jax.Array) -> Answer:
        """[batch, d] -> logits [batch, classes], of the type of `features`; {}."""
        init = _uniform(features)
        kernel = self.param("kernel", init, (features.shape[-1], self.num_classes))
        bias = self.param("bias", init, (self.num_classes,))
        return jnp.dot(features, kernel) + bias[None, :], {}


class CosineHead(nn.Module):
    """Scaled cosine of features and class embeddings (LUCIR, Hou et al. 2019).

    The embeddings are drawn from U(-1/sqrt(d), 1/sqrt(d)), d being the number of
    features; the trained scale (eta in the paper) starts at 1. There is no bias.

    Attributes:
      num_classes: length of the class axis, classes not yet seen included.
    """

    num_classes: int

    @nn.compact
    def __call__(self, features: jax.Array) -> Answer:
        """[batch, d] -> logits [batch, classes], of the type of `features`; a dict.

        The dict has "similarities" [batch, classes], the cosines before scaling (0 with
        a zero vector), and "scale" [].
        """
        shape = features.shape[-1], self.num_classes
        kernel = self.param("kernel", _uniform(features), shape)
        scale = self.param("scale", nn.initializers.ones, (), features.dtype)
        cosines = jnp.dot(normalise(features, 1), normalise(kernel, 0))
        return scale * cosines, {"similarities": cosines, "scale": scale}


class LocalSimilarityHead(nn.Module):
    """Several proxies a class, each counted by its nearness (PODNet, Douillard 2020).

    A proxy's similarity is minus the squared distance of the normalised vectors, as in
    the authors' code (the paper has the cosine): twice the cosine minus 2. A class
    scores the mean of its proxies' similarities, weighted by their own softmax. Proxies
    are drawn from a normal distribution of deviation 1/sqrt(d), d being the number of
    features; the trained scale (eta in the paper) starts at 1.

    Attributes:
      num_classes: length of the class axis, classes not yet seen included.
      proxies: of a class.
    """

    num_classes: int
    proxies: int = 10

    @nn.compact
    def __call__(self, features: jax.Array) -> Answer:
        """[batch, d] -> logits [batch, classes], of the type of `features`; a dict.

        The dict has "similarities" [batch, classes], the class scores before scaling,
        in [-4, 0], and "scale" [].
        """
        size, dtype = features.shape[-1], features.dtype
        init = nn.initializers.normal(size**-0.5)
        shape = size, self.proxies, self.num_classes
        kernel = self.param("kernel", init, shape, dtype)
        scale = self.param("scale", nn.initializers.ones, (), dtype)
        # [batch, proxies, classes]
        cosines = jnp.tensordot(normalise(features, 1), normalise(kernel, 0), axes=1)
        # Rounding can take a cosine beyond 1, but no distance below 0.
        similarities = jnp.minimum(2 * cosines - 2, 0)
        scores = (nn.softmax(similarities, axis=1) * similarities).sum(axis=1)
        return scale * scores, {"similarities": scores, "scale": scale}


class PerspectivesHead(nn.Module):
    """Several cosine heads side by side (SPB-M, Wu et al. 2021).

    Each has embeddings and a scale of its own, initialised as `CosineHead`'s.

    Attributes:
      num_classes: length of the class axis, classes not yet seen included.
    """

    num_classes: int

    @nn.compact
    def __call__(self, features: jax.Array) -> Answer:
        """[batch, d] -> logits of the first head [batch, classes]; a dict.

        The dict has "perspectives" [batch, PERSPECTIVES, classes], the logits of every
        head, and of the first "similarities" [batch, classes] and "scale" [].
        """
        shape = features.shape[-1], PERSPECTIVES, self.num_classes
        kernel = self.param("kernel", _uniform(features), shape)
        scale = self.param(
            "scale", nn.initializers.ones, (PERSPECTIVES,), features.dtype
        )
        cosines = jnp.tensordot(normalise(features, 1), normalise(kernel, 0), axes=1)
        logits = scale[None, :, None] * cosines
        first = {"similarities": cosines[:, 0], "scale": scale[0]}
        return logits[:, 0], {"perspectives": logits} | first


def create(name: str, num_classes: int, proxies: int = 10) -> nn.Module:
    """Builds a head by name.

    Args:
      name: one of `NAMES`.
      num_classes: length of the class axis.
      proxies: of a class, for "local_similarity".

    Raises:
      UserError: the name is not one of `NAMES`.
    """
    if name == "linear":
        return LinearHead(num_classes, name="head")
    if name == "cosine":
        return CosineHead(num_classes, name="head")
    if name == "local_similarity":
        return LocalSimilarityHead(num_classes, proxies, name="head")
    if name == "perspectives":
        return PerspectivesHead(num_classes, name="head")
    raise UserError(f"head={name!r} is unknown; allowed: {', '.join(NAMES)}")


def _uniform(features: jax.Array) -> Callable[[jax.Array, tuple[int, ...]], jax.Array]:
    """Initialiser: U(-1/sqrt(d), 1/sqrt(d)) for d features, and of their type."""
    limit = features.shape[-1] ** -0.5

    def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.uniform(key, shape, features.dtype, -limit, limit)

    return init
