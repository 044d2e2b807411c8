"""Resolves and validates a configuration: one clear line for each mistake."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bsce_jax import methods
from bsce_jax.config import terms
from bsce_jax.config.fields import default_config
from bsce_jax.config.hashes import flatten
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
