"""IL-Baseline (Jodelet et al., section 3.1): distillation and cross-entropy, Eq. 1.

Sources of the hyper-parameters: the paper, section 4.1; they are BiC's. Choice: Meta's
inner step has rate 1, since Algorithm 1 gives no rate: docs/results.md says what else
was tried.
Balanced fine-tuning, a row of Table 6, has no settings in the paper: those are LUCIR's.
"""

from ml_collections import ConfigDict

from bsce_jax.config import only, phase


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
    config.phases = ("base", "incremental", "finetune")
    config.phase.finetune = phase(
        images="exemplars",
        when_prior="none",
        learning_rate=0.01,
        milestones=(10,),
        rate=only(head=1.0),
        batch_norm="eval",
    )
    base, later, optim = config.phase.base, config.phase.incremental, config.optim
    if dataset == "cifar100":
        config.model.name = "resnet32"
        base.epochs, base.milestones = 250, (100, 150, 200)
        later.epochs, later.milestones = 250, (100, 150, 200)
        optim.batch_size, optim.weight_decay = 128, 2e-4
    elif dataset in ("imagenet_subset", "imagenet"):
        config.model.name = "resnet18"
        base.epochs, base.milestones = 100, (30, 60, 80, 90)
        later.epochs, later.milestones = 100, (30, 60, 80, 90)
        optim.batch_size, optim.weight_decay = 256, 1e-4
    elif dataset == "digits":
        # Ours: the paper has no such data set.
        config.model.name, config.model.width = "resnet8", 16
        base.epochs, base.milestones = 20, (12, 17)
        later.epochs, later.milestones = 60, (36, 51)
        optim.batch_size, optim.weight_decay = 32, 2e-4
    else:
        raise ValueError(f"il_baseline has no settings for {dataset!r}")
