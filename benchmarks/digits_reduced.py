"""The smallest run that takes the arguments of configs/cifar100.py: for --reduced.

On scikit-learn's digits, with a base step of 8 classes and one more step; nothing about
its accuracies means anything.
"""

import pathlib

from ml_collections import ConfigDict

from bsce_jax.config import (
    COMMON_ARGUMENTS,
    apply_arguments,
    default_config,
    method_module,
)

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"


def get_config(argument: str | None = None) -> ConfigDict:
    """Digits, one epoch a step; steps are not those of the argument."""
    config = default_config()
    apply_arguments(config, argument, COMMON_ARGUMENTS)
    config.data.name, config.data.max_per_class = "digits", 40
    config.data.mean, config.data.std = (0.5,), (0.5,)
    config.data.padding, config.data.flip = 1, False
    config.scenario.class_order = "natural"
    config.scenario.base_classes, config.scenario.steps = 8, 1
    config.memory.per_class = min(config.memory.per_class, 5)
    method_module(str(CONFIGS / "x.py"), config.method).configure(config, "digits")
    config.model.width, config.model.conv_chunks = 4, 1
    for phase in config.phase.values():
        phase.epochs, phase.milestones = min(phase.epochs, 1), ()
    return config
