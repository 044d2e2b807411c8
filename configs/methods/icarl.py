"""iCaRL (Rebuffi et al. 2017): sigmoid outputs, nearest mean of exemplars.

Sources: the authors' code (Theano for CIFAR-100, TensorFlow for ImageNet). Its L2 term
is 1e-5 times the sum of the squared weights in Theano, so that the weight decay is
2e-5, and half of that sum in TensorFlow. Features have no last ReLU. The loss is
divided by the number of all classes, which their learning rate of 2 goes with: with
that of the classes seen (inclearn) training suffers; see docs/methods.md. iCaRL's
budget is fixed (`--config.memory.kind=fixed`); in Table 1 it grows.
"""

from ml_collections import ConfigDict


def configure(config: ConfigDict, dataset: str) -> None:
    """Sets the network, losses and training of a data set.

    Args:
      config: changed in place.
      dataset: "cifar100", "imagenet_subset", "imagenet" or "digits".
    """
    config.method = "icarl"
    config.model.final_relu = False
    config.terms = ConfigDict({"sigmoid_bce": {"weight": 1.0, "outputs": "all"}})
    base, later, optim = config.phase.base, config.phase.incremental, config.optim
    base.learning_rate = later.learning_rate = 2.0
    base.decay = later.decay = 0.2
    optim.decayed = "kernels"
    if dataset == "cifar100":
        config.model.name, config.model.shortcut = "resnet32", "A"
        base.epochs = later.epochs = 70
        base.milestones = later.milestones = (49, 63)
        optim.batch_size, optim.weight_decay = 128, 2e-5
    elif dataset in ("imagenet_subset", "imagenet"):
        config.model.name = "resnet18"
        base.epochs = later.epochs = 60
        base.milestones = later.milestones = (20, 30, 40, 50)
        optim.batch_size, optim.weight_decay = 128, 1e-5
    elif dataset == "digits":
        # Ours: the paper has no such data set.
        config.model.name, config.model.width = "resnet8", 16
        base.epochs, base.milestones = 20, (12, 17)
        later.epochs, later.milestones = 40, (24, 34)
        optim.batch_size, optim.weight_decay = 32, 2e-5
    else:
        raise ValueError(f"icarl has no settings for {dataset!r}")
