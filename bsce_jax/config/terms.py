"""The loss terms of a configuration: their modules, options and weights."""

import importlib
import inspect
import math
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from bsce_jax import losses
from bsce_jax.config import options as settings
from bsce_jax.config.declare import refusal
from bsce_jax.errors import UserError, field_error

# Named weights, as functions of the numbers of old and seen classes.
WEIGHTS = {
    "rho": lambda old, seen: old / seen,  # Jodelet et al., section 3.1
    "1-rho": lambda old, seen: 1.0 - old / seen,
    "sqrt(old/new)": lambda old, seen: math.sqrt(old / (seen - old)),  # LUCIR
    "sqrt(seen/new)": lambda old, seen: math.sqrt(seen / (seen - old)),  # PODNet
    # SPB: 1 in the base step, where the terms that they balance have no old classes.
    "new/old": lambda old, seen: (seen - old) / old if old else 1.0,
    "old/new": lambda old, seen: old / (seen - old) if old else 1.0,
}
_NOT_OPTIONS = ("weight", "factor")
# Options of the classification losses, which one keeps that takes another's place.
RESCALING = ("rescale", "normalised")


def names() -> list[str]:
    """All loss terms."""
    return sorted(found.name for found in pkgutil.iter_modules(losses.__path__))


def module(name: str) -> ModuleType:
    """The module of a loss term, from `bsce_jax.losses`."""
    return importlib.import_module(f"{losses.__name__}.{name}")


def in_base_step(name: str) -> str:
    """The name of what a term is in the base step, where no class is old; "": none."""
    if getattr(module(name), "NEEDS_OLD_CLASSES", False):
        return ""
    return getattr(module(name), "WITHOUT_OLD_CLASSES", name)


def needs_teacher(name: str) -> bool:
    """Whether a term compares the network with a teacher."""
    return getattr(module(name), "NEEDS_TEACHER", False)


def reads_log_prior(name: str) -> bool:
    """Whether a prior acts on a term."""
    return getattr(module(name), "READS_LOG_PRIOR", False)


def needs_similarities(name: str) -> bool:
    """Whether a term needs a head with similarities and a learned scale."""
    return getattr(module(name), "NEEDS_SIMILARITIES", False)


def needs_auxiliary(name: str) -> bool:
    """Whether a term needs the network's auxiliary branch."""
    return getattr(module(name), "NEEDS_AUXILIARY", False)


