"""Optimisers and schedules, with PyTorch's semantics."""

import math
from collections.abc import Sequence

import jax
import numpy as np
import optax

from bsce_jax.compute.state import PyTree


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


def update_scale(
    params: PyTree,
    trained: np.ndarray,
    *,
    rest: float = 1.0,
    scalars: float = 1.0,
    head: str = "head",
) -> PyTree:
    """The factor of every update, constant within a step or a phase of it.

    Args:
      params: parameters; those under `head` have the class axis last, or no axis.
      trained: [C] bool, classes whose head rows may move.
      rest: factor of the parameters outside the head.
      scalars: factor of the head's parameters without a class axis (learned scales).
      head: name of the head among the top-level names of params.

    Returns:
      A pytree like params whose float32 leaves broadcast against it.
    """
    row = np.asarray(trained, np.float32)

    def leaf(path: tuple, value: jax.Array) -> np.ndarray:
        if path[0].key != head:
            return np.full((1,) * value.ndim, rest, np.float32)
        if value.ndim == 0:
            return np.full((), scalars, np.float32)
        return row.reshape((1,) * (value.ndim - 1) + row.shape)

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
