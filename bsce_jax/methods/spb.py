"""SPB (Wu et al. 2021): losses weighted by the numbers of old and new classes.

No memory. New rows of the cosine head are imprinted; the losses are columns_ce.py and
feature_mse.py in losses/, their weights new/old and old/new.
"""

from bsce_jax.methods import About, imprinted

ABOUT = About(
    title="SPB",
    head="cosine",
    losses="cross-entropy, feature distance",
    besides="without memory",
    source="Wu et al. 2021",
)


HEADS = ("cosine",)

begin = imprinted
