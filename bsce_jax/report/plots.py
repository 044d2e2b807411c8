"""Figures of results as PNG files: accuracy curves, confusion matrices, alpha.

Figures are objects with their own Agg canvas: no pyplot, no global state, and the same
results give the same bytes. Colours are those of Okabe and Ito, which colour-blind
readers can tell apart, and a grey; runs differ in marker and line style too.
"""

import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from bsce_jax.errors import UserError, printable
from bsce_jax.report import tables
from bsce_jax.report.results import replace

Results = Mapping[str, Any]

COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#8C8C8C",
)
MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", ":")
MAX_CELLS = 250  # a side of a drawn confusion matrix
LINE_COLOR = COLORS[1]  # between old and new classes: far from the blue of the counts

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.edgecolor": "none",
    "figure.dpi": 160,
    "text.parse_math": False,  # a "$" in a name is only a character
}


def draw(runs: Sequence[Results], folder: epath.Path) -> list[epath.Path]:
    """Draws curves.png, confusion.png and, where it was learned, alpha.png.

    Returns:
      The files, which may have been there before and then are replaced.

    Raises:
      UserError: no run has a finished step.
    """
    curves, confusion = folder / "curves.png", folder / "confusion.png"
    accuracy_curves(runs, curves)
    confusion_matrices(runs, confusion)
    alpha = folder / "alpha.png"
    return [curves, confusion, *([alpha] if alpha_curve(runs, alpha) else [])]


def accuracy_curves(runs: Sequence[Results], path: epath.PathLike) -> None:
    """Draws top-1 accuracy after each step against the number of classes seen.

    Seeds of one name are one line, their mean, in a band of one sample standard
    deviation to each side. Where a run has a memory, a second panel shows the nearest
    mean of exemplars.

    Raises:
      UserError: no run has a finished step.
    """
    finished = _finished(runs)
    panels = [("highest score", "top1", "average_incremental_top1")]
    nearest = "average_incremental_nearest_mean"
    if any(r["summary"][nearest] is not None for g in finished.values() for r in g):
        panels.append(("nearest mean of exemplars", "top1_nearest_mean", nearest))
    below = len(finished) > 4  # more lines would be hidden by the legend
    height = 4.4 + 0.2 * len(finished) if below else 4.0
    place = {"loc": "upper left", "bbox_to_anchor": (0, -0.14)} if below else {}
    with canvas((0.6 + 5.8 * len(panels), height), path) as figure:
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, name, average) in zip(all_axes, panels, strict=True):
            _curves(axes, finished, name, average)
            axes.set_title(title if len(panels) > 1 else "")
            axes.set_xlabel("number of classes")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            title = "average incremental accuracy (%)"
            axes.legend(title=title, alignment="left", **place)
        all_axes[0].set_ylabel("top-1 accuracy (%)")


def _curves(
    axes: Axes, finished: Mapping[str, list[Results]], name: str, average: str
) -> None:
    """One line a name, of the runs that have the accuracy."""
    for index, (label, every) in enumerate(finished.items()):
        group = [run for run in every if run["summary"][average] is not None]
        if not group:
            continue
        averages = [results["summary"][average] for results in group]
        classes = tables.classes_seen(group[0])
        values = [
            [record["result"][name] for record in results["steps"]] for results in group
        ]
        mean, deviation = tables.mean_and_deviation(averages)
        text = f"{mean:.1f} ± {deviation:.1f}" if len(group) > 1 else f"{mean:.1f}"
        _band(axes, index, classes, values, f"{label}: {text}", MARKERS)


