"""Cells of the paper's tables: the published number beside the runs that repeat it."""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from bsce_jax.errors import UserError
from bsce_jax.report.run_facts import facts

if TYPE_CHECKING:
    from bsce_jax.report.published import Column, Row, Table

Results = Mapping[str, Any]

NEAR = 1.0  # points: a mean this close to the paper's number agrees with it
FULL = "full"  # the protocol whose numbers can be compared with the paper's
_SCHEMA = 1


class CellRun(NamedTuple):
    """One run of a cell; `results` is None where there are none yet."""

    name: str
    seed: int
    workdir: str
    command: str
    status: str
    results: Results | None

    @property
    def done(self) -> bool:
        """Whether it is finished, which its own results know best."""
        return self.results is not None and self.results["status"] == "done"

    @property
    def skipped(self) -> int:
        """Test images that could not be read, in the step with most of them."""
        return 0 if self.results is None else facts(self.results).skipped


class Cell(NamedTuple):
    """One number of a table, and the runs of all its seeds."""

    row: "Row"
    column: "Column"
    missing: str  # why there is no run; "" where there are runs
    runs: tuple[CellRun, ...]

    @property
    def paper(self) -> float | None:
        """The published number, in percent."""
        return self.row.values.get(self.column.key)

    @property
    def values(self) -> list[float]:
        """The same number of every finished run."""
        found = [value(run, self.column.metric) for run in self.runs if run.done]
        return [number for number in found if number is not None]

    @property
    def mean(self) -> float | None:
        """Mean over the finished runs."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the finished runs, of two or more."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's, in points."""
        if self.mean is None or self.paper is None:
            return None
        return self.mean - self.paper

    @property
    def state(self) -> str:
        """What keeps the cell from being complete, "" where nothing does."""
        if not self.runs:
            return self.missing
        left = [run for run in self.runs if not run.done]
        if not left:
            skipped = any(run.skipped for run in self.runs)
            complete = "some test images skipped" if skipped else ""
            return complete if self.values else "not measured"
        if self.values:
            return f"{len(self.values)} of {len(self.runs)} seeds"
        # A run that calls itself done without being so was cut off.
        states = ["unfinished" if r.status == "done" else r.status for r in left]
        return ", ".join(dict.fromkeys(states))


class Section(NamedTuple):
    """A table or figure of the paper; cells by keys of row and column."""

    table: "Table"
    cells: Mapping[tuple[str, str], Cell]

    @property
    def name(self) -> str:
        """As the paper calls it: "Table 1"."""
        return re.sub(r"^(\D+)(\d+\D?)$", r"\1 \2", self.table.key).capitalize()

    def row(self, row: "Row") -> list[Cell]:
        """Cells of a row, in the order of the columns."""
        return [self.cells[row.key, column.key] for column in self.table.columns]

    def notes(self) -> dict[str, str]:
        """Reason of cells without runs -> the letter that marks them."""
        reasons = [cell.missing for row in self.table.rows for cell in self.row(row)]
        distinct = dict.fromkeys(reason for reason in reasons if reason)
        return {reason: letter(number) for number, reason in enumerate(distinct)}


class Report(NamedTuple):
    """All that the page shows."""

    protocol: str
    sections: tuple[Section, ...]

    @property
    def reduced(self) -> bool:
        """Whether the numbers cannot be compared with the paper's."""
        return self.protocol != FULL

    @property
    def cells(self) -> list[Cell]:
        """Cells of all tables, in order."""
        return [cell for section in self.sections for cell in section.cells.values()]

    @property
    def runs(self) -> list[CellRun]:
        """Every run once, in order of appearance."""
        found = {run.workdir: run for cell in self.cells for run in cell.runs}
        return list(found.values())


