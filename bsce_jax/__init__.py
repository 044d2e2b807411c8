"""Balanced Softmax for class-incremental learning, in JAX (Jodelet et al.)."""

from typing import TYPE_CHECKING

from bsce_jax import log_prior, losses, memory, meta_alpha, metrics, scenario

if TYPE_CHECKING:
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
    # Loaded late: they need checkpoints and files, the functions above only arrays.
    if name in ("Predictor", "load"):
        from bsce_jax import predict

        return getattr(predict, name)
    raise AttributeError(f"module 'bsce_jax' has no attribute {name!r}")
