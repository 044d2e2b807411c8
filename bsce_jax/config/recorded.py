"""The configuration of a run as its results have it, which anybody may have written."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from bsce_jax.config import options, resolve
from bsce_jax.config.fields import FIELDS, find, phase
from bsce_jax.errors import UserError, field_error


def nested(flat: Mapping[str, Any], needed: Sequence[str]) -> ConfigDict:
    """A flattened configuration as it was.

    Flattening leaves empty sections out; a run of another version may lack fields, and
    have others, which are left out here. What a phase lacks is at its default.

    Args:
      flat: values by dotted name.
      needed: names that must be there; "model." are all fields of the section.

    Raises:
      UserError: one of them is not, or a field has a value that it cannot have.
    """
    for name in FIELDS:
        wanted = name in needed or f"{name.partition('.')[0]}." in needed
        if wanted and name not in flat:
            raise UserError(f"config.{name} is missing")
    config = ConfigDict({"options": {}})
    for name, value in flat.items():
        if find(name) is None:
            continue
        resolve.check_value(name, value)
        try:
            _set(config, name.split("."), value)
        except (KeyError, AttributeError, TypeError, ValueError):
            raise field_error(name, value, "no field inside of another") from None
    for section in config.get("phase", {}).values():
        for name, default in phase().items():
            if name not in section:
                section[name] = default
    options.check(config)
    for name in options.defaults(config.method):
        if name not in config.options:
            raise UserError(f"config.options.{name} is missing")
    return config


def _set(section: ConfigDict, path: Sequence[str], value: Any) -> None:
    *sections, field = path
    for part in sections:
        if part not in section:
            section[part] = ConfigDict()
        section = section[part]
    if field in section:
        raise KeyError(field)
    section[field] = tuple(value) if isinstance(value, list) else value