def confusion_matrices(runs: Sequence[Results], path: epath.PathLike) -> None:
    """Draws log(1 + images) of true against predicted class after the newest step.

    As Figures 2 and 5 of Jodelet et al.: classes in class order, a line between old
    and new classes. One panel a name, for the first seed given.

    Raises:
      UserError: no run has a finished step.
    """
    panels = [(label, group[0]) for label, group in _finished(runs).items()]
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    matrices = [_confusion(results) for _, results in panels]
    norm = Normalize(0.0, math.log1p(max(1, *(int(m.max()) for m in matrices))))
    colors = matplotlib.colormaps["Blues"]
    with canvas((3.5 * columns + 0.9, 4.0 * rows), path, "compressed") as figure:
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        used = grid[: len(panels)]
        for axes in grid[len(panels) :]:
            axes.remove()
        for axes, (label, results), matrix in zip(used, panels, matrices, strict=True):
            result = results["steps"][-1]["result"]
            title = f"{textwrap.fill(label, 34)}\ntop-1 {result['top1']:.1f} %"
            axes.set_title(title, pad=16)
            _draw_matrix(axes, matrix, result["num_seen"], colors, norm)
            _class_axes(axes, results["class_names"][: result["num_seen"]])
            _mark_old(axes, result["num_old"], result["num_seen"])
        bar = figure.colorbar(
            ScalarMappable(norm, colors), ax=used, shrink=0.85, aspect=25 * rows
        )
        largest = math.expm1(norm.vmax or 0.0) + 0.5
        ticks = [count for count in (0, 1, 3, 10, 30, 100, 300) if count < largest]
        bar.set_ticks([math.log1p(count) for count in ticks], labels=[*map(str, ticks)])
        bar.set_label("test images, log(1 + x) scale")


def alpha_curve(runs: Sequence[Results], path: epath.PathLike) -> bool:
    """Draws alpha of Meta BalancedS-CE (Jodelet et al., Algorithm 1) over the updates.

    Each incremental step takes one unit of the axis, whatever its number of updates.

    Returns:
      Whether there was one to draw; if not, nothing is written.
    """
    learned = [
        results
        for results in runs
        if any(record["result"]["alpha"] for record in results["steps"])
    ]
    if not learned:
        return False
    with canvas((6.4, 3.4), path) as figure:
        axes = figure.add_subplot()
        last = 0
        for index, (label, group) in enumerate(tables.groups(learned).items()):
            curves = [_alpha(results) for results in group]
            position = curves[0][0]
            # Few points are marked: a step with a single one has no line.
            markers = MARKERS if len(position) <= 60 else ""
            if all(np.array_equal(position, other) for other, _ in curves):
                values = [value for _, value in curves]
                _band(axes, index, position, values, label, markers)
            else:  # seeds logged at different updates have no mean to draw
                for number, (position, value) in enumerate(curves):
                    shown = "_nolegend_" if number else label
                    _band(axes, index, position, [value], shown, markers)
            last = max(last, *(results["steps"][-1]["step"] for results in group))
        axes.axhline(1.0, color="#555555", linestyle=":", label="α = 1: BalancedS-CE")
        for boundary in range(2, last + 1):
            axes.axvline(boundary, color="#bbbbbb", linewidth=0.8)
        every = max(1, math.ceil(last / 12))
        steps = range(1, last + 1, every)
        axes.set_xticks([step + 0.5 for step in steps], [str(step) for step in steps])
        axes.tick_params(axis="x", length=0)
        axes.grid(False, axis="x")
        axes.set_xlim(1, last + 1)
        axes.set_xlabel("incremental step, first to last update")
        axes.set_ylabel("α, weight of old classes")
        figure.legend(loc="outside upper right", ncols=2)
    return True


@contextmanager
def canvas(
    size: tuple[float, float],
    path: epath.PathLike,
    layout: Literal["constrained", "compressed"] = "constrained",
) -> Iterator[Figure]:
    """A figure of a size in inches that is saved at the end, in this module's style.

    Raises:
      UserError: it cannot be written.
    """
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Of a class's name in letters that the font has not: they are drawn as boxes.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")
        matplotlib.rcdefaults()  # not the reader's own settings
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=size, layout=layout)
        canvas = FigureCanvasAgg(figure)
        yield figure
        file = io.BytesIO()
        canvas.print_png(file, metadata={"Software": None})
        replace(epath.Path(path), file.getvalue())


def _finished(runs: Sequence[Results]) -> dict[str, list[Results]]:
    finished = [results for results in runs if results["steps"]]
    if not finished:
        raise UserError("nothing to draw: no run has a finished step")
    return tables.groups(finished)


