"""PODNet (Douillard et al. 2020): pooled outputs distillation, local similarity head.

Sources: the authors' code, the options of its "CNN" results; the fine-tuning of the
classifier is in the code only. Without a prior the classification loss is NCA, as
coded; a prior replaces it by softmax_ce and switches the fine-tuning off. PODNet's
authors also vary the brightness (data.brightness=0.247); Jodelet et al. crop and flip
only (section 4.1), and so do the configurations here. Choice: CIFAR-100 is normalised
by LUCIR's constants, as with all methods, where PODNet's code has others.
"""

from ml_collections import ConfigDict

from bsce_jax.config import only, phase


def configure(config: ConfigDict, dataset: str) -> None:
    """Sets the network, losses and training of a data set.

    Args:
      config: changed in place.
      dataset: "cifar100", "imagenet_subset", "imagenet" or "digits".
    """
    config.method = "podnet"
    config.model.head, config.model.proxies = "local_similarity", 10
    config.terms = ConfigDict(
        {
            "nca": {"weight": 1.0, "margin": 0.6, "exact": False, "rescale": False},
            "pod_spatial": {"weight": "sqrt(seen/new)", "factor": 3.0},
            "pod_flat": {"weight": "sqrt(seen/new)", "factor": 1.0},
        }
    )
    config.phases = ("base", "incremental", "finetune")
    config.phase.finetune = finetune = phase(
        images="exemplars", when_prior="none", epochs=20, rate=only(head=1.0)
    )
    base, later, optim = config.phase.base, config.phase.incremental, config.optim
    base.schedule = later.schedule = "cosine"
    base.milestones = later.milestones = ()
    later.rows = "new"
    optim.clip = 5.0
    if dataset == "cifar100":
        config.model.name = "podnet32"
        base.epochs = later.epochs = 160
        base.learning_rate = later.learning_rate = 0.1
        optim.batch_size, optim.weight_decay = 128, 5e-4
        finetune.learning_rate = 0.05
    elif dataset in ("imagenet_subset", "imagenet"):
        config.model.name = "podnet18"
        config.terms.pod_spatial.factor = 8.0
        config.terms.pod_flat.factor = 10.0
        base.epochs = later.epochs = 90
        base.learning_rate = later.learning_rate = 0.05
        optim.batch_size = 64
        optim.weight_decay = 5e-4 if dataset == "imagenet_subset" else 1e-4
        finetune.learning_rate = 0.01
    elif dataset == "digits":
        # Ours: the paper has no such data set.
        config.model.name, config.model.width = "podnet14", 16
        base.epochs, later.epochs = 20, 40
        base.learning_rate = later.learning_rate = 0.1
        optim.batch_size, optim.weight_decay = 32, 5e-4
        finetune.learning_rate = 0.05
    else:
        raise ValueError(f"podnet has no settings for {dataset!r}")
