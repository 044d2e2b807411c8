"""Optimisers and schedules, with PyTorch's semantics."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import optax

from bsce_jax.compute.state import OWN, PyTree

HEAD = "head"
"""Name of the head among the top-level names of a network's parameters."""
AUXILIARY = "auxiliary"
"""How the names of an auxiliary branch begin there."""


def sgd(
    momentum: float, weight_decay: float, clip: float = 0.0
) -> optax.GradientTransformation:
    """SGD with momentum and coupled L2 as PyTorch's, without the learning rate.

    g <- g + weight_decay * p; m <- momentum * m + g; the step is then -lr * m, with
    lr given to `apply` because it is a traced value. With a `clip` above 0 every entry
    of the gradient is first brought into [-clip, clip] (PODNet).
    """
    limits = [optax.clip(clip)] if clip else []
    return optax.chain(
        *limits, optax.add_decayed_weights(weight_decay), optax.trace(decay=momentum)
    )


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
      training uses; "batch_norms"; or "convolutions", the rest.
    """
    names = [str(part.key) for part in path]
    if names[0] == OWN:
        return "own"
    if names[0] == HEAD:
        return "scale" if names[-1] == "scale" else "head"
    if names[0].startswith(AUXILIARY):
        return "auxiliary"
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
