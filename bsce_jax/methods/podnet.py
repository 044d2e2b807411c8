"""PODNet (Douillard et al. 2020, section 3.2): new proxies are centres of k-means."""

from bsce_jax.methods import clustered

HEADS = ("local_similarity",)

begin = clustered
