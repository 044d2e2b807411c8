"""What makes two functions the same one: their code, and all that it is given."""

import dataclasses
import functools
import types
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np


class _Itself:
    """A value that is like no other; keeps it alive, so that no other gets its id."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def identity(value: Any) -> Hashable:
    """Equal for values of equal content: two functions of which do the same.

    Follows partial functions, closures, dataclasses (such as networks) and containers.
    What it does not know is equal to itself alone, so that nothing is ever taken for
    something else.
    """
    kind = type(value)
    match value:
        case functools.partial():
            parts: Any = (value.func, value.args, dict(value.keywords))
        case types.FunctionType():
            cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
            defaults = value.__defaults__, value.__kwdefaults__
            return kind, value.__module__, value.__code__, identity((cells, defaults))
        case types.MethodType():
            parts = (value.__func__, value.__self__)
        case np.ndarray():
            return kind, value.dtype.str, value.shape, value.tobytes()
        case float():
            return kind, repr(value)  # 0.0 is not -0.0, and nan is nan
        case Mapping():
            named = sorted(value.items(), key=lambda item: repr(item[0]))
            return kind, tuple((name, identity(part)) for name, part in named)
        case tuple() | list():
            return kind, tuple(map(identity, value))
        case set() | frozenset():
            return kind, frozenset(map(identity, value))
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = dataclasses.fields(value)
            parts = tuple(getattr(value, field.name) for field in fields)
        case _:
            return _known(value)
    return kind, identity(parts)


def _known(value: Any) -> Hashable:
    """A value without parts."""
    if isinstance(value, bool | int | str | bytes | type | np.dtype | None):
        return type(value), value
    return _Itself(value)
