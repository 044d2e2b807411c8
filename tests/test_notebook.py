"""docs/balanced_softmax.ipynb: no outputs in the file, and all of them when it runs."""

import base64
import io
import pathlib
import re

import nbclient
import nbformat
import pytest
from PIL import Image

from tests import runs

NOTEBOOK = runs.ROOT / "docs" / "balanced_softmax.ipynb"


def read() -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> dict[str, nbformat.NotebookNode]:
    """By their ids, which say what they do."""
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def text(cell: nbformat.NotebookNode) -> str:
    streams = [each for each in cell.outputs if each.output_type == "stream"]
    return "".join(each.text for each in streams)


def pictures(cell: nbformat.NotebookNode) -> list[Image.Image]:
    shown = [each.data for each in cell.outputs if each.output_type == "display_data"]
    files = [io.BytesIO(base64.b64decode(data["image/png"])) for data in shown]
    return [Image.open(file) for file in files]


def test_the_file_has_no_outputs():
    cells = code_cells(read()).values()
    assert cells
    assert not [cell.id for cell in cells if cell.outputs or cell.execution_count]


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> tuple[pathlib.Path, nbformat.NotebookNode]:
    """Its folder, and the notebook with a twentieth of the epochs, executed there."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = read()
    cell = code_cells(notebook)["short"]
    cell.source, changed = re.subn(r"^SHORT = 1\b", "SHORT = 20", cell.source)
    assert changed == 1
    own = {"PYTHONPATH": str(runs.ROOT), "IPYTHONDIR": str(folder / "ipython")}
    place = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=600, resources=place)
    client.execute(env=runs.environment() | own)
    return folder, notebook


@pytest.mark.slow
def test_every_cell_runs_and_shows_what_it_says(executed):
    folder, notebook = executed
    cells = code_cells(notebook)
    assert [each.execution_count for each in cells.values()] == [
        *range(1, len(cells) + 1)
    ]
    assert not cells["install"].outputs  # there was nothing to install

    averages = []
    for run in ("softmax", "balanced"):
        average = runs.results(folder / "runs" / run)["summary"][
            "average_incremental_top1"
        ]
        averages.append(f"{average:.2f}")
        found = re.findall(r"incremental accuracy: top-1 ([\d.]+)", text(cells[run]))
        assert found == [f"{average:.2f}"]
    for average in averages:
        assert average in text(cells["curves"])  # in the table

    for name, height in (("curves", 300), ("confusion", 300), ("predict", 100)):
        (picture,) = pictures(cells[name])
        picture.load()
        assert picture.width > 600 and picture.height > height


@pytest.mark.slow
def test_the_second_run_takes_over_the_base_step(executed):
    folder, _ = executed
    softmax, balanced = (
        runs.results(folder / "runs" / run) for run in ("softmax", "balanced")
    )
    # With another base step it would have been refused, and not have ended.
    assert balanced["config"]["init_from"] == "runs/softmax"
    assert balanced["status"] == "done"
    first, taken = softmax["steps"][0]["result"], balanced["steps"][0]["result"]
    assert first["phases"] == taken["phases"] and first["top1"] == taken["top1"]


@pytest.mark.slow
def test_the_loop_of_its_own_remembers_with_the_log_prior(executed):
    _, notebook = executed
    printed = text(code_cells(notebook)["loop"])
    found = re.findall(r"^(.+): old digits ([\d.]+) %, new digits", printed, re.M)
    old = {name: float(percent) for name, percent in found}
    assert old["BalancedS-CE"] > old["softmax"] + 20
