"""Pictures of the tables' runs, as PNG files in memory with their text alternatives."""

import io
import pathlib
import re
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from PIL import Image

from bsce_jax.report import plots, tables
from bsce_jax.report.cells import Cell, Results, Section, column_groups, labelled

if TYPE_CHECKING:
    from bsce_jax.report.published import Column

COLORS = 256  # of a picture's palette: a third of the bytes, no visible difference
DENSITY = 1.6  # pixels of a picture for one of the page
_PAPER: dict[str, Any] = {"linestyle": "--", "linewidth": 1.0, "mfc": "white"}
_NEAREST = "average_incremental_nearest_mean"


class Picture(NamedTuple):
    """A PNG file; size in pixels of the page, `text` says what is to be seen."""

    caption: str
    text: str
    png: bytes
    width: int
    height: int


def pictures(section: Section, drawn: set[tuple[str, ...]]) -> list[Picture]:
    """Pictures of a table or figure, none of runs that are not finished.

    Args:
      section: the table.
      drawn: runs of the matrices and courses of alpha in earlier tables, which are
        not repeated; those of this one are added.
    """
    kind, found = section.table.key, []
    groups = column_groups(section)
    for columns in groups:
        runs = labelled(section, columns)
        if not runs:
            continue
        where = f": {_common(columns)}" if len(groups) > 1 else ""
        if kind.startswith("figure4"):
            found.append(_epsilon_sweep(section, columns, where))
            continue
        key = tuple(sorted(f"{run['name']} {run['config_hash']}" for run in runs))
        if kind.startswith("table"):
            found.append(_curves(runs, where))
        if kind == "table5":
            found.append(_alpha_sweep(section, columns, where))
        if kind.startswith("figure") or key not in drawn:
            found.append(_confusion(runs, where))
            if any(record["result"]["alpha"] for r in runs for record in r["steps"]):
                found.append(_alpha(runs, where))
        drawn.add(key)
    return found


def _curves(runs: Sequence[Results], where: str) -> Picture:
    # The tables are of the highest score: no panel for the nearest mean of exemplars.
    runs = [{**run, "summary": {**run["summary"], _NEAREST: None}} for run in runs]
    lines = []
    for label, group in tables.groups(runs).items():
        classes = tables.classes_seen(group[0])
        values = [[r["result"]["top1"] for r in run["steps"]] for run in group]
        steps = zip(np.mean(values, axis=0), classes, strict=True)
        shown = ", ".join(f"{mean:.1f} ({seen})" for mean, seen in steps)
        lines.append(f"{label}: {shown}")
    text = "Top-1 accuracy after each step (and number of classes). " + "; ".join(lines)
    return _picture(
        f"Accuracy after each step{where}",
        text,
        lambda path: plots.accuracy_curves(runs, path),
    )


def _confusion(runs: Sequence[Results], where: str) -> Picture:
    names = [
        f"{label} ({group[0]['steps'][-1]['result']['top1']:.1f} % correct)"
        for label, group in tables.groups(runs).items()
    ]
    return _picture(
        f"Confusion matrices after the last step, log(1 + x), of one seed{where}",
        "True against predicted class after the last step. " + "; ".join(names),
        lambda path: plots.confusion_matrices(runs, path),
    )


def _alpha(runs: Sequence[Results], where: str) -> Picture:
    lines = []
    for label, group in tables.groups(runs).items():
        ends = [
            [r["result"]["alpha"][-1][1] for r in run["steps"] if r["result"]["alpha"]]
            for run in group
        ]
        if all(ends):
            means = np.mean(ends, axis=0)
            lines.append(f"{label}: {', '.join(f'{mean:.3g}' for mean in means)}")
    text = "Alpha over the updates; at the end of each step, mean. " + "; ".join(lines)
    return _picture(
        f"Course of α{where}", text, lambda path: plots.alpha_curve(runs, path)
    )


