"""One page of a reproduction, beside the paper's numbers: HTML, Markdown and CSV.

    python -m bsce_jax.report.page DIR

reads DIR/manifest.json and the results of its runs and writes DIR/report.html, which
needs no other file and no network, DIR/report.md and DIR/report.csv.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

from etils import epath

from bsce_jax import terminal, untrusted
from bsce_jax.errors import UserError
from bsce_jax.report import cells, results

if TYPE_CHECKING:
    from bsce_jax.report.published import Table


class Page(NamedTuple):
    """The same content in three forms."""

    html: str
    markdown: str
    csv: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 after a user's error."""
    parser = terminal.Arguments(
        prog="python -m bsce_jax.report.page",
        description="Writes report.html, report.md and report.csv of a reproduction.",
    )
    parser.add_argument("output", metavar="DIR", help="folder with manifest.json")
    options = parser.parse_args(arguments)
    try:
        write(options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(epath.Path(options.output) / "report.html")
    return 0


def write(output: epath.PathLike) -> None:
    """Writes OUTPUT/report.html, report.md and report.csv, each replaced at once.

    A run whose results are not valid is shown as such.

    Raises:
      UserError: there is no valid manifest, or a file cannot be written.
    """
    from bsce_jax.report import published

    folder = epath.Path(output)
    expected = "the folder of a reproduction"
    manifest = untrusted.read_json(folder / "manifest.json", expected)
    found: dict[str, Any] = {}
    broken = set()
    for workdir in cells.workdirs(manifest):
        try:
            if (folder / workdir / results.FILE_NAME).exists():
                found[workdir] = results.read(folder / workdir)
        except UserError:
            broken.add(workdir)  # one file must not cost the page
    for run in [run for cell in manifest["cells"] for run in cell["runs"]]:
        if run["workdir"] in broken:
            run["status"] = "unreadable results"
    page = render(manifest, found, published.load(), _defaults(found))
    for name, text in zip(("html", "md", "csv"), page, strict=True):
        results.replace(folder / f"report.{name}", text, shared=True)


def render(
    manifest: Mapping[str, Any],
    found: Mapping[str, Mapping[str, Any]],
    tables: "Mapping[str, Table]",
    defaults: Mapping[str, Any],
) -> Page:
    """The page, from data alone.

    Args:
      manifest: cells of the tables and their runs, as the runner writes them.
      found: results by workdir, of the runs that have some.
      tables: the paper's, by key.
      defaults: of a configuration's fields, by dotted name.

    Raises:
      UserError: the manifest breaks its schema or names an unknown cell, or seeds of a
        cell differ in their classes.
    """
    from bsce_jax.report import page_html, page_text, pictures  # load Matplotlib

    report = cells.build(manifest, found, tables)
    drawn: set[tuple[str, ...]] = set()
    shown = {s.table.key: pictures.pictures(s, drawn) for s in report.sections}
    css = resources.files(__package__).joinpath("page.css").read_text("utf-8")
    return Page(
        page_html.document(report, shown, defaults, css),
        page_text.markdown(report, shown, defaults),
        page_text.csv_table(report),
    )


def _defaults(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of a configuration's fields; of each phase that a run has, those of a phase."""
    from bsce_jax.config.fields import default_config, phase
    from bsce_jax.config.hashes import flatten

    defaults, of_phase = flatten(default_config()), flatten(phase())
    for name in {name for run in found.values() for name in run["config"]}:
        section, _, rest = name.partition(".")
        field = rest.partition(".")[2]
        if section == "phase" and field in of_phase:
            defaults.setdefault(name, of_phase[field])
    return defaults


if __name__ == "__main__":
    terminal.run(main)
