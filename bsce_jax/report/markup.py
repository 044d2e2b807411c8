"""HTML from nested calls: whatever is not HTML already is escaped."""

import html
from typing import TypeAlias

Attribute: TypeAlias = str | int | None

_VOID = frozenset({"br", "img", "link", "meta"})  # elements without an end tag


class Html(str):
    """Text that is HTML; a plain str is escaped wherever it is put in."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: Attribute) -> Html:
    """One element.

    Args:
      name: of the element.
      *children: its content, in order.
      **attributes: by name, `class_` for class and `aria_label` for aria-label; those
        that are None are left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: str, separator: str = "") -> Html:
    """Pieces one after the other."""
    return Html(html.escape(separator).join(map(_escaped, children)))


def _escaped(child: str) -> str:
    return child if isinstance(child, Html) else html.escape(child)