def _alpha_sweep(section: Section, columns: Sequence["Column"], where: str) -> Picture:
    """Accuracies of Jodelet et al., Table 5, by the way alpha is set."""
    rows = section.table.rows
    short = [textwrap.fill(row.label.replace("alpha", "α"), 14) for row in rows]
    fixed = sum("=" in row.label for row in rows)  # only these are joined by a line

    def draw(path: pathlib.Path) -> None:
        with plots.canvas((6.4, 4.0), path) as figure:
            axes = figure.add_subplot()
            for index, column in enumerate(columns):
                cells = [section.cells[row.key, column.key] for row in rows]
                _series(axes, index, range(fixed), cells[:fixed])
                _series(axes, index, range(fixed, len(cells)), cells[fixed:])
            axes.set_xticks(range(len(rows)), short)
            axes.set_ylabel("top-1 accuracy (%)")
            labels = [column.label.rpartition(", ")[2] for column in columns]
            _legend(figure, dict(enumerate(labels)), paper=True)

    lines = [
        f"{row.label}, {column.label}: {_both(section.cells[row.key, column.key])}"
        for row in rows
        for column in columns
    ]
    return _picture(f"Accuracy by α{where}", "; ".join(lines), draw)


def _epsilon_sweep(
    section: Section, columns: Sequence["Column"], where: str
) -> Picture:
    """Jodelet et al., Figure 4: linear up to 0.1 % and logarithmic above."""
    rows = section.table.rows
    epsilon = [float(row.key.removeprefix("epsilon-")) for row in rows]
    by_column = [[section.cells[row.key, c.key] for row in rows] for c in columns]

    def draw(path: pathlib.Path) -> None:
        with plots.canvas((6.4, 4.0), path) as figure:
            axes = figure.add_subplot()
            for index, cells in enumerate(by_column):
                _series(axes, index, epsilon, cells)
            axes.set_xscale("symlog", linthresh=0.1)
            ticks = [0, 0.05, 0.1, 1, 10, 100]
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xlabel("ε (% of the images of a class)")
            axes.set_ylabel("top-1 accuracy (%)")
            labels = [column.label.rpartition(", ")[2] for column in columns]
            paper = any(c.paper is not None for cells in by_column for c in cells)
            _legend(figure, dict(enumerate(labels)), paper)

    lines = [
        f"{column.label}, ε = {row.label}: {_both(cell)}"
        for column, cells in zip(columns, by_column, strict=True)
        for row, cell in zip(rows, cells, strict=True)
        if cell.mean is not None
    ]
    return _picture(f"Accuracy by ε{where}", "; ".join(lines), draw)


def _series(axes: Axes, index: int, x: Sequence[float], cells: Sequence[Cell]) -> None:
    """Ours in full, with the deviation; the paper's hollow and dashed."""
    paper = [np.nan if cell.paper is None else cell.paper for cell in cells]
    axes.plot(x, paper, **_style(index) | _PAPER)
    ours = [
        (position, cell.mean, cell.deviation or 0.0)
        for position, cell in zip(x, cells, strict=True)
        if cell.mean is not None
    ]
    if ours:
        where, means, deviations = map(list, zip(*ours, strict=True))
        axes.errorbar(where, means, deviations, capsize=3, **_style(index))


def _legend(figure: Any, labels: Mapping[int, str], paper: bool) -> None:
    """Names the series by their index, and ours and the paper's by their style."""
    handles = [Line2D([], [], label=labels[index], **_style(index)) for index in labels]
    grey = _style(0) | {"color": "#555555"}
    handles.append(Line2D([], [], label="ours", **grey))
    if paper:
        handles.append(Line2D([], [], label="paper", **grey | _PAPER))
    figure.legend(handles=handles, loc="outside upper right", ncols=3)


def _style(index: int) -> dict[str, Any]:
    return {
        "color": plots.COLORS[index % len(plots.COLORS)],
        "marker": plots.MARKERS[index % len(plots.MARKERS)],
        "markersize": 5,
        "linewidth": 1.6,
    }


def _both(cell: Cell) -> str:
    ours = "none" if cell.mean is None else f"{cell.mean:.2f} %"
    return ours + ("" if cell.paper is None else f" (paper {cell.paper:.2f} %)")


def _common(columns: Sequence["Column"]) -> str:
    """Label of columns: what they share before the comma, if they do."""
    if len(columns) == 1:
        return columns[0].label
    shared = {re.sub(", [^,]*$", "", column.label) for column in columns}
    return shared.pop() if len(shared) == 1 else "; ".join(c.label for c in columns)


def _picture(caption: str, text: str, draw: Callable[[pathlib.Path], Any]) -> Picture:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "picture.png"
        draw(path)
        with Image.open(path) as image:
            few = image.convert("RGB").quantize(
                COLORS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
            )
    buffer = io.BytesIO()
    few.save(buffer, "PNG", optimize=True)
    width, height = (round(side / DENSITY) for side in few.size)
    return Picture(caption, text, buffer.getvalue(), width, height)
