"""Tables, figures and the report command."""

import os
import pathlib
import subprocess
import sys
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from bsce_jax.errors import UserError
from bsce_jax.report import __main__ as command
from bsce_jax.report import plots, results, tables
from tests.example_results import make_results

# tables


def table_results() -> dict[str, Any]:
    run = make_results()
    for record, top1 in zip(run["steps"], (90.0, 60.0, 48.0), strict=True):
        record["result"]["top1"] = top1
    run["summary"] = results.summary(run["steps"])
    return run


def test_step_table() -> None:
    lines = tables.step_table(table_results()).splitlines()
    assert lines[0].split() == (
        "step classes top-1 top-5 NME base old new memory seconds".split()
    )
    assert lines[2].split()[:4] == ["0", "4", "90.00", "-"]
    assert lines[2].split()[4] == "70.00"
    assert lines[2].split()[6] == "-"  # no old classes in the base step
    assert lines[4].split()[:3] == ["2", "8", "48.00"]
    assert lines[4].split()[-2:] == ["18", "3.0"]
    assert len({len(line) for line in lines[:5]}) == 1  # aligned
    assert lines[-1] == (
        "average incremental accuracy: top-1 66.00, nearest mean of exemplars 71.00"
    )
    without = tables.step_table(make_results(memory=False)).splitlines()
    assert without[2].split()[4] == "-" and "nearest" not in without[-1]


def test_step_table_shows_what_a_method_has_learned_beside_the_network() -> None:
    lines = tables.step_table(make_results(learned_own=True)).splitlines()
    assert lines[0].split()[-2:] == ["seconds", "learned"]
    assert lines[2].split()[-1] == "-"  # nothing in the base step
    assert lines[3].endswith("  scale 0.5, shift -0.25")
    markdown = tables.step_table(make_results(learned_own=True), markdown=True)
    assert "| scale 1, shift -0.25 |" in markdown
    assert "learned" not in tables.step_table(make_results())


def test_step_table_of_a_running_experiment_says_so() -> None:
    assert tables.step_table(make_results(finished=1)).endswith("so far")
    empty = make_results() | {"steps": [], "summary": results.summary([])}
    assert "top-1 -" in tables.step_table(empty)


def test_comparison_averages_over_seeds() -> None:
    runs = [make_results(name="a", seed=seed) for seed in (10, 9)]
    runs.append(make_results(name="b", seed=3))
    for run, top1 in zip(runs, (50.0, 54.0, 70.0), strict=True):
        run["summary"]["average_incremental_top1"] = top1
    lines = tables.comparison(runs).splitlines()
    assert len(lines) == 4
    assert lines[2].split()[:6] == ["a", "9,10", "2", "52.00", "+-", "2.83"]
    assert lines[3].split()[:4] == ["b", "3", "2", "70.00"]
    assert "+-" not in lines[3]


def test_a_running_experiment_is_not_averaged_with_finished_ones() -> None:
    runs = [make_results(seed=1), make_results(seed=2, finished=1)]
    lines = tables.comparison(runs).splitlines()
    assert len(lines) == 4
    assert "(seed 2, unfinished)" in lines[3]


def test_other_experiments_of_one_name_are_other_rows() -> None:
    """Named by what tells them apart; the seed and how it was computed do not."""
    runs = [make_results(seed=seed) for seed in (0, 1, 0, 1, 2)]
    runs[0]["config"] |= {"memory.per_class": 0, "parallel": "pmap"}
    runs[1]["config"] |= {"memory.per_class": 0, "data.data_dir": "/elsewhere"}
    runs[2]["config"] |= {"memory.per_class": 5, "optim.momentum": 0.5}
    runs[3]["config"] |= {"memory.per_class": 5}
    runs[4]["config"] |= {"memory.per_class": 5, "optim.momentum": 0.9}  # the default
    name = runs[0]["name"]
    assert [(n, len(g)) for n, g in tables.groups(runs).items()] == [
        (f"{name} (memory.per_class=0, optim.momentum=0.9)", 2),
        (f"{name} (memory.per_class=5, optim.momentum=0.5)", 1),
        (f"{name} (memory.per_class=5, optim.momentum=0.9)", 2),
    ]


