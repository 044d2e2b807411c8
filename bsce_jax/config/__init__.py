"""What may be set, and what follows from it.

Configuration files in configs/ need the names below and no others.
"""

from bsce_jax.config.fields import default_config, only, phase
from bsce_jax.config.files import (
    COMMON_ARGUMENTS,
    apply_arguments,
    large_images,
    method_module,
    parse_arguments,
)

__all__ = [
    "COMMON_ARGUMENTS",
    "apply_arguments",
    "default_config",
    "large_images",
    "method_module",
    "only",
    "parse_arguments",
    "phase",
]
