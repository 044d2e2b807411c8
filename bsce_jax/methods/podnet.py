"""PODNet (Douillard et al. 2020, section 3.2): new proxies are centres of k-means."""

from bsce_jax.compute.state import Network
from bsce_jax.methods import Step
from bsce_jax.models import new_rows

HEADS = ("local_similarity",)


def begin(step: Step) -> Network:
    """Gives every new class the centres of its features as proxies."""
    features = step.new_features()
    head = new_rows.k_means(step.head, features, step.num_old, step.rng)
    return step.with_head(head)
