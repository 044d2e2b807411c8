"""Results files, tables, figures and the report command."""

import copy
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bsce_jax.errors import UserError
from bsce_jax.report import __main__ as command
from bsce_jax.report import plots, results, tables


def make_results(
    name: str = "digits il_baseline balanced",
    seed: int = 0,
    base: int = 4,
    increment: int = 2,
    steps: int = 2,
    learned_alpha: bool = False,
    memory: bool = True,
    finished: int | None = None,
) -> dict[str, Any]:
    """A valid results file of `steps` incremental steps, `finished` of them done."""
    rng = np.random.default_rng(seed)
    total = base + increment * steps
    done = steps if finished is None else finished
    records = []
    for step in range(done + 1):
        old = 0 if step == 0 else base + increment * (step - 1)
        seen = base + increment * step
        confusion = rng.integers(0, 6, (seen, seen)) + 20 * np.eye(seen, dtype=int)
        confusion[0, 1:] = 0  # zeros are left out of the triples
        accuracy = 100.0 * np.diag(confusion) / confusion.sum(axis=1)
        starts = [0, *range(base, seen, increment), seen]
        records.append(
            {
                "step": step,
                "result": {
                    "num_old": old,
                    "num_seen": seen,
                    "train_images": 10 * (seen - old) + 3 * old,
                    "memory_images": 3 * old,
                    "counts": [3] * old + [10] * (seen - old),
                    "top1": float(accuracy.mean()),
                    "top5": None if seen < 6 else float(accuracy.mean() / 2 + 50),
                    "top1_base": float(accuracy[:base].mean()),
                    "top1_old": float(accuracy[:old].mean()) if step else None,
                    "top1_new": float(accuracy[old:].mean()),
                    "top1_by_task": [
                        float(accuracy[a:b].mean())
                        for a, b in zip(starts, starts[1:], strict=False)
                    ],
                    "top1_nearest_mean": 70.0 + step if memory else None,
                    "loss": [1.5, 0.1 + rng.random()],
                    "finetune_loss": [],
                    "train_accuracy": [50.0, 90.0],
                    "alpha": [[10, 0.9], [20, rng.random()]]
                    if learned_alpha and step
                    else [],
                    "parameters_sha256": f"{step:064x}",
                },
                "telemetry": {"seconds": 1.5 * step, "compiles": {"base_update": 1}},
            }
        )
    records[-1]["result"]["confusion"] = [
        [int(i), int(j), int(confusion[i, j])] for i, j in np.argwhere(confusion)
    ]
    return {
        "schema": 2,
        "name": name,
        "status": "done" if done == steps else "running",
        "config": {"seed": seed, "optim.epochs": 2},
        "config_hash": f"hash{seed}",
        "base_hash": "base",
        "class_names": [f"class {i}" for i in range(total)],
        "class_order": [int(i) for i in rng.permutation(total)],
        "image_shape": [8, 8, 1],
        "steps": records,
        "summary": results.summary(records),
    }


# results


@settings(max_examples=25, deadline=None)
@given(
    name=st.text(),
    seed=st.integers(0, 2**32 - 1),
    base=st.integers(1, 7),
    increment=st.integers(1, 3),
    steps=st.integers(0, 3),
    learned_alpha=st.booleans(),
    memory=st.booleans(),
    telemetry=st.dictionaries(
        st.text(), st.none() | st.floats(allow_nan=False, allow_infinity=False)
    ),
)
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, telemetry: dict[str, Any], **fields: Any
) -> None:
    written = make_results(**fields)
    written["steps"][-1]["telemetry"] = telemetry
    workdir = tmp_path_factory.mktemp("run")
    results.write(workdir, written)
    assert results.read(workdir) == written
    assert [path.name for path in workdir.iterdir()] == ["results.json"]


