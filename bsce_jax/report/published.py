"""The paper's numbers: Tables 1 to 6 and Figures 2 to 5 of Jodelet et al.

They are data, in published.json beside this file: a table's columns, then one row a
line, its values in the order of the columns. null stands where the paper gives no
number. Accuracies are in percent.
"""

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple, NoReturn

FILE_NAME = "published.json"
# What a column can compare with: names of a run's `summary` in results.json, and what
# `cells.value` takes from its steps.
METRICS = (
    "average_incremental_top1",
    "average_incremental_top5",
    "final_top1",
    "final_base_top1",
    "base_step_top1",
    "final_later_top1",
)
ORIGINS = ("authors' run", "reported from the literature")


class Column(NamedTuple):
    """A column of a table; `metric` is one of METRICS."""

    key: str
    label: str
    metric: str


class Row(NamedTuple):
    """A row: `origin` is one of ORIGINS, `values` are by column key.

    A value is None where the paper gives none.
    """

    key: str
    label: str
    origin: str
    values: Mapping[str, float | None]


class Table(NamedTuple):
    """A table or figure of the paper; `source` cites it."""

    key: str
    title: str
    source: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def load() -> dict[str, Table]:
    """The tables and figures by key, table1 to table6, then figure2 to figure5.

    Raises:
      ValueError: see `parse`.
    """
    file = resources.files(__package__).joinpath(FILE_NAME)
    return parse(file.read_text(encoding="utf-8"))


def parse(text: str) -> dict[str, Table]:
    """The tables of a text like published.json, by key, in its order.

    Raises:
      ValueError: a key is unknown, missing or there twice, a metric or an origin is
        not known, or a value is neither null nor a percentage.
    """
    tables = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
    if not isinstance(tables, dict):
        raise ValueError("expected an object, tables by key")
    return {key: _table(key, table) for key, table in tables.items()}


def _table(key: str, given: Any) -> Table:
    _require(given, ("title", "source", "columns", "rows"), key)
    columns = tuple(_column(column, key) for column in given["columns"])
    names = tuple(column.key for column in columns)
    rows = tuple(_row(row, names, key) for row in given["rows"])
    _unique((name, None) for name in names)
    _unique((row.key, None) for row in rows)
    return Table(key, given["title"], given["source"], columns, rows)


def _column(given: Any, where: str) -> Column:
    _require(given, Column._fields, f"a column of {where}")
    if given["metric"] not in METRICS:
        raise ValueError(f"{where}: unknown metric {given['metric']!r}")
    return Column(**given)


def _row(given: Any, columns: tuple[str, ...], where: str) -> Row:
    _require(given, Row._fields, f"a row of {where}")
    where = f"{where}, row {given['key']}"
    if given["origin"] not in ORIGINS:
        raise ValueError(f"{where}: unknown origin {given['origin']!r}")
    values = given["values"]
    if len(values) != len(columns):
        raise ValueError(f"{where}: {len(values)} values for {len(columns)} columns")
    for value in values:
        if not (value is None or _is_percentage(value)):
            raise ValueError(f"{where}: {value!r} is not a percentage")
    found = dict(zip(columns, values, strict=True))
    return Row(given["key"], given["label"], given["origin"], found)


def _is_percentage(value: Any) -> bool:
    """False for NaN and infinities too."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value <= 100


def _require(given: Any, keys: tuple[str, ...], where: str) -> None:
    if not isinstance(given, dict) or set(given) != set(keys):
        found = ", ".join(given) if isinstance(given, dict) else repr(given)
        raise ValueError(f"{where}: expected {', '.join(keys)}; found {found}")
    for key in keys:
        kind = list if key in ("columns", "rows", "values") else str
        if not isinstance(given[key], kind) or not given[key]:
            raise ValueError(f"{where}: {key} is not a {kind.__name__}, or empty")


def _unique(pairs: Any) -> dict[str, Any]:
    """A JSON object's dict; json.loads would keep the last of two equal keys."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is there twice")
        found[key] = value
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a percentage")
