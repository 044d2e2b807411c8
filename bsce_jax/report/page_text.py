"""The report as Markdown and as CSV."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bsce_jax.errors import printable
from bsce_jax.report.cells import NEAR, Cell, CellRun, Report, Section, value
from bsce_jax.report.page_html import PAPER, difference, near, summary
from bsce_jax.report.page_runs import state
from bsce_jax.report.run_facts import facts, fields, learned, rate, wall_time

if TYPE_CHECKING:
    from bsce_jax.report.pictures import Picture

CSV_FIELDS = (
    "protocol", "table", "row", "column", "row_label", "column_label", "metric",
    "origin", "paper", "ours", "difference", "deviation", "seeds_done",
    "seeds_planned", "state", "runs", "values", "images_per_second", "seconds",
    "commands",
)  # fmt: skip


def markdown(
    report: Report,
    pictures: Mapping[str, Sequence["Picture"]],
    defaults: Mapping[str, Any],
) -> str:
    """The tables, what the pictures of the HTML page say, and the runs.

    Args:
      report: what was published and what was run.
      pictures: of each table, by key.
      defaults: of a configuration's fields, by dotted name.
    """
    parts = [
        "# Balanced Softmax for incremental learning: results",
        "The tables and figures of Jodelet, Liu and Murata, "
        f"[Balanced softmax cross-entropy]({PAPER}) (2022), run again with bsce_jax. "
        "Accuracies are in percent: ours, the mean over the seeds ± their sample "
        "standard deviation; the paper's; the difference, ours minus the paper's"
        + ("." if report.reduced else f" (≈ within {NEAR:g} point, ≠ not)."),
    ]
    if report.reduced:
        text = _escaped(report.protocol)
        parts.append(f"> **Not comparable with the paper.** {text}")
    parts.append(summary(report))
    for section in report.sections:
        parts += _section(section, report.reduced)
        shown = pictures.get(section.table.key, ())
        parts += [f"{_escaped(p.caption)}: {_escaped(p.text)}" for p in shown]
    parts += ["## Runs", _runs(report.runs), "## Commands", _commands(report.runs)]
    if own := _learned(report.runs):
        parts += ["## Learned beside the network", own]
    parts += ["## Fields that differ from the default", _fields(report.runs, defaults)]
    return "\n\n".join(parts) + "\n"


def csv_table(report: Report) -> str:
    """One line a cell; empty where there is no number.

    Of several runs the names, values, images/s, seconds and commands are separated by
    "; ", in the same order; a run without one has "none". A text that a spreadsheet
    would take for a formula begins with an apostrophe.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for section in report.sections:
        for cell in section.cells.values():
            line = _line(report.protocol, section.table.key, cell)
            writer.writerow({name: _no_formula(text) for name, text in line.items()})
    return buffer.getvalue()


def _line(protocol: str, table: str, cell: Cell) -> dict[str, str]:
    return {
        "protocol": protocol,
        "table": table,
        "row": cell.row.key,
        "column": cell.column.key,
        "row_label": cell.row.label,
        "column_label": cell.column.label,
        "metric": cell.column.metric,
        "origin": cell.row.origin,
        "paper": _digits(cell.paper),
        "ours": _digits(cell.mean),
        "difference": _digits(cell.difference),
        "deviation": _digits(cell.deviation),
        "seeds_done": str(len(cell.values)),
        "seeds_planned": str(len(cell.runs)),
        "state": cell.state,
        "runs": _several(run.name for run in cell.runs),
        "commands": _several(run.command for run in cell.runs),
        **_of_runs(cell),
    }


def _of_runs(cell: Cell) -> dict[str, str]:
    """What each run of a cell has, or "none"."""
    known = [None if r.results is None else facts(r.results) for r in cell.runs]
    found = {
        "values": [value(run, cell.column.metric) for run in cell.runs],
        "images_per_second": [k and k.images_per_second for k in known],
        "seconds": [k and k.seconds for k in known],
    }
    return {
        name: _several("none" if v is None else f"{v:.4f}" for v in values)
        for name, values in found.items()
    }


