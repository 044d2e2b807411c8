"""Streaming LDA (Hayes and Kanan 2020): means and one covariance, updated by samples.

The network is fixed after the base step. `bsce_jax.slda` has the mathematics; updates
are exact as if the samples had come one at a time.
"""

import jax.numpy as jnp
import numpy as np

from bsce_jax import slda
from bsce_jax.compute.state import Apply, Batch, Network, Outputs, StepContext
from bsce_jax.methods import About, Own, Sizes, Step

ABOUT = About(
    title="SLDA",
    head="none",
    besides="network fixed after the base step, streaming LDA",
    source="Hayes and Kanan 2020",
)


PRIORS = ("none",)
OPTIONS = {"shrinkage": 1e-4}
LIMITS = {"shrinkage": (0, 1)}


def initial(sizes: Sizes, shrinkage: float) -> Own:
    """Means [C, D], counts [C], covariance [D, D] and its number of samples []; 0.

    And what predicts, "weights" [D, C] and "biases" [C]. All float32.
    """
    classes, size = sizes.classes, sizes.features
    shapes = {
        "means": (classes, size),
        "counts": (classes,),
        "covariance": (size, size),
        "samples": (),
        "weights": (size, classes),
        "biases": (classes,),
    }
    return Own({}, {name: np.zeros(s, np.float32) for name, s in shapes.items()})


def finish(step: Step) -> Network:
    """Takes in the new classes' features, those of later steps in random order."""
    found = step.new_features()
    kept = {k: np.array(v, np.float64) for k, v in step.network.extra.items()}
    means, samples = kept["means"], int(kept["samples"])
    covariance, counts = kept["covariance"], kept["counts"].astype(np.int64)
    if step.number == 0:
        for position, part in enumerate(found):
            means[position] = part.mean(axis=0, dtype=np.float64)
            counts[position] = len(part)
        centred = np.concatenate([p - means[c] for c, p in enumerate(found)])
        covariance, samples = slda.shrunk_covariance(centred), len(centred)
    else:
        order = step.rng.permutation(sum(map(len, found)))
        features = np.concatenate(found).astype(np.float64)[order]
        sizes = [len(part) for part in found]
        labels = np.repeat(np.arange(step.num_old, step.num_seen), sizes)[order]
        covariance, means, counts, samples = slda.stream(
            covariance, means, counts, samples, features, labels
        )
    weights, biases = slda.classifier(covariance, means, step.options["shrinkage"])
    now = {
        "means": means,
        "counts": counts,
        "covariance": covariance,
        "samples": samples,
        "weights": weights,
        "biases": biases,
    }
    extra = {name: np.asarray(v, np.float32) for name, v in now.items()}
    return step.network.replace(extra=extra)


def forward(
    apply: Apply,
    network: Network,
    batch: Batch,
    context: StepContext,
    shrinkage: float,
) -> tuple[Outputs, Network]:
    """Scores are the discriminants of the classes."""
    out, network = apply(network, batch.images, batch.valid)
    features = out["features"].astype(jnp.float32)
    scores = jnp.dot(features, network.extra["weights"])
    scores += network.extra["biases"][None, :]
    return out | {"scores": scores}, network
