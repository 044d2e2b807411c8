"""DDE on PODNet (Hu et al. 2021): neighbours share a label, a mean's effect is removed.

No code of it was released in working form, so that this is our reading: DDE's
classification loss on the scaled similarities in NCA's place, PODNet's distillation
and fine-tuning as they are, and numbers of neighbours as on LUCIR.
"""

from ml_collections import ConfigDict

from bsce_jax.config import method_module


def configure(config: ConfigDict, dataset: str) -> None:
    """Sets the network, losses and training of a data set.

    Args:
      config: changed in place.
      dataset: "cifar100", "imagenet_subset", "imagenet" or "digits".
    """
    method_module(__file__, "podnet").configure(config, dataset)
    config.method = "podnet_dde"
    del config.terms.nca
    config.terms.dde_ce = ConfigDict({"weight": 1.0, "rescale": False})
    method_module(__file__, "lucir_dde").add_neighbours(config, dataset)