def _no_formula(text: str) -> str:
    text = printable(text)
    if text[:1] in ("=", "+", "-", "@"):
        try:
            float(text)  # such as a difference below 0
        except ValueError:
            return f"'{text}"
    return text


def _several(texts: Iterable[str]) -> str:
    return "; ".join(texts)


def _section(section: Section, reduced: bool) -> list[str]:
    table, notes = section.table, section.notes()
    header = ["", *(column.label for column in table.columns)]
    rows = []
    for row in table.rows:
        origin = " (reported)" if row.origin.startswith("reported") else ""
        cells = [_cell(cell, notes, reduced) for cell in section.row(row)]
        rows.append([_escaped(row.label + origin), *cells])
    parts = [
        f"## {section.name}: {_escaped(table.title)}",
        _grid([_escaped(label) for label in header], rows),
    ]
    if notes:
        lines = [f"* [{mark}] {_escaped(reason)}" for reason, mark in notes.items()]
        parts.append("\n".join(lines))
    parts.append(f"Paper's numbers: {_escaped(table.source)}.")
    return parts


def _cell(cell: Cell, notes: dict[str, str], reduced: bool) -> str:
    if cell.mean is None:
        ours = _escaped(cell.state) if cell.runs else f"not run [{notes[cell.missing]}]"
    else:
        ours = f"**{cell.mean:.2f}**"
        ours += "" if cell.deviation is None else f" ± {cell.deviation:.2f}"
        count = len(cell.values)
        ours += f" ({cell.state or f'{count} seed' + ('s' if count > 1 else '')})"
    lower = "" if cell.paper is None else f"paper {cell.paper:.2f}"
    if cell.difference is not None:
        sign = "" if reduced else "≈ " if near(cell.difference) else "≠ "
        lower += f", {sign}{difference(cell.difference)}"
    return f"{ours}<br>{lower}" if lower else ours


def _runs(runs: Sequence[CellRun]) -> str:
    rows = []
    for run in runs:
        line = [_escaped(run.name), _escaped(str(run.seed)), _escaped(state(run))]
        known = None if run.results is None else facts(run.results)
        if known is None:
            line += ["–"] * 5
        else:
            speed = known.images_per_second
            place = known.environment
            versions = ", ".join(" ".join(pair) for pair in place.versions)
            line += [
                "–" if speed is None else rate(speed),
                wall_time(known),
                _escaped(place.device) or "–",
                _escaped(place.commit) or "–",
                _escaped(versions) or "–",
            ]
        rows.append(line)
    header = "run seed status images/s wall_time device commit versions".split()
    return _grid([name.replace("_", " ") for name in header], rows)


def _commands(runs: Iterable[CellRun]) -> str:
    # An indented block, which no content can end; a command is one line.
    lines = [f"    {' '.join(run.command.split())}" for run in runs if run.command]
    return "\n".join(lines) if lines else "None."


def _learned(runs: Iterable[CellRun]) -> str:
    found = [
        (run.name, learned(run.results)) for run in runs if run.results is not None
    ]
    return "\n".join(
        f"* {_escaped(name)}: {_escaped('; '.join(texts))}"
        for name, texts in found
        if texts
    )


def _fields(runs: Iterable[CellRun], defaults: Mapping[str, Any]) -> str:
    lines = []
    for run in runs:
        if run.results is not None:
            changed, _ = fields([run.results], defaults)
            shown = ", ".join(f"{field.name} = {field.value}" for field in changed)
            lines.append(f"* {_escaped(run.name)}: {_escaped(shown)}")
    return "\n".join(lines) if lines else "None."


def _grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def _escaped(text: str) -> str:
    """One line in which no character means anything to Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", " ".join(text.split()))


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
