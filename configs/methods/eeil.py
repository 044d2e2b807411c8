"""EEIL (Castro et al. 2018): distillation head by head, balanced fine-tuning.

Source: the authors' code (Matlab). Their twelve views of every image are twelve epochs
of random crops and flips here. A prior takes the place of the balanced fine-tuning.
"""

from ml_collections import ConfigDict

from bsce_jax.config import phase

VIEWS = 12


def configure(config: ConfigDict, dataset: str) -> None:
    """Sets the network, losses and training of a data set.

    Args:
      config: changed in place.
      dataset: "cifar100", "imagenet_subset", "imagenet" or "digits".
    """
    config.method = "eeil"
    config.terms = ConfigDict(
        {
            "softmax_ce": {"weight": 1.0, "rescale": False},
            "taskwise_kd": {"weight": 1.0, "temperature": 2.0, "squared": False},
        }
    )
    config.phases = ("base", "incremental", "balanced")
    base, later, optim = config.phase.base, config.phase.incremental, config.optim
    config.phase.balanced = balanced = phase(
        images="exemplars", when_prior="none", teacher="now", learning_rate=0.01
    )
    optim.batch_size, optim.weight_decay = 128, 1e-4
    optim.noise, optim.noise_epochs = 0.3, VIEWS
    if dataset in ("cifar100", "imagenet_subset", "imagenet"):
        config.model.name = "resnet32" if dataset == "cifar100" else "resnet18"
        first = 100 if dataset == "cifar100" else 60
        base.epochs, base.milestones = VIEWS * first, _every(VIEWS * first // 4, 3)
        later.epochs, later.milestones = VIEWS * 40, _every(VIEWS * 10, 3)
        balanced.epochs, balanced.milestones = VIEWS * 30, _every(VIEWS * 10, 2)
    elif dataset == "digits":
        # Ours: the paper has no such data set. Few updates: noise as of late epochs.
        config.model.name, config.model.width = "resnet8", 16
        base.epochs, base.milestones = 20, (12, 17)
        later.epochs, later.milestones = 40, (24, 34)
        balanced.epochs, balanced.milestones = 30, (10, 20)
        optim.batch_size, optim.noise_epochs = 32, 1
    else:
        raise ValueError(f"eeil has no settings for {dataset!r}")


def _every(epochs: int, times: int) -> tuple[int, ...]:
    return tuple(epochs * time for time in range(1, times + 1))
