"""PODNet (Douillard et al. 2020, section 3.2): new proxies are centres of k-means."""

from bsce_jax.methods import About, clustered

ABOUT = About(
    title="PODNet",
    head="local similarity, 10 proxies a class",
    losses="NCA (a prior replaces it by cross-entropy), POD-spatial, POD-flat",
    besides="proxies by k-means, frozen old ones, clipped gradients; "
    "balanced fine-tuning of the classifier",
    source="Douillard et al. 2020",
)


HEADS = ("local_similarity",)

begin = clustered
