"""TPCIL-like (after Tao et al. 2020): exemplars are vertices, whose topology is kept.

From the paper's description only; no code of it is public. The classification loss,
network and schedule are LUCIR's; the factor of the topology term and the size of the
second batch are our choices, not tuned.
"""

from ml_collections import ConfigDict

from bsce_jax.config import method_module


def configure(config: ConfigDict, dataset: str) -> None:
    """Sets the network, losses and training of a data set.

    Args:
      config: changed in place.
      dataset: "cifar100", "imagenet_subset", "imagenet" or "digits".
    """
    method_module(__file__, "lucir").configure(config, dataset)
    config.method = "tpcil_like"
    config.terms = ConfigDict(
        {
            "softmax_ce": {"weight": 1.0, "rescale": False},
            "topology": {"weight": 1.0, "factor": 10.0},
        }
    )
    config.phases = ("base", "incremental")
    del config.phase.finetune
    later = config.phase.incremental
    later.forward, later.beside = "forward", "memory"
    later.beside_size = 16 if dataset == "digits" else 64
