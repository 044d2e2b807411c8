"""Runs the tables and figures of the paper: python -m bsce_jax.reproduce --table 1."""

import argparse
import contextlib
import pathlib
import sys
import time
from collections.abc import Iterable, Sequence

from bsce_jax import terminal

if __name__ == "__main__":
    terminal.start()  # before what takes seconds

from bsce_jax.config.hashes import HOW_NOT_WHAT, is_hashed
from bsce_jax.errors import UserError, printable
from bsce_jax.hosts.stop import StopSignal
from bsce_jax.reproduce import manifest, runner, tables
from bsce_jax.reproduce.process import absolute

PAGE_SECONDS = 300.0  # least time between two versions of the report
# Fields that the runner sets itself, and what to give in their place.
OWN_FIELDS = {
    "seed": "--seeds",
    "name": "--file",
    "init_from": "nothing: base steps are shared",
    "print_plan": "--dry_run",
}
PANELS = {"4": ("4a", "4b")}  # of figures that are more than one table
EPILOG = """examples:
  python -m bsce_jax.reproduce --table 1 --dataset cifar100 --seeds 3
  python -m bsce_jax.reproduce --table 5 6 --rows il_baseline balanced --dry_run
  python -m bsce_jax.reproduce --table 1 --dataset cifar100 --shard 2/4

The same command again skips what is done and continues the rest. report.html,
report.md and report.csv in the output folder are rewritten at least every few minutes
while runs end, and at the end."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the flags; unknown ones must be overrides, --config.field=value."""
    parser = argparse.ArgumentParser(
        prog="python -m bsce_jax.reproduce",
        description=__doc__.splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--table", nargs="+", default=[], metavar="N", help="tables, 1 to 6")
    add(
        "--figure",
        nargs="+",
        default=[],
        metavar="N",
        help="figures, 2 to 5, or a panel: 4a, 4b",
    )
    add("--dataset", default="", help="cifar100, imagenet_subset or imagenet only")
    add("--rows", nargs="+", default=[], help="rows by key; default: all")
    add("--columns", nargs="+", default=[], help="columns by key; default: all")
    add("--seeds", type=int, default=1, help="runs of a cell (default: 1)")
    add("--output", default="runs/reproduce", help="folder of all runs")
    add("--jobs", type=int, default=1, help="runs at once (default: 1)")
    add("--shard", default="1/1", metavar="I/N", help="part of the runs, 1/N to N/N")
    add("--limit_seconds", type=float, default=0, help="of this call; 0: none")
    add(
        "--file",
        nargs="+",
        default=[],
        metavar="NAME=OTHER",
        help="another configuration file in place of one: cifar100=cifar100_cpu",
    )
    add("--dry_run", action="store_true", help="print the commands and stop")
    given = list(sys.argv[1:] if arguments is None else arguments)
    # argparse takes a flag with a space in its value for no flag.
    rest = [flag for flag in given if flag.startswith("--config.")]
    options = parser.parse_args([flag for flag in given if flag not in rest])
    for flag in rest:
        field, equals, _ = flag.removeprefix("--config.").partition("=")
        if not equals:
            parser.error(f"unexpected {flag!r}: expected --config.field=value")
        if field in OWN_FIELDS:
            parser.error(f"unexpected {flag!r}: give {OWN_FIELDS[field]}")
    options.overrides = tuple(rest)
    if not options.table and not options.figure:
        parser.error("give --table or --figure")
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1")
    limit = options.limit_seconds
    if limit and not limit > runner.GRACE:
        least = f"more than {runner.GRACE:g}, in which runs save and end"
        parser.error(f"--limit_seconds={limit:g}: expected 0 (none) or {least}")
    if "://" in options.output:
        parser.error(f"--output={options.output}: expected a folder of this machine")
    return options


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
    index, _, count = text.partition("/")
    if index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count):
        return int(index), int(count)
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


def reproduce(options: argparse.Namespace) -> int:
    """Runs what was asked for; returns the exit status.

    0: all done; 1: a run failed; 3: something is left to do.

    Raises:
      UserError: bad input.
    """
    from bsce_jax.report import page  # matplotlib only here

    began = time.monotonic()
    chosen = choose(options)
    index, count = shard(options.shard)
    found = tables.expand(chosen)
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
    output = pathlib.Path(options.output).expanduser().resolve()
    try:
        (output / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={options.output} cannot be made: {error}") from None

    written = -float("inf")

    def changed(states: dict[str, str], last: bool) -> None:
        nonlocal written
        try:
            manifest.write(output, protocol(chosen), found, states)
            # Drawing takes seconds: not after every run of many short ones.
            if last or time.monotonic() - written > PAGE_SECONDS:
                page.write(output)
                written = time.monotonic()
        except UserError as error:
            _show(f"no new report: {error}")  # the runs matter more

    work = runner.Runner(mine, output, options.jobs, _show, changed)
    limit = options.limit_seconds
    deadline = began + limit - runner.GRACE if limit else float("inf")
    with StopSignal() as stop, contextlib.suppress(KeyboardInterrupt):
        work.work(deadline, lambda: stop.number != 0)
    left = [name for name, state in work.states.items() if state != "done"]
    print(f"{len(mine) - len(left)} of {len(mine)} runs done; {output / 'report.html'}")
    failed = [name for name, state in work.states.items() if state == "failed"]
    return 1 if failed else 3 if left else 0


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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = parse(arguments)
    try:
        return reproduce(options)
    except UserError as error:
        print(f"bsce_jax: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    terminal.run(main)
