"""Distillation of data effects (DDE, Hu et al. 2021) on any head: its two halves.

Distilling the colliding effect (DCE): an image shares its label with its neighbours in
the feature space of the network of the step before. Taking out the momentum effect
(TDE): what a moving mean of the features explains of the logits is subtracted in
prediction.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from bsce_jax.neighbours import nearest
from bsce_jax.norms import normalise

OPTIONS = {"share": 0.5, "momentum": 0.9, "pool": 0}
"""Of both methods that have it: see `total_direct_effect`, `forward`, `companions`."""

LIMITS = {"share": (0, 10), "momentum": (0, 1), "pool": (0, None)}

Head = Callable[[jax.Array], jax.Array]
"""From features [N, D] to logits [N, classes]."""


def initial(size: int) -> dict[str, NDArray]:
    """What DDE keeps of `size` features: the moving mean "h", float32 [D], of 0."""
    return {"h": np.zeros(size, np.float32)}


def companions(
    features: ArrayLike,
    labels: NDArray,
    num_old: int,
    count: int,
    pool: int,
    **options: Any,
) -> NDArray[np.int32]:
    """Neighbours of each image of an epoch among the new classes' images.

    Args:
      features: float [N, D], of the network of the step before, by place in the epoch.
      labels: int [N], positions in the class order; -1 where there is no image.
      num_old: classes of earlier steps.
      count: K, neighbours of an image.
      pool: only the first `pool` places may be found; 0 = all. (The authors' code has
        10,000 where there are more than 500 classes.)
      **options: the others of OPTIONS, not used.

    Returns:
      int32 [N, K] places, the nearest first; -1 = none, as where there is no image.
    """
    new = labels >= num_old
    if pool:
        new &= np.arange(len(labels)) < pool
    found = nearest(features, new, count)
    found[labels < 0] = -1
    return found


def total_direct_effect(
    logits: jax.Array, features: jax.Array, mean: jax.Array, head: Head, share: float
) -> jax.Array:
    """Logits less what the moving mean explains of them (TDE).

    ``z - share * cos(f, h) * head(h)``, which for a cosine head of scale eta is ``z -
    share * eta * cos(f, h) * cos(h, w)``; only the direction of h matters to it.

    Args:
      logits: [B, classes].
      features: [B, D].
      mean: h, [D]; where it is 0, nothing is taken out.
      head: gives the logits of features; those of h are taken from it.
      share: how much of the effect.

    Returns:
      [B, classes].
    """
    cosines = jnp.dot(normalise(features), normalise(mean))
    return logits - share * cosines[:, None] * head(mean[None])


def forward(
    head: Callable[[Any], Head],
    apply: Callable[..., tuple[dict[str, Any], Any]],
    network: Any,
    batch: Any,
    context: Any,
    share: float,
    momentum: float,
    pool: int,
) -> tuple[dict[str, Any], Any]:
    """The forward pass of a method with DDE.

    The neighbours' pass comes first, as in the authors' code: it has batch statistics
    of its own, and moves the running ones, but no gradient.

    Args:
      head: from the head's parameters to its function.
      apply, network, batch, context: see `bsce_jax.methods`; the batch's "companions"
        are the neighbours, where there are any.
      share: see `total_direct_effect`.
      momentum: of the moving mean of the features.
      pool: not used, see `companions`.

    Returns:
      The model's outputs, with "scores" [B, classes] and, with neighbours, their
      "neighbour_logits" [B, K, classes] and "neighbours_valid" [B, K]; and the network
      with moved statistics.
    """
    near, found = batch.beside.get("companions"), {}
    if near is not None:
        logits, moved = apply(jax.lax.stop_gradient(network), near.images, near.valid)
        shape = len(batch.labels), -1
        found["neighbour_logits"] = jax.lax.stop_gradient(
            logits["logits"].reshape(*shape, logits["logits"].shape[-1])
        )
        found["neighbours_valid"] = near.valid.reshape(shape)
        network = network.replace(batch_stats=moved.batch_stats)
    out, network = apply(network, batch.images, batch.valid)
    mean = network.extra["h"]
    scores = total_direct_effect(
        out["logits"], out["features"], mean, head(network.params["head"]), share
    )
    now = batch.mean(jax.lax.stop_gradient(out["features"]).astype(mean.dtype))
    network = network.replace(extra={"h": momentum * mean + now})
    return out | found | {"scores": scores}, network
