"""Resolves and validates a configuration: one clear line for each mistake."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from bsce_jax import methods, models
from bsce_jax.config import options, priors, terms
from bsce_jax.config.declare import kind, refusal, text_refusal
from bsce_jax.config.fields import FIELDS, PHASE, find
from bsce_jax.config.hashes import flatten
from bsce_jax.config.names import default_name
from bsce_jax.errors import UserError, field_error

_DATA_NAME = re.compile(r"[A-Za-z_]\w*(/[\w.+-]+)?(:\d+\.\d+\.\d+)?")


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns a validated copy with everything derived filled in.

    Runs after the command line's overrides. Derived: the name, the classification
    loss, which phases there are, the paper's epsilon, the method's options.

    Raises:
      UserError: a field is missing, unknown, of a wrong type or out of range.
    """
    validate(config)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        prior, classification = config.prior, config.classification
        names = terms.names_with_prior(config.terms, prior, classification)
        config.terms = terms.with_prior(config.terms, prior, classification)
        for phase in config.phase.values():
            phase.terms = terms.phase_with_prior(phase.terms, names)
            if not _exists(phase, prior):
                phase.epochs = 0
        config.options = options.filled_in(config)
        priors.fill_in(config)
        if not config.name:
            config.name = default_name(flatten(config))
    return config


def _exists(phase: ConfigDict, prior: str) -> bool:
    """Whether a phase has a place in the run at all."""
    return phase.epochs > 0 and (prior == "none" or phase.when_prior == "any")


def validate(config: ConfigDict) -> None:
    """Checks names, types, choices and ranges of all fields.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    values = config.to_dict()
    _check_fields(values, _expected(values), "")
    terms.check(config.terms)
    for name, value in flatten(config).items():
        check_value(name, value)
    _check_together(config)


def _expected(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested defaults of all fields that should be there, of the phases given."""
    expected = _nested({name: field.default for name, field in FIELDS.items()})
    phase = _nested({name: field.default for name, field in PHASE.items()})
    sections = values.get("phase")
    names = sections if isinstance(sections, Mapping) else ()
    return expected | {"phase": dict.fromkeys(names, phase)}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in flat.items():
        section, dot, rest = name.partition(".")
        if dot:
            found.setdefault(section, {})[rest] = value
        else:
            found[name] = value
    return found


def _check_fields(given: Mapping[str, Any], expected: Mapping, prefix: str) -> None:
    for name in expected.keys() - given.keys():
        raise UserError(f"config.{prefix}{name} is missing")
    for name, value in given.items():
        if name not in expected:
            names = ", ".join(sorted(expected))
            raise UserError(f"config.{prefix}{name} is unknown; known: {names}")
        want = expected[name]
        if isinstance(want, dict) != isinstance(value, dict):
            raise field_error(
                prefix + name,
                value,
                "a section" if isinstance(want, dict) else kind(want),
            )
        if isinstance(want, dict):
            if want or name == "phase":  # else its names are free
                _check_fields(value, want, f"{prefix}{name}.")
        elif wrong := refusal(value, want):
            raise field_error(prefix + name, value, wrong)


