"""Resolves and validates a configuration: one clear line for each mistake."""

import hashlib
import importlib.util
import json
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from bsce_jax import methods, terms
from bsce_jax.defaults import default_config
from bsce_jax.errors import UserError, field_error
from bsce_jax.models import heads

CHOICES: dict[str, tuple[str, ...]] = {
    "prior": ("none", "balanced", "weighted", "meta", "relaxed"),
    "epsilon_unit": ("count", "percent"),
    "classification": ("auto", "softmax_ce", "separated_softmax_ce"),
    "sampling": ("uniform", "memory", "class"),
    "parallel": ("jit", "pmap"),
    "matmul_precision": ("default", "high", "highest"),
    "data.loading": ("resident", "streaming"),
    "data.corrupt": ("refuse", "skip"),
    "scenario.subset": ("all", "first100", "lucir"),
    "memory.kind": ("growing", "fixed", "none"),
    "memory.selection": ("herding", "random"),
    "model.shortcut": ("A", "B"),
    "model.stem": ("7x7", "3x3"),
    "model.head": heads.NAMES,
    "model.dtype": ("float32", "bfloat16"),
    "optim.schedule": ("step", "cosine"),
    "finetune.when": ("auto", "always", "never"),
    "finetune.trainable": ("head", "all"),
    "finetune.batch_norm": ("train", "eval"),
    "meta.optimizer": ("sgd", "adam"),
    "meta.variable": ("alpha", "log_alpha"),
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
    "data.resize": (0, None),
    "data.workers": (-1, 1024),
    "data.timeout": (0, None),
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
    "model.proxies": (1, None),
    "optim.epochs": (1, None),
    "optim.batch_size": (1, None),
    "optim.learning_rate": (0, None),
    "optim.momentum": (0, 1),
    "optim.weight_decay": (0, None),
    "optim.decay": (0, 1),
    "optim.clip": (0, None),
    "finetune.epochs": (0, None),
    "finetune.learning_rate": (0, None),
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
# Priors that are not those of a balanced set's counts, on which fine-tuning runs.
_OWN_COUNTS = ("weighted", "meta", "relaxed")
# Fields that cannot change the results of a run that ends: not part of its hash.
NOT_HASHED = (
    "name",
    "print_plan",
    "log_seconds",
    "compile_cache",
    "init_from",
    "checkpoint",
    "data.data_dir",
    "data.workers",
    "data.timeout",
    "data.corrupt",  # a run that "refuse" has ended goes on with "skip"
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


# Arguments that configuration files have in common, and the field of each.
COMMON_ARGUMENTS = {
    "method": "il_baseline",
    "prior": "none",
    "steps": 5,
    "memory": 20,
    "seed": 0,
    "alpha": 1.0,
    "epsilon": 0.0,
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

    memory is the number of exemplars a class, 0 for no memory; method is left for
    `method_module`, which sets more than its name.

    Args:
      config: changed in place.
      argument: see `parse_arguments`.
      allowed: the file's ARGUMENTS: those above, with defaults of its own.

    Raises:
      UserError: an unknown name, or a value of the wrong type.
    """
    given = parse_arguments(argument, allowed)
    config.update_from_flattened_dict(
        {_ARGUMENT_FIELDS.get(name, name): value for name, value in given.items()}
    )
    if not given["memory"]:
        config.memory.kind = "none"


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
    training lengths, the classification loss, whether there is fine-tuning.

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
        config.terms = terms.with_prior(
            config.terms, config.prior, config.classification
        )
        when = config.finetune.when
        if when == "never" or (when == "auto" and config.prior != "none"):
            config.finetune.epochs = 0
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
    terms.check(config.terms)
    fields = flatten(config)
    for name, allowed in CHOICES.items():
        if fields[name] not in allowed:
            raise field_error(name, fields[name], f"one of {', '.join(allowed)}")
    for name, (low, high) in BOUNDS.items():
        value = fields[name]
        if low is not None and value < low:
            raise field_error(name, value, f"at least {low}")
        if high is not None and value > high:
            raise field_error(name, value, f"at most {high}")
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
            raise field_error(prefix + name, value, kind)
        if isinstance(want, dict):
            _check_fields(value, want, f"{prefix}{name}.")
        elif not terms.same_type(value, want):
            raise field_error(
                prefix + name, value, f"a value of type {type(want).__name__}"
            )
        elif not terms.finite(value):
            raise field_error(prefix + name, value, "finite numbers")


def _check_together(config: ConfigDict) -> None:
    """Checks that involve several fields."""
    data, meta, memory, optim = config.data, config.meta, config.memory, config.optim
    if len(data.mean) != len(data.std) or not all(s > 0 for s in data.std):
        raise field_error("data.std", data.std, f"{len(data.mean)} positive numbers")
    _check_streaming(data)
    if meta.minimum > meta.maximum:
        raise field_error("meta.minimum", meta.minimum, f"at most {meta.maximum}")
    for name, milestones in (
        ("optim.milestones", optim.milestones),
        ("optim.base_milestones", optim.base_milestones),
        ("finetune.milestones", config.finetune.milestones),
    ):
        if list(milestones) != sorted(milestones) or any(m <= 0 for m in milestones):
            raise field_error(name, milestones, "epochs above 0 in ascending order")
    if config.prior == "meta" and memory.kind == "none":
        raise field_error("prior", "meta", "another prior where memory.kind is none")
    used = terms.with_prior(config.terms, config.prior, config.classification)
    if config.prior != "none" and config.classification == "separated_softmax_ce":
        raise field_error("classification", config.classification, "auto with a prior")
    if config.prior != "none" and "softmax_ce" not in used:
        raise field_error("prior", config.prior, "none: no softmax_ce among the terms")
    for name in filter(terms.needs_similarities, used):
        if config.model.head == "linear":
            raise field_error(
                "model.head", "linear", f"cosine or local_similarity for terms.{name}"
            )
    if config.finetune.when == "always" and config.prior in _OWN_COUNTS:
        raise field_error(
            "finetune.when", "always", f"auto or never for prior={config.prior}"
        )
    methods.check(config)
    if config.prior == "relaxed" and config.epsilon == 0 and memory.kind != "none":
        raise field_error(
            "epsilon", 0.0, "above 0: exemplars are labels of old classes"
        )
    if config.prior == "meta" and memory.kind == "growing" and memory.per_class < 2:
        raise field_error(
            "memory.per_class", memory.per_class, "at least 2 for prior=meta"
        )


def _check_streaming(data: ConfigDict) -> None:
    low, high = (*data.crop_area, 0.0, 0.0)[:2]
    if len(data.crop_area) != 2 or not 0 < low <= high <= 1:
        raise field_error("data.crop_area", data.crop_area, "(low, high) in (0, 1]")
    if data.loading == "streaming" and not data.image_size:
        raise field_error(
            "data.image_size", 0, "at least 1 with data.loading=streaming"
        )
    if data.resize and data.resize < data.image_size:
        raise field_error(
            "data.resize", data.resize, f"0 or at least {data.image_size}"
        )


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
    return digest({n: v for n, v in flatten(config).items() if is_hashed(n)})


def is_hashed(name: str) -> bool:
    """Whether a field, by its dotted name, can change the results."""
    return not any(name == n or name.startswith(n + ".") for n in NOT_HASHED)


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What makes the hashes of two flattened configurations differ, in a line."""
    names = sorted(
        name
        for name in theirs.keys() | ours.keys()
        if is_hashed(name) and theirs.get(name) != ours.get(name)
    )
    shown = [f"{n}: {theirs.get(n)!r} there, {ours.get(n)!r} here" for n in names[:3]]
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return "; ".join(shown) + more