def workdirs(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Status of each run of a manifest, by workdir.

    Raises:
      UserError: the manifest breaks its schema.
    """
    if not isinstance(manifest, Mapping) or manifest.get("schema") != _SCHEMA:
        raise UserError(f"manifest: expected an object of schema {_SCHEMA}")
    found: dict[str, str] = {}
    try:
        for cell in manifest["cells"]:
            if not all(isinstance(cell[k], str) for k in ("table", "row", "column")):
                raise TypeError("table, row and column: expected text")
            for run in cell["runs"]:
                if not all(isinstance(run[k], str) for k in ("workdir", "status")):
                    raise TypeError("workdir and status: expected text")
                found[run["workdir"]] = run["status"]
    except KeyError as error:
        raise UserError(f"manifest: a cell or a run has no {error}") from None
    except TypeError as error:
        raise UserError(f"manifest: a cell or a run is not valid: {error}") from None
    return found


def build(
    manifest: Mapping[str, Any],
    results: Mapping[str, Results],
    published: Mapping[str, "Table"],
) -> Report:
    """Joins what was run to what was published.

    Args:
      manifest: cells and their runs, as the runner writes them.
      results: by workdir, of the runs that have some.
      published: the paper's tables, by key; those of no cell are left out.

    Raises:
      UserError: the manifest breaks its schema or names an unknown cell.
    """
    workdirs(manifest)
    given: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for entry in manifest["cells"]:
        key = (entry["table"], entry["row"], entry["column"])
        table = published.get(key[0])
        known = table is not None and (
            key[1] in {row.key for row in table.rows}
            and key[2] in {column.key for column in table.columns}
        )
        if not known:
            raise UserError(f"manifest: cell {'/'.join(key)} is not in the paper")
        given[key] = entry
    shown = {key[0] for key in given}
    sections = tuple(
        _section(table, given, results)
        for table in published.values()
        if table.key in shown
    )
    return Report(str(manifest.get("protocol", "reduced: not said")), sections)


def value(run: CellRun, metric: str) -> float | None:
    """One of `published.METRICS` of a run, None where it has none."""
    if run.results is None or not run.results["steps"]:
        return None
    if metric == "base_step_top1":
        return run.results["steps"][0]["result"]["top1"]
    if metric == "final_later_top1":
        return _later_classes(run.results)
    return run.results["summary"].get(metric)


def _later_classes(results: Results) -> float | None:
    """Accuracy after the newest step on the classes learned after the base step."""
    base = results["steps"][0]["result"]["num_seen"]
    confusion = results["steps"][-1]["result"].get("confusion", ())
    later = [
        (true == other, images) for true, other, images in confusion if true >= base
    ]
    total = sum(images for _, images in later)
    return 100 * sum(images for hit, images in later if hit) / total if total else None


def labelled(section: Section, columns: Sequence["Column"]) -> list[Results]:
    """Results of the finished runs of columns, each named as its row is.

    Of rows that share a run the last one names it: the first repeats a number of the
    literature.
    """
    labels = [row.label for row in section.table.rows]
    named: dict[str, Results] = {}
    for row in section.table.rows:
        twice = labels.count(row.label) > 1
        name = f"{row.label} ({row.key})" if twice else row.label
        for column in columns:
            for run in section.cells[row.key, column.key].runs:
                if run.results is not None and run.done and run.results["steps"]:
                    named[run.workdir] = {**run.results, "name": name}
    return list(named.values())


def column_groups(section: Section) -> list[tuple["Column", ...]]:
    """Columns that show other numbers of the same runs, together."""
    groups: dict[Any, list[Column]] = {}
    for column in section.table.columns:
        runs = [
            tuple(run.workdir for run in section.cells[row.key, column.key].runs)
            for row in section.table.rows
        ]
        key = tuple(runs) if any(runs) else column.key
        groups.setdefault(key, []).append(column)
    return [tuple(group) for group in groups.values()]


def letter(number: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    first, last = divmod(number, 26)
    return (letter(first - 1) if first else "") + chr(ord("a") + last)


def _section(
    table: "Table",
    given: Mapping[tuple[str, str, str], Mapping[str, Any]],
    results: Mapping[str, Results],
) -> Section:
    cells = {}
    for row in table.rows:
        for column in table.columns:
            entry = given.get((table.key, row.key, column.key), {})
            # A run counts once, whatever seeds it is said to be of.
            distinct = {run["workdir"]: run for run in entry.get("runs", ())}
            runs = tuple(_run(run, results) for run in distinct.values())
            missing = "" if runs else entry.get("missing") or "not asked for"
            cells[row.key, column.key] = Cell(row, column, missing, runs)
    return Section(table, cells)


def _run(entry: Mapping[str, Any], results: Mapping[str, Results]) -> CellRun:
    return CellRun(
        name=str(entry.get("name", entry["workdir"])),
        seed=entry.get("seed", 0),
        workdir=entry["workdir"],
        command=str(entry.get("command", "")),
        status=entry["status"],
        results=results.get(entry["workdir"]),
    )
