"""A configuration as flat fields, its hash, and what makes two differ."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bsce_jax.config import fields


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


def listing(config: ConfigDict, everything: bool = True) -> list[str]:
    """Fields and their values, a line each: every one, or those not at the default.

    Those of phases that do not exist in the run count as if they were at the default.
    """
    flat = flatten(config)
    if not everything:
        none = tuple(
            f"phase.{n}." for n, phase in config.phase.items() if not phase.epochs
        )
        flat = {
            name: value
            for name, value in flat.items()
            if _is_changed(name, value) and not name.startswith(none)
        }
    return [f"{name} = {value!r}" for name, value in flat.items()]


def _is_changed(name: str, value: Any) -> bool:
    field = fields.find(name)
    default = None if field is None else field.default
    default = list(default) if type(default) is tuple else default
    return field is None or isinstance(default, dict) or value != default


def digest(values: Any) -> str:
    """SHA-256 (hexadecimal) of JSON-able values, independent of dict order."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def config_hash(config: ConfigDict) -> str:
    """Identifies all fields that can change the results."""
    return digest({n: v for n, v in flatten(config).items() if is_hashed(n)})


# How a run is computed: no other protocol, though its bits may be others.
HOW_NOT_WHAT = ("deterministic", "parallel", "updates_per_call")


def protocol(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What a run does, of a flattened configuration, whatever its seed.

    Without fields at their default, so that a run of before there was a field is as
    one with it.
    """
    return {
        name: value
        for name, value in flat.items()
        if name != "seed" and name not in HOW_NOT_WHAT
        if is_hashed(name) and _is_changed(name, value)
    }


def is_hashed(name: str) -> bool:
    """Whether a field, by its dotted name, can change the results."""
    field = fields.find(name)
    return field is None or field.hashed


_HOOKS = ("forward", "begin")  # fields of a phase that name a function of the method


def base_fields(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What reaches the base step as it stands, of a flattened configuration.

    Args:
      flat: resolved and flattened; of an older run it may lack fields, and phases.

    Returns:
      The fields declared so, those of the phases of the base step (but for their
      terms, whose weights there are numbers) with the order of these phases, and the
      method's name and options where one of these phases uses a function of it.
    """
    base = [
        name
        for name in flat.get("phases", ())
        if flat.get(f"phase.{name}.steps") == "base"
    ]
    prefixes = tuple(f"phase.{name}." for name in base)
    without = tuple(f"phase.{name}.terms." for name in base)
    if any(flat.get(f"phase.{n}.{hook}") for n in base for hook in _HOOKS):
        prefixes += ("method", "options.")
    found = {
        name: value
        for name, value in flat.items()
        if (name in fields.FIELDS and fields.FIELDS[name].base)
        or (name.startswith(prefixes) and not name.startswith(without))
    }
    return found | ({"phases": base} if base else {})


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
