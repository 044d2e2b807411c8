"""SS-IL (Ahn et al. 2021) has no procedure beyond its losses and its batches.

Separated softmax, task-wise distillation, and batches of new images with a fixed share
of exemplars.
"""

from bsce_jax.methods import About

ABOUT = About(
    title="SS-IL",
    head="linear",
    losses="separated softmax, distillation by task",
    besides="batches of new images and exemplars",
    source="Ahn et al. 2021",
)


NEEDS_MEMORY = True
PRIORS = ("none",)  # the separated softmax takes the prior's place
