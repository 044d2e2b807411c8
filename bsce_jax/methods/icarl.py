"""iCaRL (Rebuffi et al. 2017): sigmoid outputs, nearest mean of exemplars.

Its loss is losses/sigmoid_bce.py. The network is trained as ever; predictions are those
of the nearest mean (Algorithm 1), for top-1, top-5 and new images alike.
"""

import jax.numpy as jnp
import numpy as np

from bsce_jax import nearest_mean
from bsce_jax.compute.state import Apply, Batch, Network, Outputs, StepContext
from bsce_jax.methods import About, Own, Sizes, Step
from bsce_jax.norms import normalise

ABOUT = About(
    title="iCaRL",
    head="linear",
    losses="binary cross-entropy of sigmoids",
    besides="nearest mean of exemplars",
    source="Rebuffi et al. 2017",
)


NEEDS_MEMORY = True
PRIORS = ("none",)  # a log-prior has no meaning for independent sigmoids


def initial(sizes: Sizes) -> Own:
    """The means of the classes' exemplars, float32 [C, D]; 0 for those not seen."""
    means = np.zeros((sizes.classes, sizes.features), np.float32)
    return Own({}, {"means": means})


def finish(step: Step) -> Network:
    """Means of all classes' exemplars with the network just trained.

    Where the training images are mirrored, mirrored exemplars enter too.
    """
    groups = step.exemplars
    views = [
        step.features(groups, view)
        for view in ("plain", "mirrored")[: 1 + step.mirrored]
    ]
    labels = np.repeat(np.arange(len(groups)), [len(kept) for kept, _ in views[0]])
    joined = [np.concatenate([found for _, found in view]) for view in views]
    means = np.zeros_like(step.network.extra["means"])
    means[: len(groups)] = np.nan_to_num(
        nearest_mean.class_means(joined, labels, len(groups))
    )
    return step.network.replace(extra={"means": means})


def forward(
    apply: Apply, network: Network, batch: Batch, context: StepContext
) -> tuple[Outputs, Network]:
    """Scores are the cosines with the means: the nearest one has the highest."""
    out, network = apply(network, batch.images, batch.valid)
    directions = normalise(out["features"].astype(jnp.float32))
    scores = jnp.dot(directions, network.extra["means"].T)
    return out | {"scores": scores}, network
