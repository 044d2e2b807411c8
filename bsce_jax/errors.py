"""Errors that are the user's to mend: one clear line, no traceback."""

import contextlib
from collections.abc import Iterator
from typing import Any

_SHOWN = 200  # characters of a value


class UserError(ValueError):
    """Bad input: the message names the field, its value and what is allowed."""

    def __str__(self) -> str:
        """One line that does nothing to a terminal, whatever names it quotes."""
        return printable(super().__str__())


def printable(text: str) -> str:
    """Text in which only what can be seen is left as it is: names may come from others.

    Escape sequences of terminals, line breaks and marks that change the direction of
    writing are shown as Python writes them.
    """
    return "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape").decode()
        for character in text
    )


def one_line(error: BaseException) -> str:
    """The message of an error of another library, whose lines may be many."""
    return " ".join(str(error).split())


def field_error(name: str, value: Any, allowed: str) -> UserError:
    """The error of a configuration field, given by its dotted name."""
    shown = repr(value.to_dict() if hasattr(value, "to_dict") else value)
    if len(shown) > _SHOWN:
        shown = f"{shown[: _SHOWN - 3]}..."
    return UserError(f"config.{name}={shown}: expected {allowed}")


@contextlib.contextmanager
def named_section(section: str) -> Iterator[None]:
    """Gives errors of functions that know no configuration the field's whole name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"config.{section}.{error}") from None
