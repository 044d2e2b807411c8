"""GeoDL (Simon et al. 2021) on LUCIR: a geodesic term in less-forget's place.

Source: the authors' code. Their README's factor is 10 (ImageNet-Subset, 10 steps); that
of CIFAR-100, 5, is LUCIR's. There is no margin ranking and no fine-tuning.
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
    config.method = "geodl"
    config.phases = ("base", "incremental")
    del config.phase.finetune
    factor = config.terms.less_forget.factor
    config.terms = ConfigDict(
        {
            "softmax_ce": {"weight": 1.0, "rescale": False},
            "geodesic": {"weight": "sqrt(old/new)", "factor": factor, "size": 2},
        }
    )
