"""What configuration files in configs/ are written with."""

import importlib.machinery
import importlib.util
import pathlib
import traceback
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from bsce_jax.config import options
from bsce_jax.errors import UserError, one_line

PACKAGE = pathlib.Path(__file__).resolve().parents[2]  # what holds bsce_jax


class ChoicesRequested(Exception):
    """An argument's value is "?": its name, and the file's arguments (`args`)."""


def load(given: str) -> ConfigDict:
    """The configuration of FILE[:ARGUMENTS].

    Raises:
      UserError: there is no such file, or it gives no configuration.
      ChoicesRequested: an argument is "?".
    """
    name, _, argument = given.partition(":")
    path = pathlib.Path(name).expanduser()
    try:
        if not path.is_file():
            raise UserError(f"--config={name}: there is no such file")
        module = _module("config_file", path)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserError(f"--config={name}: expected a function get_config in it")
        found = get_config(argument) if argument else get_config()
    except (UserError, ChoicesRequested):
        raise
    except Exception as error:  # whatever somebody's own file may raise
        raise UserError(f"--config={name} fails: {_reason(error, path)}") from error
    if not isinstance(found, ConfigDict):
        kind = type(found).__name__
        raise UserError(f"--config={name}: get_config gives {kind}, not a ConfigDict")
    return found


def _module(name: str, path: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_loader(
        name, importlib.machinery.SourceFileLoader(name, str(path))
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _reason(error: Exception, path: pathlib.Path) -> str:
    """What an error says, and the line of the file where it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if f.filename == str(path)]
    if isinstance(error, SyntaxError):
        text, lines = error.msg, [error.lineno]
    else:
        text = one_line(error)
    where = f", line {lines[-1]}" if lines and lines[-1] else ""
    return f"{type(error).__name__}: {text}{where}"


def parse_arguments(argument: str | None, allowed: Mapping[str, Any]) -> dict[str, Any]:
    """Parses a configuration file's string argument, `name=value,name=value`.

    Args:
      argument: what stands after the colon of `--config file.py:...`, or None.
      allowed: the names with their defaults; a value takes its default's type, a
        number where that is None, "not given".

    Returns:
      Every name of `allowed` with its value.

    Raises:
      UserError: an unknown name, one given twice, a value of the wrong type, or one
        that the prior does not read.
      ChoicesRequested: a value is "?".
    """
    values, seen = dict(allowed), set()
    for part in filter(None, (argument or "").split(",")):
        name, equals, text = part.partition("=")
        if text == "?":
            raise ChoicesRequested(name, allowed)
        if not equals or name not in allowed:
            raise UserError(
                f"config argument {part!r}: expected name=value with name one of "
                + ", ".join(allowed)
            )
        if name in seen:
            raise UserError(f"config argument {part!r}: expected each name once")
        seen.add(name)
        default = allowed[name]
        kind = float if default is None else type(default)
        try:
            values[name] = kind(text)
        except ValueError:
            raise UserError(
                f"config argument {part!r}: {name} is {kind.__name__}"
            ) from None
    for name, prior in READ_BY.items():
        if name in seen and values.get("prior") != prior:
            raise UserError(
                f"config argument '{name}={values[name]:g}': expected prior={prior}, "
                f"which alone reads {name}, not prior={values.get('prior')}"
            )
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


# Arguments that only one prior reads.
READ_BY = {"alpha": "weighted", "epsilon": "relaxed"}
ARGUMENT_FIELDS = {
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
            ARGUMENT_FIELDS.get(name, name): value
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

    Training crops a random part of the image and resizes it (RandomResizedCrop), as the
    codes of LUCIR and PODNet: a choice, since the paper says crop alone.

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
    """Loads `methods/<method>.py` beside a configuration file, or that of configs/.

    Raises:
      UserError: there is no such file.
    """
    folder = pathlib.Path(config_file).resolve().parent
    if folder.name != "methods":  # else one of the methods builds on another
        folder /= "methods"
    folders = [folder]
    folders += [root / "configs" / "methods" for root in (PACKAGE, pathlib.Path.cwd())]
    found = {p.stem: p for f in reversed(folders) for p in sorted(f.glob("*.py"))}
    if method not in found:
        looked = " or ".join(map(str, dict.fromkeys(folders)))
        known = ", ".join(sorted(found)) or f"a file in {looked}, where there is none"
        raise UserError(f"config.method={method!r}: expected one of {known}")
    return _module(f"method_{method}", found[method])
