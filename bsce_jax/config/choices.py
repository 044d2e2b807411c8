"""What can stand in a configuration's argument: --config configs/digits.py:method=?"""

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from bsce_jax import methods
from bsce_jax.config.declare import Field
from bsce_jax.config.fields import FIELDS
from bsce_jax.config.page import allowed
from bsce_jax.errors import UserError


def describe(name: str, defaults: Mapping[str, Any], fields: Mapping[str, str]) -> str:
    """What an argument, or a field by the last part of its name, may be, a line each.

    Args:
      name: before "=?".
      defaults: of the file's arguments.
      fields: that arguments set, by argument, where it is not of the same name.

    Raises:
      UserError: there is no such argument or field.
    """
    known = [full for full in FIELDS if full.rpartition(".")[2] == name]
    full = fields.get(name, name if name in FIELDS else known[0] if known else "")
    if not full:
        names = ", ".join(defaults)
        raise UserError(f"config argument '{name}=?': expected one of {names}")
    field = FIELDS[full]
    title = f"{name}: {field.means}"
    if name not in defaults:
        title = f"--config.{full}: {field.means}"
    elif defaults[name] is not None:
        title += f" Here by default: {defaults[name]}."
    return "\n".join([textwrap.fill(title, 79), *_lines(name, field)])


def _lines(name: str, field: Field) -> Iterable[str]:
    if name == "method":
        return _columns({method: _of_method(method) for method in methods.names()})
    if isinstance(field.choices, Mapping):
        return _columns(field.choices)
    return [f"  {allowed(field)}"]


def _of_method(name: str) -> str:
    about = methods.about(name)
    what = "; ".join(filter(None, (about.losses, about.besides)))
    return f"{about.title} ({about.source}). {what[:1].upper()}{what[1:]}"


def _columns(texts: Mapping[str, str]) -> list[str]:
    wide = max(map(len, texts)) + 4
    return [
        textwrap.fill(text, 79, initial_indent=name, subsequent_indent=" " * wide)
        for name, text in ((f"  {n}".ljust(wide), t) for n, t in texts.items())
    ]
