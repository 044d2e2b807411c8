"""CIFAR-100, B50: a base step of 50 classes, then 5, 10 or 25 incremental steps.

    python -m bsce_jax.main --config configs/cifar100.py:prior=balanced,steps=5

Arguments: method (a file of configs/methods/), prior, steps, memory (exemplars a
class; 0 = none), seed, for prior=weighted alpha, for prior=relaxed epsilon (images;
else the paper's 0.2 %, 1), and short, by which all epochs and milestones are divided:
the paper's protocol but for its length. Hyper-parameters are those of the methods'
authors (configs/methods/). Expected average incremental accuracy for steps=5 (Jodelet
et al., Tables 1 and 3):

    method        none    balanced  meta    memory=0: none  balanced  relaxed
    il_baseline   43.80   62.22     64.11
    lucir         63.37   64.83             43.71           54.68     59.43
    podnet        64.46   67.77             41.85           63.31     65.66

The data set is prepared once by

    python -m bsce_jax.data.prepare cifar100
"""

from ml_collections import ConfigDict

from bsce_jax.config import (
    COMMON_ARGUMENTS,
    apply_arguments,
    default_config,
    method_module,
)

ARGUMENTS = COMMON_ARGUMENTS | {"short": 1}


def get_config(argument: str | None = None) -> ConfigDict:
    """The paper's CIFAR-100 setting."""
    config = default_config()
    config.data.name = "cifar100"
    config.data.nominal_per_class = 500
    config.scenario.base_classes = 50
    apply_arguments(config, argument, ARGUMENTS)
    method_module(__file__, config.method).configure(config, "cifar100")
    return config
