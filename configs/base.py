"""Every field at its default; bsce_jax/defaults.py says what each means."""

from ml_collections import ConfigDict

from bsce_jax.defaults import default_config


def get_config() -> ConfigDict:
    """CIFAR-100, B50 with 5 steps, IL-Baseline with the softmax."""
    return default_config()
