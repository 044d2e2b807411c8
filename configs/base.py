"""The configuration to start from: every field at its default, IL-Baseline's losses.

    python -m bsce_jax.main --config configs/base.py

docs/configuration.md says what each field means.
"""

from ml_collections import ConfigDict

from bsce_jax.config import default_config, method_module


def get_config() -> ConfigDict:
    """CIFAR-100, B50 with 5 steps, IL-Baseline with the softmax."""
    config = default_config()
    method_module(__file__, config.method).configure(config, "cifar100")
    return config
