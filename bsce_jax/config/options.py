"""The settings of a method, `config.options`: OPTIONS of its module by default."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from bsce_jax import methods
from bsce_jax.config.declare import Bounds, kind, refusal
from bsce_jax.errors import UserError, field_error


def defaults(method: str) -> ConfigDict:
    """All settings of a method at their defaults.

    Raises:
      UserError: there is no such method.
    """
    return ConfigDict(methods.options(method))


def filled_in(config: ConfigDict) -> ConfigDict:
    """All settings of the configured method: those given, else the defaults."""
    found = defaults(config.method)
    for name, value in config.options.items():
        found[name] = value
    return found


def check(config: ConfigDict) -> None:
    """Compares the settings given with those that the method has.

    Raises:
      UserError: an unknown name, or a value of a wrong type.
    """
    known = defaults(config.method)
    module = methods.module(config.method)
    for name, value in config.options.items():
        if name not in known:
            names = f"known to {config.method}: {', '.join(known) or 'none'}"
            raise UserError(f"config.options.{name} is unknown; {names}")
        check_value(f"options.{name}", value, known[name], limits(module, name))


def limits(module: ModuleType, name: str) -> Bounds | tuple[str, ...]:
    """LIMITS of a setting of a method or a term: its bounds, or what it may be."""
    return getattr(module, "LIMITS", {}).get(name, (None, None))


def check_value(
    name: str, value: Any, want: Any, limits: Bounds | tuple[str, ...]
) -> None:
    """Checks a setting of a method or of a term against its default and limits.

    Raises:
      UserError: it is of another type, not finite, or outside of its limits.
    """
    if isinstance(want, str) and limits != (None, None):
        wrong = "" if value in limits else f"one of {', '.join(map(str, limits))}"
    elif isinstance(value, Mapping):
        wrong = f"a value of type {kind(want)}"
    else:
        least, most = limits
        wrong = refusal(value, want, (least, most))  # type: ignore[arg-type]
    if wrong:
        raise field_error(name, value, wrong)
