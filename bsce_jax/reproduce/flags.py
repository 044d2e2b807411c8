"""The flags of python -m bsce_jax.reproduce."""

import argparse
import sys
from collections.abc import Sequence

from bsce_jax import terminal
from bsce_jax.reproduce import in_process, runner

# Fields that the runner sets itself, and what to give in their place.
OWN_FIELDS = {
    "seed": "--seeds",
    "name": "--file",
    "init_from": "nothing: base steps are shared",
    "print_plan": "--dry_run",
}
EPILOG = """examples:
  python -m bsce_jax.reproduce --table 1 --dataset cifar100 --seeds 3
  python -m bsce_jax.reproduce --table 5 6 --rows il_baseline balanced --dry_run
  python -m bsce_jax.reproduce --table 1 --dataset cifar100 --shard 2/4
  python -m bsce_jax.reproduce --table 1 3 --dataset cifar100 --in_process \\
      --minutes 9 --rows 1:lucir_balanced 3:lucir_balanced --export out --import in

The same command again skips what is done and continues the rest. report.html,
report.md and report.csv in the output folder are rewritten at least every few minutes
while runs end, and at the end."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the flags; unknown ones must be overrides, --config.field=value."""
    parser = terminal.Arguments(
        prog="python -m bsce_jax.reproduce",
        description="Runs the tables and figures of the paper.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_choice(parser)
    _add_how(parser)
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
    _check_together(parser, options)
    if "://" in options.output:
        parser.error(f"--output={options.output}: expected a folder of this machine")
    return options


def _add_choice(parser: argparse.ArgumentParser) -> None:
    """What is run."""
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
    add(
        "--rows",
        nargs="+",
        default=[],
        metavar="[N:]ROW",
        help="rows by key, in the order in which they run; 3:lucir is one of table (or "
        "figure) 3 alone; default: all",
    )
    add("--columns", nargs="+", default=[], help="columns by key; default: all")
    add("--seeds", type=int, default=1, help="runs of a cell (default: 1)")
    add(
        "--file",
        nargs="+",
        default=[],
        metavar="NAME=OTHER",
        help="another configuration file in place of one: cifar100=cifar100_cpu",
    )


def _add_how(parser: argparse.ArgumentParser) -> None:
    """Where and how it is run."""
    add = parser.add_argument
    add("--output", default="runs/reproduce", help="folder of all runs")
    add("--jobs", type=int, default=1, help="runs at once (default: 1)")
    add("--shard", default="1/1", metavar="I/N", help="part of the runs, 1/N to N/N")
    add(
        "--minutes",
        type=float,
        default=0,
        help="of this call, from its start: then runs have saved; 0: no limit",
    )
    add(
        "--in_process",
        action="store_true",
        help="run one after another in this process: data are read and programs "
        "compiled once, and the next run's while one trains",
    )
    add(
        "--export",
        default="",
        metavar="FOLDER",
        help="with --in_process: pack there, after every step, what another machine "
        "needs to go on (four files)",
    )
    add(
        "--import",
        dest="imported",
        default="",
        metavar="FOLDER",
        help="with --in_process: go on from a folder that --export has made; it holds "
        "native code: only from a machine of your own",
    )
    add("--dry_run", action="store_true", help="print the commands and stop")


def _check_together(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> None:
    """Refuses flags that do not go together."""
    grace = in_process.GRACE if options.in_process else runner.GRACE
    if options.minutes and not 60 * options.minutes > grace:
        least = f"more than {grace / 60:.2g}, in which runs save and end"
        parser.error(f"--minutes={options.minutes:g}: expected 0 (none) or {least}")
    if options.in_process and options.jobs > 1:
        parser.error(f"--jobs={options.jobs}: expected 1 with --in_process")
    for flag, given in (("export", options.export), ("import", options.imported)):
        if given and not options.in_process:
            parser.error(f"--{flag}={given}: expected with --in_process only")
        if "://" in given:
            parser.error(f"--{flag}={given}: expected a folder of this machine")
