"""What configuration files in configs/ are written with."""

import importlib.util
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from bsce_jax.config import options
from bsce_jax.errors import UserError


def parse_arguments(argument: str | None, allowed: Mapping[str, Any]) -> dict[str, Any]:
    """Parses a configuration file's string argument, `name=value,name=value`.

    Args:
      argument: what stands after the colon of `--config file.py:...`, or None.
      allowed: the names with their defaults; a value takes its default's type, a
        number where that is None, "not given".

    Returns:
      Every name of `allowed` with its value.

    Raises:
      UserError: an unknown name, or a value of the wrong type.
    """
    values = dict(allowed)
    for part in filter(None, (argument or "").split(",")):
        name, equals, text = part.partition("=")
        if not equals or name not in allowed:
            raise UserError(
                f"config argument {part!r}: expected name=value with name one of "
                + ", ".join(allowed)
            )
        default = allowed[name]
        kind = float if default is None else type(default)
        try:
            values[name] = kind(text)
        except ValueError:
            raise UserError(
                f"config argument {part!r}: {name} is {kind.__name__}"
            ) from None
    return values


# Arguments that configuration files have in common, with their defaults.
COMMON_ARGUMENTS: dict[str, Any] = {
    "method": "il_baseline",
    "prior": "none",
    "steps": 5,
    "memory": 20,
    "seed": 0,
    "alpha": 1.0,
    "epsilon": None,
}


_ARGUMENT_FIELDS = {
    "steps": "scenario.steps",
    "base_classes": "scenario.base_classes",
    "memory": "memory.per_class",
    "data": "data.name",
}


def apply_arguments(
    config: ConfigDict, argument: str | None, allowed: Mapping[str, Any]
) -> None:
    """Sets the fields that a configuration file's string argument names.

    memory is the number of exemplars a class, 0 for no memory. The method's options get
    their defaults; its losses and hyper-parameters are left for `method_module`.

    Args:
      config: changed in place.
      argument: see `parse_arguments`.
      allowed: the file's ARGUMENTS: those above, with defaults of its own.

    Raises:
      UserError: an unknown name, or a value of the wrong type.
    """
    given = parse_arguments(argument, allowed)
    config.update_from_flattened_dict(
        {
            _ARGUMENT_FIELDS.get(name, name): value
            for name, value in given.items()
            if value is not None
        }
    )
    if not given["memory"]:
        config.memory.kind = "none"
    config.options = options.defaults(config.method)


def large_images(
    config: ConfigDict, normalization: tuple[tuple[float, ...], tuple[float, ...]]
) -> None:
    """Sets what the runs on large photographs have in common: streamed, 224 pixels.

    Args:
      config: changed in place.
      normalization: mean and standard deviation of each channel.
    """
    data = config.data
    data.loading, data.image_size, data.resize = "streaming", 224, 256
    data.random_resized_crop, data.padding, data.flip = True, 0, True
    data.mean, data.std = normalization
    config.evaluation.batch_size = 256


def method_module(config_file: str, method: str) -> ModuleType:
    """Loads `methods/<method>.py` beside a configuration file.

    Raises:
      UserError: there is no such file.
    """
    folder = pathlib.Path(config_file).resolve().parent
    if folder.name != "methods":  # else one of the methods builds on another
        folder /= "methods"
    path = folder / f"{method}.py"
    known = sorted(p.stem for p in folder.glob("*.py"))
    if method not in known:
        raise UserError(f"method={method!r}: expected one of {', '.join(known)}")
    spec = importlib.util.spec_from_file_location(f"method_{method}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
