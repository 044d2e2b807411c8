"""Resolves and validates a configuration: one clear line for each mistake."""

import hashlib
import importlib.util
import inspect
import json
import math
import pathlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from bsce_jax import losses
from bsce_jax.defaults import default_config
from bsce_jax.errors import UserError

# Named weights of loss terms, as functions of the numbers of old and seen classes.
TERM_WEIGHTS = {
    "rho": lambda old, seen: old / seen,  # Jodelet et al., section 3.1
    "1-rho": lambda old, seen: 1.0 - old / seen,
}
CHOICES: dict[str, tuple[str, ...]] = {
    "prior": ("none", "balanced", "weighted", "meta", "relaxed"),
    "epsilon_unit": ("count", "percent"),
    "parallel": ("jit", "pmap"),
    "matmul_precision": ("default", "high", "highest"),
    "scenario.subset": ("all", "first100", "lucir"),
    "memory.kind": ("growing", "fixed", "none"),
    "memory.selection": ("herding", "random"),
    "model.shortcut": ("A", "B"),
    "model.stem": ("7x7", "3x3"),
    "model.head": ("linear",),
    "model.dtype": ("float32", "bfloat16"),
    "meta.optimizer": ("sgd", "adam"),
    "meta.batch_norm": ("train", "eval"),
}
# Inclusive lower and upper bounds; None = no bound.
BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "seed": (0, 2**31 - 1),
    "alpha": (1e-12, None),
    "epsilon": (0, None),
    "updates_per_call": (0, None),
    "log_seconds": (0, None),
    "data.image_size": (0, None),
    "data.max_per_class": (0, None),
    "data.nominal_per_class": (1, None),
    "data.validation_fraction": (0, 0.9),
    "data.padding": (0, None),
    "data.brightness": (0, 1),
    "scenario.base_classes": (0, None),
    "scenario.steps": (1, None),
    "memory.per_class": (0, None),
    "memory.budget": (0, None),
    "model.width": (0, None),
    "model.conv_chunks": (0, None),
    "optim.epochs": (1, None),
    "optim.batch_size": (1, None),
    "optim.learning_rate": (0, None),
    "optim.momentum": (0, 1),
    "optim.weight_decay": (0, None),
    "optim.decay": (0, 1),
    "optim.base_epochs": (0, None),
    "optim.base_learning_rate": (0, None),
    "meta.every": (1, None),
    "meta.fraction": (0, 0.5),
    "meta.batch_size": (1, None),
    "meta.inner_learning_rate": (0, None),
    "meta.learning_rate": (0, None),
    "meta.minimum": (1e-12, None),
    "meta.maximum": (1e-12, None),
    "evaluation.batch_size": (1, None),
    "checkpoint.minutes": (0, None),
    "checkpoint.keep": (1, None),
}
# Fields that cannot change a run's results: not part of its hash.
NOT_HASHED = (
    "name",
    "print_plan",
    "log_seconds",
    "compile_cache",
    "init_from",
    "checkpoint",
    "data.data_dir",
)


def parse_arguments(argument: str | None, allowed: Mapping[str, Any]) -> dict[str, Any]:
    """Parses a configuration file's string argument, `name=value,name=value`.

    Args:
      argument: what stands after the colon of `--config file.py:...`, or None.
      allowed: the names with their defaults; a value takes its default's type.

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
        try:
            values[name] = type(allowed[name])(text)
        except ValueError:
            kind = type(allowed[name]).__name__
            raise UserError(f"config argument {part!r}: {name} is {kind}") from None
    return values


def method_module(config_file: str, method: str) -> ModuleType:
    """Loads `methods/<method>.py` beside a configuration file.

    Raises:
      UserError: there is no such file.
    """
    folder = pathlib.Path(config_file).resolve().parent / "methods"
    path = folder / f"{method}.py"
    known = sorted(p.stem for p in folder.glob("*.py"))
    if method not in known:
        raise UserError(f"method={method!r}: expected one of {', '.join(known)}")
    spec = importlib.util.spec_from_file_location(f"method_{method}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns a validated copy with everything derived filled in.

    Runs after the command line's overrides. Derived: the name, the base step's
    training lengths, numeric weights of terms.

    Raises:
      UserError: a field is missing, unknown, of a wrong type or out of range.
    """
    validate(config)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        if config.optim.base_epochs == 0:
            config.optim.base_epochs = config.optim.epochs
            config.optim.base_milestones = config.optim.milestones
        if config.optim.base_learning_rate == 0:
            config.optim.base_learning_rate = config.optim.learning_rate
        if not config.name:
            config.name = _default_name(config)
    return config


