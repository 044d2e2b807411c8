"""Plain-text and Markdown tables of results (see `bsce_jax.report.results`)."""

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from bsce_jax.config import fields, names
from bsce_jax.config.hashes import digest, protocol
from bsce_jax.errors import printable
from bsce_jax.report.run_facts import own_values

Results = Mapping[str, Any]

COLUMNS = {
    "top1": "top-1",
    "top5": "top-5",
    "top1_nearest_mean": "NME",
    "top1_base": "base",
    "top1_old": "old",
    "top1_new": "new",
}
"""Accuracies of a step's record and what they are called wherever they are shown."""

_SHOWN = 3  # fields that tell runs of one name apart
_SUMMARY = {
    "average_incremental_top1": "avg. top-1",
    "average_incremental_top5": "avg. top-5",
    "average_incremental_nearest_mean": "avg. NME",
    "final_top1": "final",
    "final_base_top1": "final base",
    "forgetting": "forgetting",
}


def step_table(results: Results, markdown: bool = False, width: int = 0) -> str:
    """One row a step, and the average incremental accuracy of the run.

    Accuracies in percent over the test images of the classes seen so far, and over
    those of the base step's, all earlier steps' (old) and this step's classes (new);
    of the highest score, and under NME of the nearest mean of exemplars; memory in
    images, seconds of wall clock; what the method has learned beside the network,
    where it has.

    Args:
      results: of the run.
      markdown: for Markdown instead of a terminal.
      width: of the terminal, in which columns that matter less have no place; 0 = any.
    """
    header = ["step", "classes", *COLUMNS.values(), "memory", "seconds"]
    rows = []
    for record in results["steps"]:
        result = record["result"]
        rows.append(
            [str(record["step"]), str(result["num_seen"])]
            + [_number(result[name]) for name in COLUMNS]
            + [
                str(result["memory_images"]),
                _number(record["telemetry"].get("seconds"), digits=1),
            ]
        )
    learned = [own_values(record["result"]) for record in results["steps"]]
    if any(learned):
        header.append("learned")
        rows = [[*row, text or "-"] for row, text in zip(rows, learned, strict=True)]
    for name in ("learned", "seconds", "memory", "top-5", "old", "base", "NME"):
        if 0 < width < len(_format(header, rows, markdown).partition("\n")[0]):
            kept = [i for i, title in enumerate(header) if title != name]
            header = [header[i] for i in kept]
            rows = [[row[i] for i in kept] for row in rows]
    average = results["summary"]["average_incremental_top1"]
    top5 = results["summary"]["average_incremental_top5"]
    last = f"average incremental accuracy: top-1 {_number(average)}"
    if top5 is not None:
        last += f", top-5 {_number(top5)}"
    nearest = results["summary"]["average_incremental_nearest_mean"]
    if nearest is not None:
        last += f", nearest mean of exemplars {_number(nearest)}"
    if results["status"] != "done":
        last += " so far"
    if width:
        last = textwrap.fill(last, width)
    return f"{_format(header, rows, markdown)}\n\n{last}"


def comparison(runs: Sequence[Results], markdown: bool = False) -> str:
    """One row for all finished runs of one protocol: mean and deviation over seeds.

    Accuracies in percent. The deviation is the sample standard deviation, where there
    are at least two runs. Steps are the incremental ones. A run that is not finished
    has a row of its own.
    """
    header = ["run", "seeds", "steps", *_SUMMARY.values()]
    sign = "±" if markdown else "+-"
    rows = []
    for label, group in groups(runs).items():
        steps = max(0, len(group[0]["steps"]) - 1)
        columns = [[results["summary"][name] for results in group] for name in _SUMMARY]
        means = [_mean(column, sign) for column in columns]
        rows.append([label, _seeds(group), str(steps), *means])
    return _format(header, rows, markdown, left=1)


def groups(runs: Sequence[Results]) -> dict[str, list[Results]]:
    """Runs that differ only in the seed, by name, in the order given.

    They have the same protocol and data; a run that is given twice counts once. Of
    others with the same name, the name says what tells them apart. A run that is not
    finished stands alone, since an average over fewer steps cannot be compared.
    """
    grouped: dict[Any, list[Results]] = {}
    for results in runs:
        done = results["status"] == "done"
        key = (
            digest([protocol(results["config"]), results["data"]]),
            tuple(classes_seen(results)),
            None if done else seed(results),
        )
        group = grouped.setdefault(key, [])
        if seed(results) not in map(seed, group):
            group.append(results)
    return dict(zip(_labels(list(grouped.values())), grouped.values(), strict=True))


def title(results: Results) -> str:
    """A run in a legend: the name that it was given, or method and prior."""
    try:
        own = results["name"] != names.default_name(results["config"])
        return results["name"] if own else names.title(results["config"])
    except (KeyError, TypeError, ValueError):  # of another version
        return results["name"]


def _labels(grouped: Sequence[Sequence[Results]]) -> list[str]:
    """A name for each group, no two the same."""
    firsts = [group[0] for group in grouped]
    titles = [title(first) for first in firsts]
    labels: list[str] = []
    for first, own in zip(firsts, titles, strict=True):
        namesakes = [o for o, t in zip(firsts, titles, strict=True) if t == own]
        facts = _apart(first, namesakes)
        if first["status"] != "done":
            facts = [*facts, f"seed {seed(first)}", "unfinished"]
        label = f"{own} ({', '.join(facts)})" if facts else own
        label = printable(label)  # its place is a terminal or a picture
        labels.append(label if label not in labels else f"{label} #{len(labels) + 1}")
    return labels


def _apart(results: Results, others: Sequence[Results]) -> list[str]:
    """The fields, with their values, in which runs of the same name differ."""
    protocols = [protocol(other["config"]) for other in others]
    known = sorted({name for found in protocols for name in found})
    differing = [n for n in known if len({repr(p.get(n)) for p in protocols}) > 1]
    shown = [f"{name}={_value(results, name)}" for name in differing[:_SHOWN]]
    more = len(differing) - _SHOWN
    return [*shown, f"{more} more"] if more > 0 else shown


def _value(results: Results, name: str) -> str:
    field = fields.find(name)
    default = "absent" if field is None else field.default
    value = results["config"].get(name, default)
    return f"{value:g}" if isinstance(value, float) else str(value)


def classes_seen(results: Results) -> list[int]:
    """Number of classes seen after each step, [steps]."""
    return [record["result"]["num_seen"] for record in results["steps"]]


def seed(results: Results) -> str:
    """Seed of a run as text, "?" where its configuration has none."""
    return str(results["config"].get("seed", "?"))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, which is 0 for a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), deviation


def _mean(values: Sequence[float | None], sign: str) -> str:
    present = [value for value in values if value is not None]
    if len(present) < len(values) or not present:
        return "-"
    mean, deviation = mean_and_deviation(present)
    return f"{mean:.2f} {sign} {deviation:.2f}" if len(present) > 1 else f"{mean:.2f}"


def _seeds(group: Sequence[Results]) -> str:
    return ",".join(sorted(map(seed, group), key=lambda text: (len(text), text)))


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _format(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    markdown: bool,
    left: int = 0,
) -> str:
    """Aligns columns: the first `left` to the left, all others to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if markdown:
        rule = ["---" if column < left else "---:" for column in range(len(header))]
        cells = [
            [cell.replace("|", "\\|") for cell in row] for row in (header, rule, *rows)
        ]
        return "\n".join(f"| {' | '.join(row)} |" for row in cells)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        cells_of_row = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells_of_row).rstrip())
    return "\n".join(lines)
