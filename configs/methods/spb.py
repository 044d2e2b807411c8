"""SPB (Wu et al. 2021): cross-entropy and feature distance, weighed by class numbers.

Source: the paper; there is no code. Its Eq. 1 has the softmax over the new classes only
(`terms.columns_ce.columns=new`); `seen` is the other reading. ImageNet has no settings
there: those of its subset are taken. SPB has no memory.
"""

from ml_collections import ConfigDict


def configure(config: ConfigDict, dataset: str) -> None:
    """Sets the network, losses and training of a data set.

    Args:
      config: changed in place.
      dataset: "cifar100", "imagenet_subset", "imagenet" or "digits".
    """
    config.method = "spb"
    config.model.head, config.model.final_relu = "cosine", False
    config.terms = ConfigDict(
        {
            "columns_ce": {"weight": "new/old", "columns": "new"},
            "feature_mse": {"weight": "old/new"},
        }
    )
    base, later, optim = config.phase.base, config.phase.incremental, config.optim
    later.learning_rate, later.rows = 1e-3, "new"
    later.epochs, later.milestones = 50, (30,)
    later.rate.head = later.rate.scale = later.rate.auxiliary = 10.0
    if dataset == "cifar100":
        config.model.name = "resnet32"
        base.epochs, base.milestones = 160, (80, 120)
        optim.batch_size, optim.weight_decay = 128, 5e-4
    elif dataset in ("imagenet_subset", "imagenet"):
        config.model.name = "resnet18"
        base.epochs, base.milestones = 90, (30, 60)
        optim.batch_size, later.batch_size, optim.weight_decay = 128, 64, 1e-4
    elif dataset == "digits":
        # Ours: the paper has no such data set.
        config.model.name, config.model.width = "resnet8", 16
        base.epochs, base.milestones = 20, (12, 17)
        optim.batch_size, optim.weight_decay = 32, 5e-4
    else:
        raise ValueError(f"spb has no settings for {dataset!r}")