def _default_name(config: ConfigDict) -> str:
    parts = [config.data.name, config.method, config.prior]
    if config.prior == "weighted":
        parts[-1] += f"{config.alpha:g}"
    if config.prior == "relaxed":
        unit = "pc" if config.epsilon_unit == "percent" else ""
        parts[-1] += f"{config.epsilon:g}{unit}"
    return "-".join([*parts, f"{config.scenario.steps}steps"])


def validate(config: ConfigDict) -> None:
    """Checks names, types, choices and ranges of all fields.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    _check_fields(config.to_dict(), default_config().to_dict(), "")
    _check_terms(config.terms)
    fields = flatten(config)
    for name, allowed in CHOICES.items():
        if fields[name] not in allowed:
            raise _error(name, fields[name], f"one of {', '.join(allowed)}")
    for name, (low, high) in BOUNDS.items():
        value = fields[name]
        if low is not None and value < low:
            raise _error(name, value, f"at least {low}")
        if high is not None and value > high:
            raise _error(name, value, f"at most {high}")
    _check_together(config)


def _check_fields(given: Mapping[str, Any], expected: Mapping, prefix: str) -> None:
    for name in expected.keys() - given.keys():
        raise UserError(f"config.{prefix}{name} is missing")
    for name, value in given.items():
        if name not in expected:
            names = ", ".join(sorted(expected))
            raise UserError(f"config.{prefix}{name} is unknown; known: {names}")
        want = expected[name]
        if prefix + name == "terms":
            continue
        if isinstance(want, dict) != isinstance(value, dict):
            kind = "a section" if isinstance(want, dict) else type(want).__name__
            raise _error(prefix + name, value, kind)
        if isinstance(want, dict):
            _check_fields(value, want, f"{prefix}{name}.")
        elif not _same_type(value, want):
            raise _error(prefix + name, value, f"a value of type {type(want).__name__}")
        elif not _finite(value):
            raise _error(prefix + name, value, "finite numbers")


def _same_type(value: Any, want: Any) -> bool:
    if isinstance(want, bool) or isinstance(value, bool):
        return isinstance(want, bool) and isinstance(value, bool)
    if isinstance(want, tuple):
        return isinstance(value, tuple) and all(
            isinstance(v, int | float) and not isinstance(v, bool) for v in value
        )
    if isinstance(want, float):
        return isinstance(value, int | float)
    return isinstance(value, type(want))


def _finite(value: Any) -> bool:
    """Whether there is neither NaN nor an infinity in a value."""
    values = value if isinstance(value, tuple) else (value,)
    return all(math.isfinite(v) for v in values if isinstance(v, float))


def _check_terms(terms: Any) -> None:
    if not isinstance(terms, ConfigDict) or not terms:
        raise _error("terms", terms, "a section of loss terms, at least one")
    known = sorted(module.name for module in pkgutil.iter_modules(losses.__path__))
    for name, term in terms.items():
        if name not in known:
            raise UserError(
                f"config.terms.{name} is unknown; losses: {', '.join(known)}"
            )
        if not isinstance(term, ConfigDict) or "weight" not in term:
            raise _error(f"terms.{name}", term, "a section with a weight")
        term_weight(name, term.weight, old=1, seen=2)
        _check_options(name, {k: v for k, v in term.items() if k != "weight"})


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Compares a term's options with the keyword arguments of its function."""
    known = {
        parameter.name: parameter.default
        for parameter in inspect.signature(term_module(name).term).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for option, value in options.items():
        if option not in known:
            names = ", ".join(["weight", *known])
            raise UserError(f"config.terms.{name}.{option} is unknown; known: {names}")
        want = known[option]
        if not (_same_type(value, want) and _finite(value)):
            kind = f"a finite value of type {type(want).__name__}"
            raise _error(f"terms.{name}.{option}", value, kind)


def term_module(name: str) -> ModuleType:
    """The module of a loss term, from `bsce_jax.losses`."""
    return importlib.import_module(f"{losses.__name__}.{name}")


def in_base_step(name: str) -> bool:
    """Whether a term has a place in the base step, where no class is old."""
    return not getattr(term_module(name), "NEEDS_OLD_CLASSES", False)


def term_weight(name: str, weight: str | float, old: int, seen: int) -> float:
    """A term's weight in a step with `old` old and `seen` seen classes.

    Raises:
      UserError: not a number and not a name of TERM_WEIGHTS.
    """
    if isinstance(weight, str) and weight in TERM_WEIGHTS:
        return float(TERM_WEIGHTS[weight](old, seen))
    try:
        number = math.nan if isinstance(weight, bool) else float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        names = ", ".join(TERM_WEIGHTS)
        raise _error(f"terms.{name}.weight", weight, f"a number or {names}")
    return number


def _check_together(config: ConfigDict) -> None:
    """Checks that involve several fields."""
    data, meta, memory, optim = config.data, config.meta, config.memory, config.optim
    if len(data.mean) != len(data.std) or not all(s > 0 for s in data.std):
        raise _error("data.std", data.std, f"{len(data.mean)} positive numbers")
    if meta.minimum > meta.maximum:
        raise _error("meta.minimum", meta.minimum, f"at most {meta.maximum}")
    for name, milestones in (
        ("optim.milestones", optim.milestones),
        ("optim.base_milestones", optim.base_milestones),
    ):
        if list(milestones) != sorted(milestones) or any(m <= 0 for m in milestones):
            raise _error(name, milestones, "epochs above 0 in ascending order")
    if config.prior == "meta" and memory.kind == "none":
        raise _error("prior", "meta", "another prior where memory.kind is none")
    if config.prior != "none" and "softmax_ce" not in config.terms:
        raise _error("prior", config.prior, "none: no softmax_ce among the terms")
    if config.prior == "relaxed" and config.epsilon == 0 and memory.kind != "none":
        raise _error("epsilon", 0.0, "above 0: exemplars are labels of old classes")
    if config.prior == "meta" and memory.kind == "growing" and memory.per_class < 2:
        raise _error("memory.per_class", memory.per_class, "at least 2 for prior=meta")


def _error(name: str, value: Any, allowed: str) -> UserError:
    shown = value.to_dict() if isinstance(value, ConfigDict) else value
    return UserError(f"config.{name}={shown!r}: expected {allowed}")


def flatten(config: ConfigDict) -> dict[str, Any]:
    """The configuration as one dict with dotted names."""
    flat: dict[str, Any] = {}

    def visit(section: Mapping[str, Any], prefix: str) -> None:
        for name, value in section.items():
            if isinstance(value, Mapping):
                visit(value, f"{prefix}{name}.")
            else:
                flat[prefix + name] = list(value) if type(value) is tuple else value

    visit(config.to_dict(), "")
    return flat


def digest(values: Any) -> str:
    """SHA-256 (hexadecimal) of JSON-able values, independent of dict order."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def config_hash(config: ConfigDict) -> str:
    """Identifies all fields that can change the results."""
    fields = flatten(config)
    return digest(
        {
            name: value
            for name, value in fields.items()
            if not any(name == n or name.startswith(n + ".") for n in NOT_HASHED)
        }
    )
