"""Mnemonics (Liu et al. 2020) on LUCIR: exemplars are learned when a step is trained.

From the first incremental step on convolutions are fixed but for a factor of each
kernel, as in the authors' code. What the exemplars are learned by is our reading of the
paper (docs/methods.md): in the code that was released they cannot move. The rate of
their pixels is ours.
"""

from ml_collections import ConfigDict

from bsce_jax.config import method_module, only, phase


def configure(config: ConfigDict, dataset: str) -> None:
    """Sets the network, losses and training of a data set.

    Args:
      config: changed in place.
      dataset: "cifar100", "imagenet_subset", "imagenet" or "digits".
    """
    method_module(__file__, "lucir").configure(config, dataset)
    config.method = "mnemonics"
    config.model.kernel_scales = True
    config.terms.mnemonics_halves = ConfigDict({"weight": 1.0})
    base, later = config.phase.base, config.phase.incremental
    base.terms = ConfigDict({"softmax_ce": 1.0})
    later.terms = ConfigDict(
        {"softmax_ce": 1.0, "less_forget": "sqrt(old/new)", "margin_ranking": 1.0}
    )
    base.rate.kernel_scales = base.rate.own = 0.0
    later.rate.convolutions = later.rate.own = 0.0
    del config.phase.finetune
    config.phases = ("base", "base_exemplars", "incremental", "exemplars")
    for name, steps in (("base_exemplars", "base"), ("exemplars", "later")):
        config.phase[name] = phase(
            steps=steps,
            epochs=1,
            learning_rate=1.0,
            rate=only(own=1.0),
            batch_norm="eval",
            teacher="none",
            begin="start",
            forward="unrolled",
            terms={"softmax_ce": 1.0}
            | ({"mnemonics_halves": 1.0} if steps == "later" else {}),
        )
