"""SLDA (Hayes and Kanan 2020): streaming LDA on a network fixed after the base step.

Jodelet et al. compare with it without memory (Table 3) and give no settings: the base
step is IL-Baseline's, so that both can share it.
"""

from ml_collections import ConfigDict

from bsce_jax.config import method_module


def configure(config: ConfigDict, dataset: str) -> None:
    """Sets the network, losses and training of a data set.

    Args:
      config: changed in place.
      dataset: "cifar100", "imagenet_subset", "imagenet" or "digits".
    """
    method_module(__file__, "il_baseline").configure(config, dataset)
    config.method = "slda"
    config.terms = ConfigDict({"softmax_ce": {"weight": 1.0, "rescale": False}})
    config.options.shrinkage = 1e-4
    config.phases = ("base",)
    del config.phase.incremental, config.phase.finetune
