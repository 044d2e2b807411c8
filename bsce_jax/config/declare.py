"""How a field of the configuration is declared, and what may stand in it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Field(NamedTuple):
    """A field of the configuration: all that is known of it stands here, once.

    Attributes:
      default: its value where nothing else is given, which decides its type; None is a
        number that may be absent, {} a section whose names are free.
      means: what it is, for --help and docs/configuration.md.
      choices: the texts it may be, and what each means where that is not said
        otherwise; () = any.
      least, most: inclusive bounds of a number, or of each in a tuple; None = no bound
        but that of float32 and of a 32-bit integer.
      longest: characters of a text, or entries of a tuple, at most.
      hashed: whether it can change the results of a run that ends, and so is part of
        the run's hash.
      base: whether it reaches the base step as it stands, and so is part of the hash
        by which runs share one.
    """

    default: Any
    means: str
    choices: tuple[str, ...] | Mapping[str, str] = ()
    least: float | None = None
    most: float | None = None
    hashed: bool = True
    base: bool = False
    longest: int = 1000


Bounds = tuple[float | None, float | None]
"""Least and most, inclusive; None = no bound."""

_LARGEST, _SMALLEST = 3.4e38, 1.2e-38  # of a float32 but 0
_LARGEST_INT = 2**31 - 1


def refusal(value: Any, want: Any, bounds: Bounds = (None, None)) -> str:
    """What is expected in the place of a value; "" where it may stand.

    Args:
      value: of a field, or of an option of a term or a method.
      want: its default, which decides its type.
      bounds: of it, or of every entry of a tuple.
    """
    if not same_type(value, want):
        return f"a value of type {kind(want)}"
    entries = value if isinstance(value, tuple) else (value,)
    numbers = [v for v in entries if isinstance(v, int | float)]
    numbers = [v for v in numbers if not isinstance(v, bool)]
    least, most = bounds
    for number in numbers:
        if number != number or abs(number) == math.inf:
            return "finite numbers"
        if least is not None and number < least:
            return f"at least {least}"
        if most is not None and number > most:
            return f"at most {most}"
        if isinstance(want, int) and not -_LARGEST_INT <= number <= _LARGEST_INT:
            return f"at most {_LARGEST_INT}"
        if number and not _SMALLEST <= abs(number) <= _LARGEST:
            return f"0, or a size from {_SMALLEST:g} to {_LARGEST:g}, as float32 has it"
    return ""


def text_refusal(value: Any, longest: int) -> str:
    """As `refusal`, of a text's or a tuple's length and of a text's characters."""
    if isinstance(value, str | tuple) and len(value) > longest:
        return f"no more than {longest}, not {len(value)}"
    texts = value if isinstance(value, tuple) else (value,)
    if any(isinstance(text, str) and not text.isprintable() for text in texts):
        return "text without control characters"
    return ""


def same_type(value: Any, want: Any) -> bool:
    """Whether a value may stand where `want` is the default."""
    if want is None:
        return value is None or same_type(value, 0.0)
    if isinstance(want, bool) or isinstance(value, bool):
        return isinstance(want, bool) and isinstance(value, bool)
    if isinstance(want, tuple):
        kind: Any = str if want and isinstance(want[0], str) else int | float
        return isinstance(value, tuple) and all(
            isinstance(v, kind) and not isinstance(v, bool) for v in value
        )
    if isinstance(want, float):
        return isinstance(value, int | float)
    return isinstance(value, type(want))


def kind(want: Any) -> str:
    """The type of a field, as messages call it, from its default."""
    if isinstance(want, tuple):
        of = "texts" if want and isinstance(want[0], str) else "numbers"
        return f"tuple of {of}, such as {want!r}"
    return "float" if want is None else type(want).__name__
