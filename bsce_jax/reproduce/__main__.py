"""Runs the tables and figures of the paper: python -m bsce_jax.reproduce --table 1."""

import argparse
import contextlib
import os
import pathlib
import re
import shlex
import sys
import time
from collections.abc import Iterable, Sequence

from bsce_jax import terminal

if __name__ == "__main__":
    _BEGAN = time.monotonic()
    terminal.start()  # before what takes seconds

from bsce_jax.config.hashes import HOW_NOT_WHAT, is_hashed
from bsce_jax.errors import UserError, printable
from bsce_jax.hosts.stop import StopSignal
from bsce_jax.reproduce import archive, in_process, manifest, runner, tables
from bsce_jax.reproduce.flags import parse
from bsce_jax.reproduce.process import absolute
from bsce_jax.run.shared import Shared

PAGE_SECONDS = 300.0  # least time between two versions of the report
PANELS = {"4": ("4a", "4b")}  # of figures that are more than one table


def choose(options: argparse.Namespace) -> tables.Chosen:
    """What the flags ask for.

    Raises:
      UserError: --file or --shard is malformed.
    """
    files = dict(given.partition("=")[::2] for given in options.file)
    if not all(files.values()):
        raise UserError(f"--file {' '.join(options.file)}: expected NAME=OTHER")
    figures = [n for given in options.figure for n in PANELS.get(given, (given,))]
    keys = [f"table{n}" for n in options.table] + [f"figure{n}" for n in figures]
    return tables.Chosen(
        tables=tuple(keys),
        dataset=options.dataset,
        rows=tuple(options.rows),
        columns=tuple(options.columns),
        seeds=options.seeds,
        files=files,
        overrides=tuple(map(_absolute, options.overrides)),
        folder=tables.configs_folder(),
    )


def _absolute(flag: str) -> str:
    """An override; a relative data_dir is one of this folder, not of the runs'."""
    name, _, value = flag.partition("=")
    return f"{name}={absolute(value)}" if name == "--config.data.data_dir" else flag


def shard(text: str) -> tuple[int, int]:
    """Reads "2/4".

    Raises:
      UserError: it is not of that form, or out of range.
    """
    if found := re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", text):
        index, count = map(int, found.groups())
        if 1 <= index <= count:
            return index, count
    raise UserError(f"--shard {text!r}: expected I/N with 1 <= I <= N")


def protocol(chosen: tables.Chosen) -> str:
    """How the report names what was run: "full", or what is not the paper's."""
    other = [f"configs/{b}.py for configs/{a}.py" for a, b in chosen.files.items()]
    fields = [flag.removeprefix("--config.") for flag in chosen.overrides]
    names = [field.partition("=")[0] for field in fields]
    other += [
        field
        for field, name in zip(fields, names, strict=True)
        if is_hashed(name) and name not in HOW_NOT_WHAT
    ]
    return f"reduced: {'; '.join(other)}" if other else "full"


