"""SS-IL (Ahn et al. 2021) has no procedure beyond its losses and its batches.

Separated softmax, task-wise distillation, and batches of new images with a fixed share
of exemplars.
"""

NEEDS_MEMORY = True
PRIORS = ("none",)  # the separated softmax takes the prior's place