def test_a_run_given_twice_counts_once() -> None:
    runs = [make_results(seed=0), make_results(seed=0), make_results(seed=1)]
    ((_, found),) = tables.groups(runs).items()
    assert [run["config"]["seed"] for run in found] == [0, 1]
    assert " 0,1 " in tables.comparison(runs)


def test_runs_of_other_classes_or_data_are_other_rows() -> None:
    runs = [make_results(seed=1), make_results(seed=2, increment=1, steps=4)]
    runs.append(make_results(seed=3))
    runs[2]["data"] = {"training": {"images": 3, "digest": "x"}}
    name = runs[0]["name"]
    assert list(tables.groups(runs)) == [name, f"{name} #2", f"{name} #3"]


@pytest.mark.filterwarnings("error")
def test_a_group_may_have_the_nearest_mean_in_part(tmp_path) -> None:
    runs = [make_results(seed=seed, memory=seed > 0) for seed in (0, 1)]
    plots.accuracy_curves(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_markdown() -> None:
    runs = [make_results(name="a | b", seed=seed) for seed in (1, 2)]
    header, rule, row = tables.comparison(runs, markdown=True).splitlines()
    assert header.startswith("| run | seeds |")
    assert rule.startswith("| --- | ---: |")
    assert row.startswith("| a \\| b | 1,2 | 2 | ") and "±" in row
    columns = {line.replace("\\|", "").count("|") for line in (header, rule, row)}
    assert columns == {10}
    assert tables.step_table(runs[0], markdown=True).startswith("| step | classes |")


# figures


def image(path: pathlib.Path) -> np.ndarray:
    with Image.open(path) as file:
        assert file.format == "PNG"
        return np.asarray(file.convert("RGB")).astype(int)


def coloured(pixels: np.ndarray, color: str) -> int:
    """Number of pixels close to a colour."""
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((abs(pixels - rgb).max(axis=2) < 10).sum())


def test_accuracy_curves(tmp_path: pathlib.Path) -> None:
    runs = [
        make_results(name, seed, memory=False)
        for name in ("a $\\x$", "b")
        for seed in (0, 1)
    ]
    plots.accuracy_curves(runs, tmp_path / "two.png")
    plots.accuracy_curves(runs[:2], tmp_path / "one.png")
    two, one = image(tmp_path / "two.png"), image(tmp_path / "one.png")
    assert two.shape == one.shape == (640, 1024, 3)
    assert coloured(one, plots.COLORS[0]) > 500
    assert coloured(one, plots.COLORS[1]) == 0
    assert coloured(two, plots.COLORS[1]) > 500
    plots.accuracy_curves([*runs[:2], make_results("b", 1)], tmp_path / "nearest.png")
    wide = image(tmp_path / "nearest.png")
    assert wide.shape[1] > 1500  # a second panel, with the one run that has a memory
    assert coloured(wide[:, 1000:], plots.COLORS[1]) > 500
    assert coloured(wide[:, 1000:], plots.COLORS[0]) == 0


@pytest.mark.parametrize(
    ("base", "increment", "names", "size"),
    [
        (4, 2, ["a", "b", "c", "d"], (1280, 1824)),
        (40, 10, ["a", "b"], (640, 1264)),
        (300, 10, ["a"], (640, 704)),  # 2 x 2 classes a cell
    ],
)
def test_confusion_matrices(
    tmp_path: pathlib.Path,
    base: int,
    increment: int,
    names: list[str],
    size: tuple[int, int],
) -> None:
    runs = [make_results(name, 0, base, increment, steps=1) for name in names]
    plots.confusion_matrices(runs, tmp_path / "new.png")
    drawn = image(tmp_path / "new.png")
    assert drawn.shape == (*size, 3)
    assert coloured(drawn, plots.LINE_COLOR) > 500 * len(names)  # old | new


def test_the_base_step_has_no_line_between_old_and_new(tmp_path: pathlib.Path) -> None:
    plots.confusion_matrices([make_results(finished=0)], tmp_path / "base.png")
    assert coloured(image(tmp_path / "base.png"), plots.LINE_COLOR) == 0


def test_alpha_curve(tmp_path: pathlib.Path) -> None:
    runs = [make_results(seed=seed, learned_alpha=True) for seed in (0, 1)]
    path = tmp_path / "alpha.png"
    assert not plots.alpha_curve([make_results()], path)
    assert not path.exists()
    assert plots.alpha_curve([make_results(name="other"), *runs], path)
    assert image(path).shape == (544, 1024, 3)
    runs[1]["steps"][1]["result"]["alpha"] = [[5, 0.4]]  # another interval: no mean
    assert plots.alpha_curve(runs, path)
    assert coloured(image(path), plots.COLORS[0]) > 100


def test_figures_are_the_same_bytes_whatever_the_reader_has_set(
    tmp_path: pathlib.Path,
) -> None:
    runs = [make_results(learned_alpha=True)]
    draw = [plots.accuracy_curves, plots.confusion_matrices, plots.alpha_curve]
    for number, function in enumerate(draw):
        first, second = tmp_path / f"{number}a.png", tmp_path / f"{number}b.png"
        function(runs, first)
        with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9}):
            before = dict(matplotlib.rcParams)
            function(runs, second)
            assert dict(matplotlib.rcParams) == before
        assert first.read_bytes() == second.read_bytes()


