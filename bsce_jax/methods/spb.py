"""SPB (Wu et al. 2021): losses weighted by the numbers of old and new classes.

No memory. New rows of the cosine head are imprinted; the losses are columns_ce.py and
feature_mse.py in losses/, their weights new/old and old/new.
"""

from bsce_jax.compute.state import Network
from bsce_jax.methods import Step
from bsce_jax.models import new_rows

HEADS = ("cosine",)


def begin(step: Step) -> Network:
    """Imprints the new classes."""
    features = step.new_features()
    return step.with_head(new_rows.imprint(step.head, features, step.num_old))
