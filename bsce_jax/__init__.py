"""Balanced Softmax for class-incremental learning, in JAX (Jodelet et al.)."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bsce_jax import log_prior, losses, memory, meta_alpha, metrics, scenario
    from bsce_jax.predict import Predictor, load

__all__ = [
    "Predictor",
    "load",
    "log_prior",
    "losses",
    "memory",
    "meta_alpha",
    "metrics",
    "scenario",
]


def __getattr__(name: str) -> object:
    # Loaded when they are used: JAX takes a second, in which Ctrl-C must work.
    if name in ("Predictor", "load"):
        return getattr(importlib.import_module("bsce_jax.predict"), name)
    if name in __all__:
        return importlib.import_module(f"bsce_jax.{name}")
    raise AttributeError(f"module 'bsce_jax' has no attribute {name!r}")
