"""EEIL (Castro et al. 2018) has no procedure beyond its losses and phases.

Cross-entropy over all classes, distillation head by head (losses/taskwise_kd.py), noise
on the gradient, and balanced fine-tuning with the network just trained as teacher.
"""

NEEDS_MEMORY = True
