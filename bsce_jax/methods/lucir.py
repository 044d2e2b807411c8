"""LUCIR (Hou et al. 2019, section 3): new rows of the cosine head are imprinted."""

from bsce_jax.methods import imprinted

HEADS = ("cosine",)

begin = imprinted
