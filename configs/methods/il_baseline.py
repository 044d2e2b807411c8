"""IL-Baseline (Jodelet et al., section 3.1): rho * Eq. 2 + (1 - rho) * Eq. 1.

Sources of the hyper-parameters: the paper, section 4.1; they are BiC's. Meta's inner
step has rate 1, as Algorithm 1 is printed: docs/results.md says what else was tried.
"""

from ml_collections import ConfigDict


def configure(config: ConfigDict, dataset: str) -> None:
    """Sets the network, losses and training of a data set.

    Args:
      config: changed in place.
      dataset: "cifar100", "imagenet_subset", "imagenet" or "digits".
    """
    config.method = "il_baseline"
    config.terms = ConfigDict(
        {
            "softmax_ce": {"weight": "1-rho", "rescale": False},
            "kd": {"weight": "rho", "temperature": 2.0},
        }
    )
    config.meta.inner_learning_rate = 1.0
    optim = config.optim
    if dataset == "cifar100":
        config.model.name = "resnet32"
        optim.epochs, optim.milestones = 250, (100, 150, 200)
        optim.batch_size, optim.weight_decay = 128, 2e-4
    elif dataset in ("imagenet_subset", "imagenet"):
        config.model.name = "resnet18"
        optim.epochs, optim.milestones = 100, (30, 60, 80, 90)
        optim.batch_size, optim.weight_decay = 256, 1e-4
    elif dataset == "digits":
        # Ours: the paper has no such data set.
        config.model.name, config.model.width = "resnet8", 16
        optim.base_epochs, optim.base_milestones = 20, (12, 17)
        optim.epochs, optim.milestones = 60, (36, 51)
        optim.batch_size, optim.weight_decay = 32, 2e-4
    else:
        raise ValueError(f"il_baseline has no settings for {dataset!r}")