def test_drawing_nothing_is_one_clear_line(tmp_path: pathlib.Path) -> None:
    empty = make_results() | {"steps": [], "summary": results.summary([])}
    for function in (plots.accuracy_curves, plots.confusion_matrices):
        with pytest.raises(UserError, match="no run has a finished step"):
            function([empty], tmp_path / "none.png")
    assert not list(tmp_path.iterdir())


# command


COMMAND = """
import runpy, sys
import bsce_jax.report
assert "matplotlib" not in sys.modules
runpy.run_module("bsce_jax.report", run_name="__main__")
"""


def run_python(*arguments: str, cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
    root = pathlib.Path(results.__file__).parents[2]
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command_end_to_end(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a process of its own, where any warning would be an error; then in this.

    Importing the report must not load Matplotlib: a run needs it only at its end.
    """
    for seed in (0, 1):
        (tmp_path / f"run{seed}").mkdir()
        results.write(tmp_path / f"run{seed}", make_results(seed=seed))
    done = run_python("-c", COMMAND, "run0", "run1", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0,1" in done.stdout and "+-" in done.stdout
    drawn = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert drawn == ["confusion.png", "curves.png"]

    monkeypatch.chdir(tmp_path)
    assert command.main(["run0", "nowhere"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: nowhere/results.json does not exist")
    assert printed.err.count("\n") == 1

    (tmp_path / "other").mkdir()
    assert command.main(["run0", "other"]) == 0
    assert capsys.readouterr().err == "left out: no results.json in other\n"
    assert command.main(["other"]) == 2
    assert "other/results.json" in capsys.readouterr().err


def test_command_on_one_workdir(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results.write(tmp_path, make_results(learned_alpha=True))
    assert command.main([str(tmp_path), str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("step  classes")
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {"results.json", "curves.png", "confusion.png", "alpha.png"}
    output = tmp_path / "made" / "here"
    assert command.main([str(tmp_path), "--output", str(output), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| step |")
    assert (output / "alpha.png").exists()


def test_letters_that_the_font_has_not_are_no_warning(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are drawn as boxes; a warning is an error in the tests."""
    monkeypatch.setitem(plots._STYLE, "figure.dpi", 40)
    run = make_results(name="日本")
    scripts = ["鳥", "🦉", "עברית", "ไทย", "हिन्दी", "বাংলা", "\x1b", "\u200f"]
    run["class_names"] = scripts[: len(run["class_names"])]
    plots.confusion_matrices([run], tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").exists()


def test_command_refuses_an_output_that_is_a_file(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results.write(tmp_path, make_results())
    (tmp_path / "file").touch()
    output = str(tmp_path / "file")
    assert command.main([str(tmp_path), "--output", output]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
