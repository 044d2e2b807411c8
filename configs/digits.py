"""Real 8x8 digits from scikit-learn: an incremental run in under two minutes on CPU.

    python -m bsce_jax.main --config configs/digits.py

A base step of 5 classes, then 5 steps of 1 class with 5 exemplars a class. Arguments:
method (a file of configs/methods/), prior, steps (5 or 1), memory (exemplars a class;
0 = none), seed, alpha, epsilon, for example configs/digits.py:method=lucir,prior=none.
"""

from ml_collections import ConfigDict

from bsce_jax.config import (
    COMMON_ARGUMENTS,
    apply_arguments,
    default_config,
    method_module,
)

ARGUMENTS = COMMON_ARGUMENTS | {"prior": "balanced", "memory": 5}


def get_config(argument: str | None = None) -> ConfigDict:
    """The default demonstration: IL-Baseline with BalancedS-CE."""
    config = default_config()
    config.data.name = "digits"
    config.data.nominal_per_class = 144
    config.data.padding = 1
    config.data.flip = False  # a mirrored digit is another sign
    config.data.mean = (0.5,)
    config.data.std = (0.5,)
    config.scenario.class_order = "natural"
    config.scenario.base_classes = 5
    apply_arguments(config, argument, ARGUMENTS)
    method_module(__file__, config.method).configure(config, "digits")
    config.model.conv_chunks = 1  # chunks do not pay for images this small
    return config
