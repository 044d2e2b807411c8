"""Mnemonics (Liu et al. 2020) on LUCIR: exemplars are learned, pixel by pixel.

A phase of its own learns the new classes' exemplars when the network is trained: rows
of the head are trained on the exemplars alone, in a loop that is differentiated
through, and have to classify the step's images. Only the head is unrolled, not the
network; exemplars start as those of herding. The result is kept as uint8, in the place
of the images it came from. Of the old classes' exemplars the two halves can validate
each other (`halves`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bsce_jax import log_prior
from bsce_jax.compute.state import OWN, Apply, Batch, Network, Outputs, StepContext
from bsce_jax.losses import softmax_cross_entropy
from bsce_jax.methods import About, Own, Sizes, Step, imprinted
from bsce_jax.norms import normalise

ABOUT = About(
    title="Mnemonics",
    head="cosine",
    losses="as LUCIR",
    besides="exemplars learned pixel by pixel, fixed convolutions",
    source="Liu et al. 2020",
)


HEADS = ("cosine",)
NEEDS_MEMORY = NEEDS_RESIDENT = True
OPTIONS = {"inner_rate": 0.01, "passes": 5, "halves": False}
LIMITS = {"inner_rate": (0, 1e4), "passes": (1, 1000)}

begin = imprinted


def initial(sizes: Sizes, halves: bool, **options: Any) -> Own:
    """Exemplars in training, and all of them as they are stored.

    "pixels" float32 [R, M, H, W, channels], normalised, of R classes: the new ones, or
    with `halves` all. "rows" int32 [R], which classes they are; "images" uint8 [C, M,
    H, W, channels] and "places" int32 [C, M], the exemplars of every class and the
    training images that they stand for; -1 = none.
    """
    rows = sizes.classes if halves else sizes.new
    shape = sizes.exemplars, *sizes.image
    return Own(
        {"pixels": np.zeros((rows, *shape), np.float32)},
        {
            "rows": np.full(rows, -1, np.int32),
            "images": np.zeros((sizes.classes, *shape), np.uint8),
            "places": np.full((sizes.classes, sizes.exemplars), -1, np.int32),
        },
    )


def start(step: Step) -> Network:
    """The pixels in training become those of the exemplars that memory still keeps."""
    assert step.images is not None
    extra = {name: np.array(value) for name, value in step.network.extra.items()}
    for position, kept in enumerate(step.exemplars):
        extra["places"][position, len(kept) :] = -1
    for position in range(step.num_old, step.num_seen):
        chosen = step.exemplars[position]
        extra["places"][position, : len(chosen)] = chosen
        extra["images"][position, : len(chosen)] = step.images(chosen)
    first = 0 if step.options["halves"] else step.num_old
    rows = np.arange(first, step.num_seen, dtype=np.int32)
    extra["rows"][:] = -1
    extra["rows"][: len(rows)] = rows
    mean, std = (np.asarray(part, np.float32) for part in step.normalization)
    pixels = np.zeros_like(step.network.params[OWN]["pixels"])
    pixels[: len(rows)] = (extra["images"][rows] / np.float32(255) - mean) / std
    params = {**step.network.params, OWN: {"pixels": pixels}}
    return step.network.replace(params=params, extra=extra)


def finish(step: Step) -> Network:
    """The learned pixels are stored, rounded to uint8."""
    extra = {name: np.array(value) for name, value in step.network.extra.items()}
    rows = extra["rows"][extra["rows"] >= 0]
    mean, std = (np.asarray(part, np.float32) for part in step.normalization)
    pixels = step.network.params[OWN]["pixels"][: len(rows)] * std + mean
    extra["images"][rows] = np.clip(np.rint(255 * pixels), 0, 255).astype(np.uint8)
    return step.network.replace(extra=extra)


def replaced(network: Network) -> tuple[NDArray, NDArray]:
    """The stored exemplars, in the place of the images that they started as."""
    there = network.extra["places"] >= 0
    return network.extra["places"][there], network.extra["images"][there]


def unrolled(
    apply: Apply,
    network: Network,
    batch: Batch,
    context: StepContext,
    inner_rate: float,
    passes: int,
    halves: bool,
) -> tuple[Outputs, Network]:
    """Logits of a head that has learned from the new classes' exemplars.

    And "halves" [], the loss of the old classes' exemplars: 0 without `halves`.
    """
    out, network = apply(network, batch.images, batch.valid)
    pixels, extra = network.params[OWN]["pixels"], network.extra
    images = pixels.reshape(-1, *pixels.shape[2:])
    shown, _ = apply(network, images.astype(batch.images.dtype), jnp.ones(len(images)))
    features = shown["features"].reshape(*pixels.shape[:2], -1)
    rows = extra["rows"]
    there = (rows[:, None] >= 0) & (extra["places"][rows] >= 0)
    old = there & context.old[rows][:, None]
    head, prior = network.params["head"], log_prior.uniform(context.seen)

    def learned(weights: jax.Array) -> jax.Array:
        return _learned(head, features, rows, weights, prior, inner_rate, passes)

    logits = _logits(learned(there & ~old), head["scale"], out["features"])
    loss = jnp.zeros(())
    if halves:
        first = (jnp.arange(pixels.shape[1]) % 2 == 0)[None, :]
        flat = jax.lax.stop_gradient(features).reshape(len(images), -1)
        labels = jnp.repeat(rows, pixels.shape[1])
        for half, other in ((first, ~first), (~first, first)):
            found = _logits(learned(old & half), head["scale"], flat)
            values = softmax_cross_entropy(found, labels, prior)
            loss += 0.5 * _mean(values, (old & other).ravel())
    return out | {"logits": logits, "halves": loss}, network


def _learned(
    head: dict[str, jax.Array],
    features: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    prior: jax.Array,
    rate: float,
    passes: int,
) -> jax.Array:
    """The head's kernel after SGD on features [R, M, D] of labels [R].

    An update learns from one exemplar of every class, those with `weights` [R, M].
    """

    def loss(kernel: jax.Array, slot: jax.Array) -> jax.Array:
        logits = _logits(kernel, head["scale"], features[:, slot])
        values = softmax_cross_entropy(logits, labels, prior)
        return _mean(values, weights[:, slot])

    def update(kernel: jax.Array, slot: jax.Array) -> tuple[jax.Array, None]:
        return kernel - rate * jax.grad(loss)(kernel, slot), None

    slots = jnp.tile(jnp.arange(features.shape[1]), passes)
    return jax.lax.scan(update, head["kernel"], slots)[0]


def _logits(kernel: jax.Array, scale: jax.Array, features: jax.Array) -> jax.Array:
    """Those of a cosine head."""
    return scale * jnp.dot(normalise(features, 1), normalise(kernel, 0))


def _mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1)