def options(term: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments that a configured term gives to its function."""
    return {k: v for k, v in term.items() if k not in _NOT_OPTIONS}


def weight(name: str, term: Mapping[str, Any], old: int, seen: int) -> float:
    """A term's weight in a step with `old` old and `seen` seen classes.

    Raises:
      UserError: `weight` is neither a number nor a name of WEIGHTS, or `factor` is
        not a number.
    """
    given = _weight(f"terms.{name}.weight", term["weight"], old, seen)
    return _factor(name, term) * given


def _weight(field: str, given: str | float, old: int, seen: int) -> float:
    if isinstance(given, str) and given in WEIGHTS:
        return float(WEIGHTS[given](old, seen))
    number = _number(given)
    if refusal(number, 0.0, (0, None)):
        names = ", ".join(WEIGHTS)
        raise field_error(field, given, f"a number of at least 0, or {names}")
    return number


def _factor(name: str, term: Mapping[str, Any]) -> float:
    given = term.get("factor", 1.0)
    number = _number(given)
    if refusal(number, 0.0, (0, None)):
        raise field_error(f"terms.{name}.factor", given, "a number of at least 0")
    return number


def _number(given: Any) -> float:
    """A number, also as text from the command line; NaN where it is none."""
    try:
        return math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def names_with_prior(
    terms: ConfigDict, prior: str, classification: str
) -> dict[str, str]:
    """The name of what stands in the place of each term of a run.

    "The classification loss (CE for LUCIR, NCA for PODNet) is replaced by
    BalancedS-CE" (Jodelet et al., on combining it with other methods): a term whose
    module says CLASSIFICATION becomes softmax_ce where there is a prior, or the term
    that `classification` names.
    """
    wanted = classification
    if wanted == "auto" and prior != "none":
        wanted = "softmax_ce"
    return {
        name: name
        if wanted == "auto" or not getattr(module(name), "CLASSIFICATION", False)
        else wanted
        for name in terms
    }


def with_prior(terms: ConfigDict, prior: str, classification: str) -> ConfigDict:
    """The terms of a run, see `names_with_prior`.

    A term that takes another's place has the same weight; loss rescaling stays.

    Raises:
      UserError: it would take the place of one beside itself, whose weight is lost.
    """
    kept = (*_NOT_OPTIONS, *RESCALING)
    found = ConfigDict()
    for name, other in names_with_prior(terms, prior, classification).items():
        term = terms[name]
        if other in found or (other != name and other in terms):
            allowed = f"no other classification loss beside {other}, which replaces it"
            raise field_error(f"terms.{name}", term, allowed)
        if other != name:
            term = {k: term[k] for k in kept if k in term}
        found[other] = term
    return found


def phase_with_prior(given: Mapping[str, Any], names: Mapping[str, str]) -> ConfigDict:
    """The weights of a phase's terms under their names in the run.

    Args:
      given: weights by name, before or after the prior's replacement.
      names: see `names_with_prior`.
    """
    return ConfigDict({names.get(name, name): given[name] for name in given})


def of_phase(config_terms: ConfigDict, phase_terms: Mapping[str, Any]) -> ConfigDict:
    """The terms of a phase with their weights.

    Args:
      config_terms: of the run.
      phase_terms: weights by name, see `fields.PHASE`; empty = all as they are.
    """
    if not phase_terms:
        return config_terms
    return ConfigDict(
        {
            name: {**config_terms[name].to_dict(), "weight": weight}
            for name, weight in phase_terms.items()
        }
    )


def check(terms: Any) -> None:
    """Checks names, weights and options.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    if not isinstance(terms, ConfigDict) or not terms:
        raise field_error("terms", terms, "a section of loss terms, at least one")
    for name, term in terms.items():
        if name not in names():
            known = ", ".join(names())
            raise UserError(f"config.terms.{name} is unknown; losses: {known}")
        if not callable(getattr(module(name), "term", None)):
            raise UserError(
                f"config.terms.{name}: expected a function `term` in "
                f"{module(name).__name__}"
            )
        if not isinstance(term, ConfigDict) or "weight" not in term:
            raise field_error(f"terms.{name}", term, "a section with a weight")
        weight(name, term, old=1, seen=2)
        _check_options(name, options(term))


def check_sum(terms: ConfigDict, steps: str, phase: str) -> None:
    """Refuses a phase that trains nothing because all its weights are 0.

    Args:
      terms: of the phase, see `of_phase`.
      steps: of the phase, "base" or "later".
      phase: its name.

    Raises:
      UserError: names the phase.
    """
    old, seen = (0, 1) if steps == "base" else (1, 2)
    used = [n for n in terms if steps != "base" or in_base_step(n)]
    if not any(weight(name, terms[name], old, seen) for name in used):
        names = ", ".join(f"config.terms.{name}.weight" for name in used) or "none"
        raise UserError(
            f"config.phase.{phase}: all weights of its terms are 0: expected one above "
            f"0 of {names}, times its factor"
        )


def known_options(name: str) -> dict[str, Any]:
    """The options of a term and their defaults: its function's keyword arguments."""
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(module(name).term).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def _check_options(name: str, given: Mapping[str, Any]) -> None:
    """Compares a term's options with the keyword arguments of its function."""
    known = known_options(name)
    for option, value in given.items():
        if option not in known:
            names = ", ".join([*_NOT_OPTIONS, *known])
            raise UserError(f"config.terms.{name}.{option} is unknown; known: {names}")
        limits = settings.limits(module(name), option)
        settings.check_value(f"terms.{name}.{option}", value, known[option], limits)


def check_phase(field: str, given: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Checks the terms of a phase.

    Args:
      field: their dotted name.
      given: weights by name, before or after the prior's replacement.
      names: see `names_with_prior`.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    for name, value in given.items():
        if name not in {*names, *names.values()}:
            known = ", ".join(names)
            raise UserError(
                f"config.{field}.{name} is unknown; known, from config.terms: {known}"
            )
        other = names.get(name, name)
        if other != name and other in given:  # one of the two weights would be lost
            allowed = f"no weight beside that of {other}, which takes its place"
            raise field_error(f"{field}.{name}", value, allowed)
        _weight(f"{field}.{name}", value, old=1, seen=2)
