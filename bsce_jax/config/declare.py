"""How a field of the configuration is declared, and what may stand in it."""

import math
from typing import Any, NamedTuple


class Field(NamedTuple):
    """A field of the configuration: all that is known of it stands here, once.

    Attributes:
      default: its value where nothing else is given, which decides its type; None is a
        number that may be absent, {} a section whose names are free.
      means: what it is, for --help and docs/configuration.md.
      choices: the texts it may be; () = any.
      least, most: inclusive bounds of a number; None = no bound.
      hashed: whether it can change the results of a run that ends, and so is part of
        the run's hash.
      base: whether it reaches the base step as it stands, and so is part of the hash
        by which runs share one.
    """

    default: Any
    means: str
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    hashed: bool = True
    base: bool = False


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


def finite(value: Any) -> bool:
    """Whether there is neither NaN nor an infinity in a value."""
    values = value if isinstance(value, tuple) else (value,)
    return all(math.isfinite(v) for v in values if isinstance(v, float))


def kind(want: Any) -> str:
    """The type of a field, as messages call it, from its default."""
    return "float" if want is None else type(want).__name__
