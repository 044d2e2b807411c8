"""The smallest run that takes the arguments of configs/cifar100.py: for --reduced.

On scikit-learn's digits, with a base step of 8 classes and one more step; nothing about
its accuracies means anything.
"""

import pathlib

from ml_collections import ConfigDict

from bsce_jax.config import method_module, parse_arguments
from bsce_jax.defaults import default_config

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
ARGUMENTS = {
    "method": "il_baseline",
    "prior": "none",
    "steps": 5,
    "memory": 20,
    "seed": 0,
    "alpha": 1.0,
    "epsilon": 0.0,
}


def get_config(argument: str | None = None) -> ConfigDict:
    """Digits, one epoch a step."""
    given = parse_arguments(argument, ARGUMENTS)
    config = default_config()
    config.data.name, config.data.max_per_class = "digits", 40
    config.data.mean, config.data.std = (0.5,), (0.5,)
    config.data.padding, config.data.flip = 1, False
    config.scenario.class_order = "natural"
    config.scenario.base_classes, config.scenario.steps = 8, 1
    config.memory.kind = "growing" if given["memory"] else "none"
    config.memory.per_class = 5 if given["memory"] else 0
    for name in ("prior", "seed", "alpha", "epsilon"):
        config[name] = given[name]
    method_module(str(CONFIGS / "x.py"), given["method"]).configure(config, "digits")
    config.model.width, config.model.conv_chunks = 4, 1
    optim = config.optim
    optim.base_epochs = optim.epochs = 1
    optim.base_milestones = optim.milestones = ()
    config.finetune.epochs = min(config.finetune.epochs, 1)
    return config
