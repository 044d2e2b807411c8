"""Loss functions: values for each example, never means.

One family of losses a file. Besides its functions a file may hold ``term(student,
teacher, batch, context, **options) -> (values, weights)``, which a training step finds
by the file's name; ``LIMITS`` has the (least, most) of options that have any, or the
texts that they may be. Where a function has its file's name, the attribute of this
package is the function; ``importlib.import_module("bsce_jax.losses.nca")`` gives the
module.
"""

from bsce_jax.losses.columns_ce import columns_cross_entropy
from bsce_jax.losses.dde_ce import colliding_effect
from bsce_jax.losses.feature_mse import feature_mse
from bsce_jax.losses.geodesic import geodesic, geodesic_kernel
from bsce_jax.losses.kd import knowledge_distillation
from bsce_jax.losses.less_forget import less_forget
from bsce_jax.losses.margin_ranking import margin_ranking
from bsce_jax.losses.nca import nca
from bsce_jax.losses.pod_spatial import pod_spatial
from bsce_jax.losses.rotation_ce import rotation_cross_entropy
from bsce_jax.losses.separated_softmax_ce import separated_softmax_cross_entropy
from bsce_jax.losses.sigmoid_bce import sigmoid_binary_cross_entropy
from bsce_jax.losses.softmax_ce import softmax_cross_entropy
from bsce_jax.losses.taskwise_kd import taskwise_distillation
from bsce_jax.losses.topology import topology

__all__ = [
    "colliding_effect",
    "columns_cross_entropy",
    "feature_mse",
    "geodesic",
    "geodesic_kernel",
    "knowledge_distillation",
    "less_forget",
    "margin_ranking",
    "nca",
    "pod_spatial",
    "rotation_cross_entropy",
    "separated_softmax_cross_entropy",
    "sigmoid_binary_cross_entropy",
    "softmax_cross_entropy",
    "taskwise_distillation",
    "topology",
]