@pytest.mark.parametrize("function", ["os.replace", "os.fsync"])
def test_a_crash_while_writing_keeps_the_old_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    results.write(tmp_path, make_results(seed=1))

    def crash(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(function, crash)
        with pytest.raises(KeyboardInterrupt):
            results.write(tmp_path, make_results(seed=2))
    assert results.read(tmp_path) == make_results(seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_what_a_killed_write_left_behind_is_overwritten(tmp_path: pathlib.Path) -> None:
    (tmp_path / ".results.json.tmp").write_text('{"schema": 1, "na')
    results.write(tmp_path, make_results())
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_full_disk_is_one_clear_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="results.json cannot be written: No space"):
        results.write(tmp_path, make_results())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        ("[]", r"the whole is \[\], expected an object"),
        ('{"schema": 1}', "schema is 1, expected 2"),
        ("{}", "schema is None, expected 2"),
    ],
)
def test_reading_refuses_in_one_line(
    tmp_path: pathlib.Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        results.read(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


MISSING = object()
BAD_FIELDS: list[tuple[str, Any]] = [
    ("name", 3),
    ("status", "finished"),
    ("config", None),
    ("base_hash", MISSING),
    ("class_order", [0, 1, 2]),
    ("class_order", [0] * 8),
    ("extra", 1),
    ("summary", {}),
    ("summary.final_top1", "91"),
    ("steps", {}),
    ("steps.1.step", 2),
    ("steps.1.telemetry", MISSING),
    ("steps.1.result.num_old", 3),
    ("steps.1.result.num_seen", 9),
    ("steps.1.result.num_seen", True),
    ("steps.1.result.train_images", 2.0),
    ("steps.1.result.counts", [1, 2]),
    ("steps.1.result.counts", [1, 2, 3, 4, 5, -6]),
    ("steps.1.result.top1", 100.5),
    ("steps.1.result.top1", float("nan")),
    ("steps.0.result.top5", 99.0),
    ("steps.1.result.top5", None),
    ("steps.0.result.top1_old", 50.0),
    ("steps.1.result.top1_old", None),
    ("steps.1.result.top1_by_task", [1.0]),
    ("steps.1.result.top1_nearest_mean", 101.0),
    ("steps.1.result.finetune_loss", None),
    ("steps.1.result.loss", [float("inf")]),
    ("steps.1.result.train_accuracy", [101.0]),
    ("steps.1.result.alpha", [0.5]),
    ("steps.1.result.parameters_sha256", "abc"),
    ("steps.1.result.confusion", []),  # only in the newest record
    ("steps.2.result.confusion", MISSING),
    ("steps.2.result.confusion", [[0, 8, 1]]),
    ("steps.2.result.confusion", [[0, 0, 0]]),
]


@pytest.mark.parametrize(("path", "value"), BAD_FIELDS)
def test_validation_names_the_field(path: str, value: Any) -> None:
    broken = make_results()
    results.validate(broken)
    *parents, field = path.split(".")
    target: Any = broken
    for parent in parents:
        target = target[int(parent) if parent.isdigit() else parent]
    if value is MISSING:
        del target[field]
    else:
        target[field] = value
    with pytest.raises(UserError) as error:
        results.validate(broken)
    message = str(error.value)
    assert field in message
    assert "\n" not in message
    for number in (parent for parent in parents if parent.isdigit()):
        assert f"steps[{number}]" in message


def test_a_long_value_is_shortened_in_the_message() -> None:
    broken = make_results()
    broken["config"] = "x" * 1000
    with pytest.raises(UserError) as error:
        results.validate(broken)
    assert len(str(error.value)) < 120


def test_summary_by_hand() -> None:
    steps = [
        {"result": {"top1": 90.0, "top5": None, "top1_base": 90.0,
                    "top1_nearest_mean": 80.0, "top1_by_task": [90.0]}},
        {"result": {"top1": 60.0, "top5": 80.0, "top1_base": 50.0,
                    "top1_nearest_mean": 70.0, "top1_by_task": [50.0, 80.0]}},
        {"result": {"top1": 48.0, "top5": 70.0, "top1_base": 40.0,
                    "top1_nearest_mean": 60.0, "top1_by_task": [40.0, 60.0, 70.0]}},
    ]  # fmt: skip
    assert results.summary(steps) == {
        "average_incremental_top1": 66.0,
        "average_incremental_top5": None,  # the base step has none
        "average_incremental_nearest_mean": 70.0,
        "final_top1": 48.0,
        "final_base_top1": 40.0,
        "forgetting": 35.0,  # mean of 90 - 40 and 80 - 60
    }
    steps[0]["result"]["top5"] = 99.0
    assert results.summary(steps)["average_incremental_top5"] == 83.0
    steps[2]["result"]["top1_nearest_mean"] = None
    assert results.summary(steps)["average_incremental_nearest_mean"] is None
    assert results.summary(steps[:1])["forgetting"] is None
    assert set(results.summary([]).values()) == {None}


def test_the_deterministic_part_ignores_telemetry_alone() -> None:
    undisturbed, resumed = make_results(), make_results()
    resumed["steps"][1]["telemetry"] = {"seconds": 99.0, "resumed": True}
    resumed["config"]["data.data_dir"] = "elsewhere"
    assert resumed != undisturbed
    assert results.deterministic(resumed) == results.deterministic(undisturbed)
    for field in undisturbed["steps"][1]["result"]:
        changed = copy.deepcopy(undisturbed)
        changed["steps"][1]["result"][field] = "changed"
        assert results.deterministic(changed) != results.deterministic(undisturbed)


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


def test_runs_of_one_name_and_other_classes_are_refused() -> None:
    runs = [make_results(seed=1), make_results(seed=2, increment=1, steps=4)]
    with pytest.raises(UserError, match="different names"):
        tables.comparison(runs)


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
        (4, 2, ["a"], (640, 704)),
        (40, 10, ["a", "b"], (640, 1264)),
        (300, 10, ["a", "b", "c", "d"], (1280, 1824)),  # 2 x 2 classes a cell
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


def test_command_end_to_end(tmp_path: pathlib.Path) -> None:
    for seed in (0, 1):
        (tmp_path / f"run{seed}").mkdir()
        results.write(tmp_path / f"run{seed}", make_results(seed=seed))
    done = run_python("-m", "bsce_jax.report", "run0", "run1", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0,1" in done.stdout and "+-" in done.stdout
    drawn = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert drawn == ["confusion.png", "curves.png"]

    failed = run_python("-m", "bsce_jax.report", "run0", "nowhere", cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.startswith("error: nowhere/results.json does not exist")
    assert failed.stderr.count("\n") == 1

    (tmp_path / "other").mkdir()
    done = run_python("-m", "bsce_jax.report", "run0", "other", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == "left out: no results.json in other\n"
    failed = run_python("-m", "bsce_jax.report", "other", cwd=tmp_path)
    assert failed.returncode == 2 and "other/results.json" in failed.stderr


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


def test_command_refuses_an_output_that_is_a_file(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results.write(tmp_path, make_results())
    (tmp_path / "file").touch()
    output = str(tmp_path / "file")
    assert command.main([str(tmp_path), "--output", output]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_importing_the_report_does_not_load_matplotlib(tmp_path: pathlib.Path) -> None:
    code = "import bsce_jax.report, sys; print('matplotlib' in sys.modules)"
    assert run_python("-c", code, cwd=tmp_path).stdout == "False\n"


def test_the_file_is_strict_json(tmp_path: pathlib.Path) -> None:
    bad = make_results()
    bad["steps"][0]["telemetry"]["images_per_second"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        results.write(tmp_path, bad)
    assert not list(tmp_path.iterdir())
    results.write(tmp_path, make_results())
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == make_results()
