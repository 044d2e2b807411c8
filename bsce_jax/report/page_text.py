"""The report as Markdown and as CSV."""

import csv
import io
import re
from collections.abc import Iterable, Sequence

from bsce_jax.report.cells import NEAR, Cell, Report, Run, Section
from bsce_jax.report.page_html import PAPER, difference, near, summary
from bsce_jax.report.page_runs import state
from bsce_jax.report.run_facts import duration, facts, rate

CSV_FIELDS = (
    "protocol", "table", "row", "column", "row_label", "column_label", "metric",
    "origin", "paper", "ours", "difference", "deviation", "seeds_done",
    "seeds_planned", "state", "runs",
)  # fmt: skip


def markdown(report: Report) -> str:
    """The tables, the runs and their commands; the pictures are on the HTML page."""
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
    parts += ["## Runs", _runs(report.runs), "## Commands", _commands(report.runs)]
    return "\n\n".join(parts) + "\n"


def csv_table(report: Report) -> str:
    """One line a cell; empty where there is no number."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for section in report.sections:
        for cell in section.cells.values():
            writer.writerow(
                {
                    "protocol": report.protocol,
                    "table": section.table.key,
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
                    "seeds_done": len(cell.values),
                    "seeds_planned": len(cell.runs),
                    "state": cell.state,
                    "runs": " ".join(run.name for run in cell.runs),
                }
            )
    return buffer.getvalue()


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


def _runs(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        line = [_escaped(run.name), str(run.seed), _escaped(state(run))]
        known = None if run.results is None else facts(run.results)
        if known is None:
            line += ["–"] * 5
        else:
            speed, seconds = known.images_per_second, known.seconds
            place = known.environment
            versions = ", ".join(" ".join(pair) for pair in place.versions)
            line += [
                "–" if speed is None else rate(speed),
                "–" if seconds is None else duration(seconds),
                _escaped(place.device) or "–",
                _escaped(place.commit) or "–",
                _escaped(versions) or "–",
            ]
        rows.append(line)
    header = "run seed status images/s wall_time device commit versions".split()
    return _grid([name.replace("_", " ") for name in header], rows)


def _commands(runs: Iterable[Run]) -> str:
    # An indented block, which no content can end; a command is one line.
    lines = [f"    {' '.join(run.command.split())}" for run in runs if run.command]
    return "\n".join(lines) if lines else "None."


def _grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def _escaped(text: str) -> str:
    """One line in which no character means anything to Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", " ".join(text.split()))


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
