"""SPB-M (Wu et al. 2021): SPB with four heads on four rotations, in the base step too.

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
    config.method = "spb_m"
    config.model.head = "perspectives"
    for section in (config.phase.base, config.phase.incremental):
        section.forward = "forward"
