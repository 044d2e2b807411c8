"""A reduced CIFAR-100 B50 run that shows the paper's effect on two CPU cores.

    python -m bsce_jax.main --config configs/cifar100_cpu.py:prior=balanced

What is cut against configs/cifar100.py: images of 16x16 pixels instead of 32x32, the
first 100 training images of each class instead of 500, 5 exemplars a class instead of
20 (so that old and new classes are as unbalanced as there), 20 layers instead of 32, 40
epochs in the base step and 20 in the others instead of 250 or 160. Test images are all
10,000, at 16x16. So the accuracies are far below the paper's; the comparison between
priors is the point. Measured results: docs/results.md.

Arguments: method, prior, steps, memory (exemplars a class; 0 = none), seed, alpha,
epsilon (images; else the paper's 0.2 %, 0.2).
"""

from ml_collections import ConfigDict

from bsce_jax.config import (
    COMMON_ARGUMENTS,
    apply_arguments,
    default_config,
    method_module,
)

# Epochs and milestones of phases that are longer, by their images and steps.
LENGTHS = {
    ("training", "base"): (40, (20, 30)),
    ("training", "later"): (20, (10, 15)),
    ("held_out", "later"): (40, (20, 30)),
    ("exemplars", "later"): (20, (7, 14)),
}
ARGUMENTS = COMMON_ARGUMENTS | {"prior": "balanced", "memory": 5}


def get_config(argument: str | None = None) -> ConfigDict:
    """CIFAR-100 at 16x16, 100 images a class."""
    config = default_config()
    config.data.name = "cifar100"
    config.data.image_size = 16
    config.data.padding = 2
    config.data.max_per_class = 100
    config.data.nominal_per_class = 100
    config.scenario.base_classes = 50
    apply_arguments(config, argument, ARGUMENTS)
    method_module(__file__, config.method).configure(config, "cifar100")
    config.model.name = config.model.name.replace("32", "20")
    config.optim.noise_epochs = 1
    for phase in config.phase.values():
        epochs, milestones = LENGTHS[phase.images, phase.steps]
        if phase.epochs > epochs:
            phase.epochs, phase.milestones = epochs, milestones
    return config
