"""GeoDL (Simon et al. 2021) on LUCIR: a geodesic distance in less-forget's place.

New rows of the cosine head are imprinted as LUCIR's; the loss is losses/geodesic.py.
"""

from bsce_jax.methods import About, imprinted

ABOUT = About(
    title="GeoDL",
    head="cosine",
    losses="cross-entropy, geodesic distance of features",
    besides="as LUCIR",
    source="Simon et al. 2021",
)


HEADS = ("cosine",)

begin = imprinted