def reproduce(options: argparse.Namespace, began: float) -> int:
    """Runs what was asked for; returns the exit status.

    0: all done; 1: a run failed; 3: something is left to do. The minutes that are given
    count from the time `began`.

    Raises:
      UserError: bad input.
    """
    chosen = choose(options)
    index, count = shard(options.shard)
    cpus = os.cpu_count() or 1
    with Shared(cpus if options.in_process else 1) as shared:
        found = tables.expand(chosen, shared.load)
        jobs = _distinct(job for cell in found for job in cell.jobs)
        mine = tables.share(jobs, index, count)
        for line in _missing(found):
            print(line)
        if options.dry_run:
            for job in mine:
                print(f"{job.updates} updates: {tables.shown_command(job.flags)}")
            for command in _without_data(found):
                print(f"no data set yet: {command}")
            return 0
        if not jobs:
            raise UserError(f"nothing can be run: {found[0].missing}")
        if not mine:
            print(f"--shard {index}/{count} has none of {len(jobs)} runs")
            return 0
        output = pathlib.Path(options.output).expanduser().resolve()
        try:
            (output / "runs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = f"--output={options.output} cannot be made: {error}"
            raise UserError(text) from None
        report = _Report(output, protocol(chosen), found, not options.in_process)
        limit = began + 60 * options.minutes if options.minutes else float("inf")
        if options.in_process:
            states = _in_process(options, mine, output, shared, report, limit)
        else:
            work = runner.Runner(mine, output, options.jobs, _show, report.changed)
            with StopSignal() as stop, contextlib.suppress(KeyboardInterrupt):
                work.work(limit - runner.GRACE, lambda: stop.number != 0)
            states = work.states
    left = [name for name, state in states.items() if state != "done"]
    where = str(output / "report.html")
    if not report.written:
        command = f"python -m bsce_jax.report.page {shlex.quote(str(output))}"
        where = f"{command} writes the report"
    print(printable(f"{len(mine) - len(left)} of {len(mine)} runs done; {where}"))
    return 1 if "failed" in states.values() else 3 if left else 0


class _Report:
    """The manifest, written at each change, and the page, which takes seconds.

    Attributes:
      written: whether there is a page of this command.
    """

    def __init__(
        self,
        output: pathlib.Path,
        protocol: str,
        cells: Sequence[tables.TableCell],
        between: bool,
    ) -> None:
        """Writes nothing yet; `between`: the page also while runs go on."""
        self._output, self._protocol, self._cells = output, protocol, cells
        self._between, self._time = between, -float("inf")
        self.written = False

    def changed(self, states: dict[str, str], last: bool) -> None:
        """Takes the states of all runs, and whether the page must be drawn."""
        try:
            manifest.write(self._output, self._protocol, self._cells, states)
            late = time.monotonic() - self._time > PAGE_SECONDS
            if last or (self._between and late):
                from bsce_jax.report import page  # matplotlib only here

                page.write(self._output)
                self.written, self._time = True, time.monotonic()
        except UserError as error:
            _show(f"no new report: {error}")  # the runs matter more


def _in_process(
    options: argparse.Namespace,
    jobs: Sequence[tables.Job],
    output: pathlib.Path,
    shared: Shared,
    report: _Report,
    limit: float,
) -> dict[str, str]:
    """Runs jobs in this process; returns their states."""
    compiled = archive.Compiled(in_process.configure(jobs, output))
    _show(in_process.devices())
    if options.imported:
        folder = pathlib.Path(options.imported).expanduser().resolve()
        archive.take_over(folder, output, compiled)
    export = None
    if options.export:
        folder = pathlib.Path(options.export).expanduser().resolve()
        export = archive.Export(folder, output, compiled)
    rows = in_process.Rows(jobs, output, shared, _show, report.changed, export)
    with StopSignal() as stop, contextlib.suppress(KeyboardInterrupt):
        rows.work(limit - in_process.GRACE, stop)
    for line in rows.left():
        print(f"left: {line}", flush=True)
    return rows.states


def _missing(cells: Iterable[tables.TableCell]) -> list[str]:
    """Why cells cannot be run, each reason once."""
    by_reason: dict[str, list[str]] = {}
    for cell in cells:
        if cell.missing:
            name = f"{cell.table} {cell.row} {cell.column}"
            by_reason.setdefault(cell.missing, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}"
        for reason, names in by_reason.items()
    ]


def _without_data(cells: Iterable[tables.TableCell]) -> list[str]:
    """The commands of cells that only want their data set, each once."""
    flags = [flags for cell in cells if not cell.jobs for flags in cell.flags]
    return list(dict.fromkeys(map(tables.shown_command, flags)))


def _distinct(jobs: Iterable[tables.Job]) -> list[tables.Job]:
    """Each job once.

    Raises:
      UserError: two configurations would share a folder.
    """
    found: dict[str, tables.Job] = {}
    for job in jobs:
        if found.setdefault(job.name, job).config_hash != job.config_hash:
            raise UserError(f"two configurations are called {job.name}: see --file")
    return list(found.values())


def _show(line: str) -> None:
    print(time.strftime("%H:%M:%S"), printable(line), flush=True)


def main(arguments: Sequence[str] | None = None, began: float | None = None) -> int:
    """The command, which has begun at a time; returns the exit status."""
    options = parse(arguments)
    try:
        return reproduce(options, time.monotonic() if began is None else began)
    except UserError as error:
        print(f"bsce_jax: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    terminal.log_to_stderr()
    terminal.run(lambda: main(began=_BEGAN))
