"""SPB-I (Wu et al. 2021): SPB with the prediction of rotations, in the base step too.

Source: the paper; there is no code. See configs/methods/spb.py.
"""

from ml_collections import ConfigDict

from bsce_jax.config import method_module


def configure(config: ConfigDict, dataset: str) -> None:
    """Sets the network, losses and training of a data set.

    Args:
      config: changed in place.
      dataset: "cifar100", "imagenet_subset", "imagenet" or "digits".
    """
    method_module(__file__, "spb").configure(config, dataset)
    config.method = "spb_i"
    config.model.auxiliary = 4
    config.terms.rotation_ce = ConfigDict({"weight": 1.0})
    for section in (config.phase.base, config.phase.incremental):
        section.forward = "rotated"
