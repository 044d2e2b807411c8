"""Loss functions: values for each example, never means.

One family of losses a file. Besides its functions a file may hold ``term(student,
teacher, batch, context, **options) -> (values, weights)``, which a training step finds
by the file's name.
"""

from bsce_jax.losses.kd import knowledge_distillation
from bsce_jax.losses.softmax_ce import softmax_cross_entropy

__all__ = ["knowledge_distillation", "softmax_cross_entropy"]