def _band(
    axes: Axes,
    index: int,
    x: ArrayLike,
    values: ArrayLike,
    label: str,
    markers: str = "",
) -> None:
    """Line of the mean over runs of values [runs, points], with its deviation."""
    values = np.asarray(values)
    mean = values.mean(axis=0)
    color = COLORS[index % len(COLORS)]
    axes.plot(
        x,
        mean,
        color=color,
        linestyle=LINES[index % len(LINES)],
        marker=markers[index % len(markers)] if markers else "",
        markersize=5,
        linewidth=1.6,
        label=label,
    )
    if len(values) > 1:
        deviation = values.std(axis=0, ddof=1)
        low, high = mean - deviation, mean + deviation
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def _confusion(results: Results) -> NDArray[np.int64]:
    """Images [true, predicted], summed over square blocks where classes are many."""
    result = results["steps"][-1]["result"]
    block = math.ceil(result["num_seen"] / MAX_CELLS)
    cells = math.ceil(result["num_seen"] / block)
    matrix = np.zeros((cells, cells), np.int64)
    for true, predicted, images in result["confusion"]:
        matrix[true // block, predicted // block] += images
    return matrix


def _draw_matrix(
    axes: Axes,
    matrix: NDArray[np.int64],
    num_seen: int,
    colors: Colormap,
    norm: Normalize,
) -> None:
    block = math.ceil(num_seen / MAX_CELLS)
    end = len(matrix) * block - 0.5  # the last block may reach beyond the classes
    axes.imshow(np.log1p(matrix), colors, norm, extent=(-0.5, end, end, -0.5))
    axes.set(xlim=(-0.5, num_seen - 0.5), ylim=(num_seen - 0.5, -0.5))
    if num_seen <= 12:
        _write_counts(axes, matrix)


def _class_axes(axes: Axes, names: Sequence[str]) -> None:
    """Ticks with class names where they fit, else with positions."""
    count = len(names)
    if count <= 20:
        names = [printable(name) for name in names]
        short = [name if len(name) <= 14 else f"{name[:13]}…" for name in names]
        upright = max(map(len, short)) <= 2
        axes.set_xticks(range(count), short, rotation=0 if upright else 90)
        axes.set_yticks(range(count), short)
    else:
        locator = MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10])
        ticks = [int(tick) for tick in locator.tick_values(0, count) if tick < count]
        axes.set_xticks(ticks)
        axes.set_yticks(ticks)
    axes.tick_params(length=2, labelsize=8)
    axes.grid(False)
    block = math.ceil(count / MAX_CELLS)
    cells = f", a cell: {block} x {block}" if block > 1 else ""
    axes.set_xlabel(f"predicted class (class order{cells})")
    axes.set_ylabel("true class (class order)")
    axes.spines[:].set_visible(True)


def _mark_old(axes: Axes, num_old: int, num_seen: int) -> None:
    """Lines between old and new classes, and their names above the matrix."""
    if not num_old:
        return
    edge = num_old - 0.5
    axes.axhline(edge, color=LINE_COLOR, linewidth=1.2)
    axes.axvline(edge, color=LINE_COLOR, linewidth=1.2)
    for name, middle in (("old", num_old / 2), ("new", (num_old + num_seen) / 2)):
        axes.annotate(
            name,
            (middle - 0.5, -0.5),
            (0, 3),
            textcoords="offset points",
            ha="center",
            color=LINE_COLOR,
            fontsize=9,
        )


def _write_counts(axes: Axes, matrix: NDArray[np.int64]) -> None:
    dark = np.log1p(matrix) > 0.6 * math.log1p(matrix.max())
    for true, predicted in np.argwhere(matrix):
        axes.text(
            predicted,
            true,
            str(matrix[true, predicted]),
            ha="center",
            va="center",
            fontsize=7,
            color="white" if dark[true, predicted] else "black",
        )


def _alpha(results: Results) -> tuple[list[float], list[float]]:
    """Position on the axis of steps, and value, of every logged alpha.

    A NaN after each step keeps its end from being joined to the next step's start.
    """
    position, value = [], []
    for record in results["steps"]:
        updates = [update for update, _ in record["result"]["alpha"]]
        length = max([1, *updates])
        position += [record["step"] + update / length for update in updates]
        value += [alpha for _, alpha in record["result"]["alpha"]]
        position.append(record["step"] + 1.0)
        value.append(math.nan)
    return position, value
