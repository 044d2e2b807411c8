"""DDE on LUCIR (Hu et al. 2021): neighbours share a label, a mean's effect is removed.

Source: the authors' code (CIFAR-100, ImageNet-Subset and ImageNet scripts), which has
LUCIR's losses with the classification loss of DDE. It does not run without a memory:
that there is then neither margin ranking nor fine-tuning is our reading.
"""

from ml_collections import ConfigDict

from bsce_jax.config import method_module

NEIGHBOURS = {"imagenet": 1}  # 10 elsewhere
POOL = 10_000  # images of an epoch that may be neighbours, with over 500 classes


def configure(config: ConfigDict, dataset: str) -> None:
    """Sets the network, losses and training of a data set.

    Args:
      config: changed in place.
      dataset: "cifar100", "imagenet_subset", "imagenet" or "digits".
    """
    method_module(__file__, "lucir").configure(config, dataset)
    config.method = "lucir_dde"
    config.terms.dde_ce = config.terms.softmax_ce
    del config.terms.softmax_ce
    if dataset == "imagenet_subset":
        config.terms.less_forget.factor = 5.0
    add_neighbours(config, dataset)


def add_neighbours(config: ConfigDict, dataset: str) -> None:
    """Sets what DDE adds to the later phases, LUCIR's or (podnet_dde.py) PODNet's.

    Args:
      config: changed in place.
      dataset: see `configure`.
    """
    later = config.phase.incremental
    later.forward, later.beside = "forward", "companions"
    later.beside_size = NEIGHBOURS.get(dataset, 10)
    config.options.pool = POOL if dataset == "imagenet" else 0
    config.phase.finetune.forward = "forward"
