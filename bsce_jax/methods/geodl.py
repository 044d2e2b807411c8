"""GeoDL (Simon et al. 2021) on LUCIR: a geodesic distance in less-forget's place.

New rows of the cosine head are imprinted as LUCIR's; the loss is losses/geodesic.py.
"""

from bsce_jax.methods import imprinted

HEADS = ("cosine",)

begin = imprinted
