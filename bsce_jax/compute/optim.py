"""Optimisers and schedules, with PyTorch's semantics."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsce_jax.compute.state import OWN, PyTree

HEAD = "head"
"""Name of the head among the top-level names of a network's parameters."""
AUXILIARY = "auxiliary"
"""How the names of an auxiliary branch begin there."""


def sgd(
    momentum: float, weight_decay: float, clip: float = 0.0, decayed: str = "all"
) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum and coupled L2 as PyTorch's, without the learning rate.

    g <- g + decay * weight_decay * p; m <- momentum * m + g; the step is then -lr * m.
    lr is given to `apply`, and the factor `decay` to `update`, because they are traced
    values. With a `clip` above 0 every entry of the gradient is first brought into
    [-clip, clip] (PODNet).

    Args:
      momentum: of the gradient.
      weight_decay: coupled, on what `decayed` names but never on a method's own.
      clip: see above; 0 = no limit.
      decayed: "all", or "kernels": parameters with more than one axis.
    """
    limits = [optax.clip(clip)] if clip else []
    return optax.with_extra_args_support(
        optax.chain(
            *limits, _decayed_weights(weight_decay, decayed), optax.trace(momentum)
        )
    )


def _decayed_weights(
    weight_decay: float, decayed: str
) -> optax.GradientTransformationExtraArgs:
    """g + decay * weight_decay * p where it applies."""

    def update(
        updates: PyTree, state: PyTree, params: PyTree, *, decay: jax.Array, **_: Any
    ) -> tuple[PyTree, PyTree]:
        def leaf(path: tuple, g: jax.Array, p: jax.Array) -> jax.Array:
            if group(path) == "own" or (decayed == "kernels" and p.ndim < 2):
                return g
            return g + jnp.asarray(weight_decay * decay, p.dtype) * p

        return jax.tree_util.tree_map_with_path(leaf, updates, params), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


@dataclasses.dataclass(frozen=True)
class Noise:
    """How strong the noise on the gradient is: see `optim.noise` in the fields.

    Attributes:
      scale: in the first epoch, but for a constant.
      epochs: passes over the images that count as one epoch.
      short: passes of the whole protocol that one stands for.
    """

    scale: float
    epochs: int
    short: int = 1

    def deviation(self, epoch: jax.Array) -> jax.Array:
        """Of the summed gradient, [] float32, in a pass counted from 0."""
        number = 1 + epoch * self.short // self.epochs
        return self.scale / (1 + number).astype(jnp.float32) ** 0.55


def noise(key: jax.Array, gradient: PyTree, deviation: jax.Array) -> PyTree:
    """The gradient with normal noise, the same on every device.

    Args:
      key: of the update.
      gradient: of the parameters; a method's own get no noise.
      deviation: [] of the noise of every entry.
    """
    numbers = itertools.count()  # of the model's leaves: others change no key

    def noisy(path: tuple, leaf: jax.Array) -> jax.Array:
        if group(path) == "own":
            return leaf
        own_key = jax.random.fold_in(key, next(numbers))
        return leaf + deviation * jax.random.normal(own_key, leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(noisy, gradient)


def alpha_optimizer(name: str, learning_rate: float) -> optax.GradientTransformation:
    """The optimiser of the scalar alpha: "sgd" (Algorithm 1) or "adam"."""
    return {"sgd": optax.sgd, "adam": optax.adam}[name](learning_rate)


def apply(
    params: PyTree, direction: PyTree, learning_rate: jax.Array, scale: PyTree
) -> PyTree:
    """params - learning_rate * scale * direction.

    Args:
      params: float parameters.
      direction: like params, from the optimiser.
      learning_rate: [] float32.
      scale: like params, leaves broadcastable; 0 holds a row still, against weight
        decay and momentum as well as against its gradient.
    """
    return jax.tree.map(
        lambda p, d, s: p - learning_rate.astype(p.dtype) * s.astype(p.dtype) * d,
        params,
        direction,
        scale,
    )


def group(path: tuple) -> str:
    """The group of a parameter, for its share of the learning rate.

    Args:
      path: of the leaf in the parameters, as `jax.tree_util` gives it.

    Returns:
      "own", what a method trains beside the model; "head", the head's rows, whose last
      axis are the classes; "scale", its learned scale; "auxiliary", a branch that only
      training uses; "batch_norms"; "kernel_scales", factors of the convolutions'
      kernels; or "convolutions", the rest.
    """
    names = [str(part.key) for part in path]
    if names[0] == OWN:
        return "own"
    if names[0] == HEAD:
        return "scale" if names[-1] == "scale" else "head"
    if names[0].startswith(AUXILIARY):
        return "auxiliary"
    if names[-1] == "kernel_scale":
        return "kernel_scales"
    return "batch_norms" if names[-2].endswith("norm") else "convolutions"


def update_scale(params: PyTree, rate: Mapping[str, float], rows: np.ndarray) -> PyTree:
    """The factor of every update, constant within a phase of a step.

    Args:
      params: of the network.
      rate: of each `group`; 0 = frozen.
      rows: [C] bool, classes whose rows of the head may move.

    Returns:
      A pytree like params whose float32 leaves broadcast against it.
    """

    def leaf(path: tuple, value: jax.Array) -> np.ndarray:
        name = group(path)
        factor = np.full((1,) * value.ndim, rate[name], np.float32)
        return factor * rows.astype(np.float32) if name == "head" else factor

    return jax.tree_util.tree_map_with_path(leaf, params)


def step_decay(
    learning_rate: float, epoch: int, milestones: Sequence[int], decay: float
) -> float:
    """Rate in an epoch: multiplied by `decay` at each milestone reached (MultiStepLR).

    A milestone e means that epochs 0 to e - 1 run at the earlier rate.
    """
    return learning_rate * decay ** sum(epoch >= m for m in milestones)


def lagged_cosine(learning_rate: float, epoch: int, epochs: int) -> float:
    """Rate in an epoch: half a cosine from `learning_rate` towards 0, one epoch late.

    PODNet's authors step their scheduler at the end of each epoch with that epoch's
    number, so that epochs 0 and 1 both run at the full rate.
    """
    turn = math.pi * max(epoch - 1, 0) / epochs
    return 0.5 * learning_rate * (1.0 + math.cos(turn))
