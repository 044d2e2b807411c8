"""BiC (Wu et al. 2019): a scale and a shift of the newest logits, learned last.

Sources: the authors' code for ImageNet, the paper for CIFAR-100. Distillation has no
T^2, so that its factor is 1 / T^2. The last phase learns from a tenth of each class's
exemplars, which no phase ever trains on, the base step's neither.
"""

from ml_collections import ConfigDict

from bsce_jax.config import only, phase


def configure(config: ConfigDict, dataset: str) -> None:
    """Sets the network, losses and training of a data set.

    Args:
      config: changed in place.
      dataset: "cifar100", "imagenet_subset", "imagenet" or "digits".
    """
    config.method = "bic"
    config.memory.selection, config.memory.held_out = "herding_raw", "once"
    config.terms = ConfigDict(
        {
            "softmax_ce": {"weight": "1-rho", "rescale": False},
            "kd": {"weight": "rho", "factor": 0.25, "temperature": 2.0},
            "shift_l2": {"weight": 0.1},
        }
    )
    config.phases = ("base", "incremental", "bias")
    base, later, optim = config.phase.base, config.phase.incremental, config.optim
    base.terms = ConfigDict({"softmax_ce": 1.0})
    later.terms = ConfigDict({"softmax_ce": "1-rho", "kd": "rho"})
    later.forward, later.rate.own = "forward", 0.0
    if dataset == "cifar100":
        config.model.name = "resnet32"
        base.epochs = later.epochs = 250
        base.milestones = later.milestones = (100, 150, 200)
        optim.batch_size, optim.weight_decay = 128, 2e-4
    elif dataset in ("imagenet_subset", "imagenet"):
        config.model.name = "resnet18"
        base.epochs = later.epochs = 100
        base.milestones = later.milestones = (30, 60, 80, 90)
        optim.batch_size, optim.weight_decay = 256, 1e-4
        optim.weight_decay_by_step = "groups/step"
    elif dataset == "digits":
        # Ours: the paper has no such data set.
        config.model.name, config.model.width = "resnet8", 16
        base.epochs, base.milestones = 20, (12, 17)
        later.epochs, later.milestones = 60, (36, 51)
        optim.batch_size, optim.weight_decay = 32, 2e-4
    else:
        raise ValueError(f"bic has no settings for {dataset!r}")
    config.phase.bias = phase(
        images="held_out",
        epochs=2 * later.epochs,
        milestones=tuple(2 * epoch for epoch in later.milestones),
        batch_norm="eval",
        augment=False,
        teacher="none",
        forward="forward",
        terms={"softmax_ce": 1.0, "shift_l2": 0.1},
        rate=only(own=1.0),
    )
