"""EEIL (Castro et al. 2018) has no procedure beyond its losses and phases.

Cross-entropy over all classes, distillation head by head (losses/taskwise_kd.py), noise
on the gradient, and balanced fine-tuning with the network just trained as teacher.
"""

from bsce_jax.methods import About

ABOUT = About(
    title="EEIL",
    head="linear",
    losses="cross-entropy, distillation by task",
    besides="noise on gradients, balanced fine-tuning",
    source="Castro et al. 2018",
)


NEEDS_MEMORY = True
