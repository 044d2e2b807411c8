"""LUCIR (Hou et al. 2019, section 3): new rows of the cosine head are imprinted."""

from bsce_jax.methods import About, imprinted

ABOUT = About(
    title="LUCIR",
    head="cosine, learned scale",
    losses="cross-entropy, less-forget, margin ranking",
    besides="imprinted new rows, frozen old ones; on ImageNet balanced fine-tuning",
    source="Hou et al. 2019",
)


HEADS = ("cosine",)

begin = imprinted
