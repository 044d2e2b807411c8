"""TPCIL-like: topology of the memory kept, after Tao et al. 2020's description.

The exemplars are the images nearest to the vertices of a neural gas of each class. In
every update a second batch of them keeps the edges between their features. Nothing of
the authors was public: this claims none of their numbers.
"""

import numpy as np
from numpy.typing import NDArray

from bsce_jax import neural_gas
from bsce_jax.compute.state import (
    MEMORY,
    Apply,
    Batch,
    Network,
    Outputs,
    StepContext,
)
from bsce_jax.methods import About, Step, imprinted
from bsce_jax.nearest_mean import normalised

ABOUT = About(
    title="TPCIL-like",
    head="cosine",
    losses="cross-entropy, topology of the memory",
    besides="exemplars of a neural gas; from a description only",
    source="Tao et al. 2020",
)


HEADS = ("cosine",)
NEEDS_MEMORY = True

begin = imprinted


def exemplars(step: Step, count: int) -> list[NDArray]:
    """The images nearest to `count` vertices of each new class."""
    chosen = []
    for kept, features in step.features(step.new):
        directions = normalised(features)
        vertices = neural_gas.fit(directions, count, step.rng)
        found = neural_gas.representatives(directions, vertices)
        chosen.append(np.asarray(kept)[found])
    return chosen


def forward(
    apply: Apply, network: Network, batch: Batch, context: StepContext
) -> tuple[Outputs, Network]:
    """Beside the batch the features of the memory's images, "vertices" [M, D].

    That pass has batch statistics of its own, which are not kept.
    """
    out, network = apply(network, batch.images, batch.valid)
    memory = batch.beside.get(MEMORY)
    if memory is None:
        return out, network
    beside, _ = apply(network, memory.images, memory.valid)
    return out | {"vertices": beside["features"]}, network
