"""Tables and figures of runs: python -m bsce_jax.report WORKDIR... [--output DIR]."""

import os
import sys
from collections.abc import Sequence

from bsce_jax import terminal

if __name__ == "__main__":
    terminal.start()  # before what takes seconds

from etils import epath

from bsce_jax.errors import UserError, printable
from bsce_jax.report import results, tables


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 after a user's error."""
    parser = terminal.Arguments(
        prog="python -m bsce_jax.report",
        description="Prints a table of runs and draws accuracy curves, confusion "
        "matrices and, where it was learned, alpha. Runs of one name are averaged.",
    )
    parser.add_argument("workdirs", metavar="WORKDIR", nargs="+", help="of a run")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder of the PNG files (default: the workdir if it is one, or report)",
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print the tables as Markdown"
    )
    options = parser.parse_args(arguments)
    workdirs = list(dict.fromkeys(options.workdirs))
    output = options.output or (workdirs[0] if len(workdirs) == 1 else "report")
    try:
        report(workdirs, output, options.markdown)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def report(
    workdirs: Sequence[epath.PathLike], output: epath.PathLike, markdown: bool = False
) -> None:
    """Prints the tables of runs; writes curves.png, confusion.png and alpha.png.

    Raises:
      UserError: a workdir's results are not valid, or none has a finished step, or
        the output cannot be written.
    """
    runs = [results.read(workdir) for workdir in _with_results(workdirs)]
    if len(runs) == 1:
        width = terminal.columns(sys.stdout) if sys.stdout.isatty() else 0
        print(tables.step_table(runs[0], markdown, width), end="\n\n")
    print(tables.comparison(runs, markdown))
    from bsce_jax.report import plots  # loads Matplotlib, which takes a second

    folder = epath.Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture in plots.draw(runs, folder):
            print(printable(os.fspath(picture)))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error


def _with_results(workdirs: Sequence[epath.PathLike]) -> Sequence[epath.PathLike]:
    """Those that are runs, of the folders that a pattern may have caught."""
    others = [
        workdir
        for workdir in map(epath.Path, workdirs)
        if workdir.is_dir() and not (workdir / results.FILE_NAME).exists()
    ]
    if len(others) == len(workdirs):
        return workdirs  # whose first will be refused
    for workdir in others:
        print(
            f"left out: no {results.FILE_NAME} in {printable(str(workdir))}",
            file=sys.stderr,
        )
    return [workdir for workdir in workdirs if epath.Path(workdir) not in others]


if __name__ == "__main__":
    terminal.run(main)
