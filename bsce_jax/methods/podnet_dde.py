"""DDE on PODNet (Hu et al. 2021); the mathematics are in `bsce_jax.dde`."""

import functools
from typing import Any

import jax

from bsce_jax import dde
from bsce_jax.compute.state import Network
from bsce_jax.methods import About, Own, Sizes, Step, clustered
from bsce_jax.models import heads

ABOUT = About(
    title="PODNet + DDE",
    head="local similarity",
    losses="as PODNet, the likelihood averaged with neighbours",
    besides="a moving mean's effect taken out of predictions",
    source="Hu et al. 2021",
)


HEADS = ("local_similarity",)
OPTIONS, LIMITS = dde.OPTIONS, dde.LIMITS

companions = dde.companions


def initial(sizes: Sizes, **options: Any) -> Own:
    """The moving mean of the features, of 0."""
    return Own({}, dde.initial(sizes.features))


def begin(step: Step) -> Network:
    """New proxies are centres of k-means; the moving mean starts anew."""
    network = clustered(step)
    return network.replace(extra=dde.initial(len(network.extra["h"])))


def _head(params: dict[str, jax.Array]) -> dde.Head:
    _, proxies, classes = params["kernel"].shape
    head = heads.LocalSimilarityHead(classes, proxies)
    return lambda features: head.apply({"params": params}, features)[0]


forward = functools.partial(dde.forward, _head)
