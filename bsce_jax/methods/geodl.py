"""GeoDL (Simon et al. 2021) on LUCIR: a geodesic distance in less-forget's place.

New rows of the cosine head are imprinted as LUCIR's; the loss is losses/geodesic.py.
"""

from bsce_jax.compute.state import Network
from bsce_jax.methods import Step
from bsce_jax.models import new_rows

HEADS = ("cosine",)


def begin(step: Step) -> Network:
    """Imprints the new classes."""
    features = step.new_features()
    return step.with_head(new_rows.imprint(step.head, features, step.num_old))
