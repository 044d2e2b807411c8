"""POD-flat (PODNet, Douillard et al. 2020): distillation of the final features.

One minus the cosine, as the authors coded it (half the square of the distance of the
normalised features): the less-forget constraint under another name and weight.
"""

from bsce_jax.losses.less_forget import NEEDS_OLD_CLASSES, NEEDS_TEACHER, term

__all__ = ["NEEDS_OLD_CLASSES", "NEEDS_TEACHER", "term"]
