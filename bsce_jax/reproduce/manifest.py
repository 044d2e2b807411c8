"""The list of cells and their runs from which the report page is made."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from bsce_jax import untrusted
from bsce_jax.errors import UserError
from bsce_jax.hosts.workdir import in_use
from bsce_jax.report import published, results
from bsce_jax.reproduce import tables
from bsce_jax.reproduce.process import workdir
from bsce_jax.reproduce.tables import TableCell

NAME = "manifest.json"


def write(
    output: pathlib.Path,
    protocol: str,
    cells: Sequence[TableCell],
    states: Mapping[str, str],
) -> None:
    """Writes OUTPUT/manifest.json; cells of earlier commands stay.

    {"schema": 1, "protocol": "full" or "reduced: ...", "cells": [{"table", "row",
    "column", "missing", "runs": [{"name", "seed", "workdir", "command", "status"}]}]}

    Args:
      output: folder of the runs.
      protocol: of the runs; earlier cells stay if theirs is the same.
      cells: those of this command.
      states: of the runs of this process by name; others' are read from the disk.
    """
    before = _cells_before(output, protocol)
    found = {}
    for cell in cells:
        runs = [
            {
                "name": job.name,
                "seed": job.seed,
                "workdir": workdir(job.name),
                "command": tables.shown_command(job.flags),
                "status": "to do",
            }
            for job in cell.jobs
        ]
        key = (cell.table, cell.row, cell.column)
        found[key] = {
            "table": cell.table,
            "row": cell.row,
            "column": cell.column,
            "missing": cell.missing,
            "runs": runs,
        }
    known = {run["name"]: run["status"] for run in _runs(before.values())}
    everything = before | found
    for run in _runs(everything.values()):
        name = run["name"]
        run["status"] = states.get(name) or _status(output, name, known.get(name))
        if run["status"] == "elsewhere":
            run["status"] = "running"
    manifest = {
        "schema": 1,
        "protocol": protocol,
        "cells": list(everything.values()),
    }
    text = json.dumps(manifest, indent=1) + "\n"
    results.replace(epath.Path(output) / NAME, text, shared=True)


def _cells_before(output: pathlib.Path, protocol: str) -> dict[tuple[str, ...], Any]:
    """The cells of an earlier manifest of this protocol, by table, row and column.

    Without those that the paper's tables, as they are written down now, have not.
    """
    known = {
        (key, row.key, column.key)
        for key, table in published.load().items()
        for row in table.rows
        for column in table.columns
    }
    try:
        manifest = untrusted.read_json(output / NAME, "cells and their runs")
        if manifest["protocol"] != protocol:
            return {}
        cells = {(c["table"], c["row"], c["column"]): c for c in manifest["cells"]}
        for run in _runs(cells.values()):
            run["name"], run["workdir"], run["status"]  # all have them
        return {key: cell for key, cell in cells.items() if key in known}
    except (UserError, KeyError, TypeError):
        return {}  # none, or not a manifest: this one takes its place


def _runs(cells: Any) -> list[dict[str, Any]]:
    return [run for cell in cells for run in cell["runs"]]


def _status(output: pathlib.Path, name: str, before: str | None) -> str:
    """The status of another process's run: only a failure is nowhere on the disk."""
    folder = output / workdir(name)
    if in_use(folder):
        return "running"
    try:
        if results.read(folder)["status"] == "done":
            return "done"
    except UserError:  # none yet, or broken
        pass
    return "failed" if before == "failed" else "to do"
