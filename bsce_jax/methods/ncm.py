"""Nearest class mean: the network is fixed after the base step, means are added.

The network that Jodelet et al. compare with in Table 3: no memory, no training later.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bsce_jax.compute.state import Apply, Batch, Network, Outputs, StepContext
from bsce_jax.methods import About, Own, Sizes, Step
from bsce_jax.nearest_mean import normalised
from bsce_jax.norms import normalise

ABOUT = About(
    title="NCM",
    head="none",
    besides="network fixed after the base step, class means",
    source="Jodelet et al.",
)


PRIORS = ("none",)


def initial(sizes: Sizes) -> Own:
    """The classes' means, float32 [C, D]; 0 for those not seen."""
    means = np.zeros((sizes.classes, sizes.features), np.float32)
    return Own({}, {"means": means})


def finish(step: Step) -> Network:
    """Adds the mean of the normalised features of each new class."""
    means = np.array(step.network.extra["means"])
    for position, features in enumerate(step.new_features(), start=step.num_old):
        means[position] = normalised(features).mean(axis=0)
    return step.network.replace(extra={"means": means})


def forward(
    apply: Apply, network: Network, batch: Batch, context: StepContext
) -> tuple[Outputs, Network]:
    """Scores are minus the squared distance of the normalised features to each mean."""
    out, network = apply(network, batch.images, batch.valid)
    return out | {"scores": scores(out["features"], network.extra["means"])}, network


def scores(features: jax.Array, means: jax.Array) -> jax.Array:
    """Minus the squared Euclidean distances of [B, D] from [C, D]: [B, C]."""
    directions = normalise(features.astype(jnp.float32))
    lengths = jnp.sum(jnp.square(means), axis=1)
    return 2 * jnp.dot(directions, means.T) - 1 - lengths[None, :]