def check_value(name: str, value: Any) -> None:
    """Checks a field's type, choices and bounds; not those of free sections.

    Args:
      name: dotted.
      value: of it; a list where it was flattened.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    field = find(name)
    if field is None or isinstance(field.default, dict):
        return
    if field.choices and value not in field.choices:
        names = ", ".join(choice or "''" for choice in field.choices)
        raise field_error(name, value, f"one of {names}")
    value = tuple(value) if isinstance(value, list) else value  # as it was flattened
    bounds = field.least, field.most
    wrong = refusal(value, field.default, bounds) or text_refusal(value, field.longest)
    if wrong:
        raise field_error(name, value, wrong)


def _check_together(config: ConfigDict) -> None:
    """Checks that involve several fields."""
    data, meta = config.data, config.meta
    for name in ("mean", "std"):
        if len(data[name]) not in (1, 3, 4):
            raise field_error(f"data.{name}", data[name], "1, 3 or 4 numbers")
    if len(data.mean) != len(data.std):
        allowed = f"as many numbers as config.data.mean={data.mean!r}"
        raise field_error("data.std", data.std, allowed)
    if ".." in config.name.split("/"):
        allowed = "no '..' between slashes, which leaves the folder of the runs"
        raise field_error("name", config.name, allowed)
    models.check_name(config.model.name, "config.model.name")
    if not _DATA_NAME.fullmatch(data.name) or ".." in data.name:
        allowed = "a tfds name such as cifar100, name/config or name:1.2.3"
        raise field_error("data.name", data.name, allowed)
    _check_streaming(data)
    if meta.minimum > meta.maximum:
        raise field_error("meta.minimum", meta.minimum, f"at most {meta.maximum}")
    _check_phases(config)
    priors.check(config)
    used = terms.with_prior(config.terms, config.prior, config.classification)
    for name in filter(terms.needs_similarities, used):
        if config.model.head == "linear":
            raise field_error(
                "model.head", "linear", f"cosine or local_similarity for terms.{name}"
            )
    for name in filter(terms.needs_auxiliary, used):
        if not config.model.auxiliary:
            raise field_error("model.auxiliary", 0, f"above 0 for terms.{name}")
    methods.check(config)
    options.check(config)
    _check_sums(config)


def _check_phases(config: ConfigDict) -> None:
    """Checks the order of the phases and each of them."""
    names, sections = config.phases, config.phase
    if sorted(names) != sorted(sections):
        allowed = f"each section of config.phase once: {', '.join(sorted(sections))}"
        raise field_error("phases", names, allowed)
    if not all(name.isidentifier() for name in names):
        raise field_error("phases", names, "names of letters, digits and _")
    base = [name for name in names if sections[name].steps == "base"]
    if list(names[: len(base)]) != base:
        allowed = f"first those of the base step: {', '.join(base)}"
        raise field_error("phases", names, allowed)
    if not any(_exists(sections[name], config.prior) for name in base):
        allowed = "at least 1 in a phase of the base step"
        for name in base:
            if not sections[name].epochs:
                raise field_error(f"phase.{name}.epochs", 0, allowed)
        raise field_error("phases", names, "a phase of the base step that exists")
    used = terms.names_with_prior(config.terms, config.prior, config.classification)
    for name in names:
        _check_phase(f"phase.{name}", sections[name], used)
    later = [n for n in names[len(base) :] if _exists(sections[n], config.prior)]
    _check_teachers(later, sections)


def _check_teachers(names: Sequence[str], sections: Mapping[str, ConfigDict]) -> None:
    """The phases of a step have one teacher: a later one replaces it."""
    replaced = ""
    for name in names:
        teacher = sections[name].teacher
        if teacher == "before" and replaced:
            allowed = f"now or none: the phase {replaced} has taken its place"
            raise field_error(f"phase.{name}.teacher", teacher, allowed)
        replaced = name if teacher == "now" else replaced


def _check_sums(config: ConfigDict) -> None:
    """Every phase that exists trains something."""
    used = terms.with_prior(config.terms, config.prior, config.classification)
    names = terms.names_with_prior(config.terms, config.prior, config.classification)
    for name in config.phases:
        phase = config.phase[name]
        if _exists(phase, config.prior):
            own = terms.phase_with_prior(phase.terms, names)
            terms.check_sum(terms.of_phase(used, own), phase.steps, name)


def _check_phase(name: str, phase: ConfigDict, used: Mapping[str, str]) -> None:
    if phase.steps == "base" and phase.images != "training":
        raise field_error(
            f"{name}.images", phase.images, "training in a phase of the base step"
        )
    marks = phase.milestones
    whole = all(type(mark) is int and mark > 0 for mark in marks)
    if not whole or list(marks) != sorted(marks):
        allowed = "epochs above 0 in ascending order, whole numbers"
        raise field_error(f"{name}.milestones", marks, allowed)
    if phase.replay and phase.sampling != "uniform":
        allowed = "uniform with replay, whose batches have as many exemplars each"
        raise field_error(f"{name}.sampling", phase.sampling, allowed)
    terms.check_phase(f"{name}.terms", phase.terms, used)
    _check_beside(name, phase)
    if phase.steps == "later" and phase.teacher == "none" and phase.epochs:
        for term in filter(terms.needs_teacher, phase.terms or used.values()):
            raise field_error(
                f"{name}.teacher", "none", f"before or now for the term {term}"
            )


def _check_beside(name: str, phase: ConfigDict) -> None:
    """A second stream needs a size, old classes, and a place for it."""
    beside, size = phase.beside, phase.beside_size
    if bool(beside) != bool(size):
        allowed = f"at least 1 with beside={beside}" if beside else "0 without beside"
        raise field_error(f"{name}.beside_size", size, allowed)
    if beside and (phase.steps == "base" or phase.images != "training"):
        allowed = "'' in a phase that is not of the training images of later steps"
        raise field_error(f"{name}.beside", beside, allowed)
    if beside == "companions" and phase.sampling != "uniform":
        allowed = "uniform with beside=companions, which are other images of the epoch"
        raise field_error(f"{name}.sampling", phase.sampling, allowed)
    if beside == "companions" and phase.replay:
        allowed = "0 with beside=companions"
        raise field_error(f"{name}.replay", phase.replay, allowed)
    if beside == "companions" and phase.teacher != "before":
        allowed = "before: companions are chosen by its features"
        raise field_error(f"{name}.teacher", phase.teacher, allowed)


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
