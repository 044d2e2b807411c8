"""Errors that are the user's to mend: one clear line, no traceback."""

from typing import Any


class UserError(ValueError):
    """Bad input: the message names the field, its value and what is allowed."""


def field_error(name: str, value: Any, allowed: str) -> UserError:
    """The error of a configuration field, given by its dotted name."""
    shown = value.to_dict() if hasattr(value, "to_dict") else value
    return UserError(f"config.{name}={shown!r}: expected {allowed}")
