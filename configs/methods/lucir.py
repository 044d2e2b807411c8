"""LUCIR (Hou et al. 2019): cosine head, less-forget, margin ranking, imprinted rows.

Sources: the authors' code, run.sh for CIFAR-100 and ImageNet-Subset and run_all.sh,
the only one with class-balanced fine-tuning, for ImageNet. The base step has the
classification loss alone.
"""

from ml_collections import ConfigDict

from bsce_jax.config import only, phase


def configure(config: ConfigDict, dataset: str) -> None:
    """Sets the network, losses and training of a data set.

    Args:
      config: changed in place.
      dataset: "cifar100", "imagenet_subset", "imagenet" or "digits".
    """
    config.method = "lucir"
    config.model.head = "cosine"
    config.model.final_relu = False
    config.terms = ConfigDict(
        {
            "softmax_ce": {"weight": 1.0, "rescale": False},
            "less_forget": {"weight": "sqrt(old/new)", "factor": 5.0},
            "margin_ranking": {"weight": 1.0, "k": 2, "margin": 0.5},
        }
    )
    config.phases = ("base", "incremental", "finetune")
    config.phase.finetune = finetune = phase(
        images="exemplars",
        when_prior="none",
        learning_rate=0.01,
        milestones=(10,),
        rate=only(head=1.0),
        batch_norm="eval",
    )
    base, later, optim = config.phase.base, config.phase.incremental, config.optim
    later.rows = "new"
    optim.batch_size = 128
    if dataset == "cifar100":
        config.model.name = "resnet32"
        base.epochs, base.milestones = 160, (80, 120)
        later.epochs, later.milestones = 160, (80, 120)
        optim.weight_decay = 5e-4
    elif dataset in ("imagenet_subset", "imagenet"):
        config.model.name = "resnet18"
        config.terms.less_forget.factor = 10.0
        base.epochs, base.milestones = 90, (30, 60)
        later.epochs, later.milestones = 90, (30, 60)
        optim.weight_decay = 1e-4
        finetune.epochs = 20 if dataset == "imagenet" else 0
    elif dataset == "digits":
        # Ours: the paper has no such data set.
        config.model.name, config.model.width = "resnet8", 16
        base.epochs, base.milestones = 20, (12, 17)
        later.epochs, later.milestones = 40, (24, 34)
        optim.batch_size, optim.weight_decay = 32, 5e-4
    else:
        raise ValueError(f"lucir has no settings for {dataset!r}")
