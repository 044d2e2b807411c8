"""The benchmark scripts run, at tiny sizes; their numbers mean nothing here."""

import argparse
import importlib
import json
import os
import pathlib
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from bsce_jax.reproduce import __main__ as reproduce
from tests.runs import ROOT

FOLDER = ROOT / "benchmarks"
PRIORS = ("none", "balanced")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles in half the time
}


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark script by name; they import one another."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def run(script: str, *flags: str, reduced: bool = True) -> str:
    """Standard output of a script that succeeds."""
    flags = ("--reduced", *flags) if reduced else flags
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *flags],
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def gpu_output(tmp_path_factory):
    """The folder of gpu.py: cuda_graphs.py, speed.py and meta_gradient.py in bfloat16.

    That is the first of its types; in float32 the rivals are compared below.
    """
    output = tmp_path_factory.mktemp("gpu")
    flags = ["--updates_per_call=5", "--bandwidth=1", "--tflops", "bfloat16=1"]
    run("gpu.py", *flags, f"--output={output}")
    return output


def found_by(output: pathlib.Path, stage: str) -> dict:
    """What the only task of a stage has written."""
    (file,) = (output / "tasks").glob(f"{stage}-*.json")
    return json.loads(file.read_text())


@pytest.mark.slow
def test_gpu_in_whole(gpu_output):
    found = json.loads((gpu_output / "summary.json").read_text())["tasks"]
    stages = {task["stage"] for task in found.values()}
    assert stages == {"runs", "graphs", "speed", "meta"}
    assert {task["status"] for task in found.values()} == {"done"}
    runs = found["runs"]["result"].values()
    assert len(runs) == 2 and {run["steps"] for run in runs} == {2}
    assert "| done | 2 |" in (gpu_output / "summary.md").read_text()


@pytest.mark.slow
def test_meta_gradient(gpu_output):
    found = found_by(gpu_output, "meta")
    assert found["environment"]["platform"] == "cpu"
    (result,) = found["results"]
    assert set(found["targets"]) <= set(result)
    unit = result["train_step"]
    assert unit["time_ratio"] == unit["memory_ratio"] == 1
    forward, reverse = result["gradient_forward"], result["gradient_reverse"]
    assert 0 < forward["memory_ratio"] < reverse["memory_ratio"]
    assert result["alpha_and_train_step"]["ms_min"] > 0


@pytest.mark.slow
def test_loop_on_cpu():
    found = json.loads(run("loop_on_cpu.py"))
    assert (found["host"]["updates_per_call"], found["loop"]["updates_per_call"]) == (
        1,
        found["options"]["updates"],
    )
    assert found["ratio"] > 0


@pytest.mark.slow
def test_many_devices(tmp_path):
    run("many_devices.py", "--devices=2", f"--output={tmp_path / 'found.json'}")
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["median"]) == {"one device", "jit", "pmap"}
    assert all(ratio > 0 for ratio in found["time over one device"].values())


@pytest.mark.slow
def test_checkpoint_time():
    assert "save" in run("checkpoint_time.py")


@pytest.fixture
def folder_of_jpegs(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(path)
    return tmp_path / "images"


@pytest.mark.slow
def test_host_memory(tmp_path, folder_of_jpegs):
    output = tmp_path / "found.json"
    flags = [f"--images={folder_of_jpegs}", "--epochs=3", "--pixels=16"]
    run("host_memory.py", *flags, f"--output={output}", reduced=False)
    found = json.loads(output.read_text())
    assert len(found["mebibytes"]) == 3 and min(found["mebibytes"]) > 50


@pytest.mark.slow
def test_input_pipeline(tmp_path, folder_of_jpegs):
    output = tmp_path / "found.json"
    flags = [f"--images={folder_of_jpegs}", "--rounds=1", "--seconds=0.2"]
    flags += ["--batch=8", "--size=16", "--resize=20", f"--output={output}"]
    run("input_pipeline.py", *flags, reduced=False)
    assert "bsce_jax" in output.read_text()


CASES = [("podnet", "none")]
SLOW_CASES = [
    ("podnet", "balanced"),
    *((method, prior) for method in ("il_baseline", "lucir") for prior in PRIORS),
]


@pytest.mark.parametrize(
    ("method", "prior"),
    CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES],
)
def test_rivals_compute_the_same(load, monkeypatch, method, prior):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    check, rivals, calls = load("check_rivals"), load("torch_rivals"), []
    losses = rivals.losses
    monkeypatch.setattr(rivals, "losses", lambda *a: calls.append(a) or losses(*a))
    ours, theirs = check.both_losses(method, prior, load("problem").REDUCED)
    np.testing.assert_allclose(theirs, ours, rtol=1e-4)
    # Each term counts, so that the comparison can fail.
    ((spec, *rest, _),) = calls
    for name, term in spec["terms"].items():
        changed = {name: {**term, "weight": 1.1 * term["weight"]}}
        other = losses({**spec, "terms": spec["terms"] | changed}, *rest, 1)
        assert abs(other[0] / ours[0] - 1) > 1e-3, name


@pytest.mark.slow
def test_what_speed_times(load, monkeypatch):
    """Programs are traced and not compiled: all that they give is ones."""
    problem, speed = load("problem"), load("speed")

    def traced(program, *arguments):
        shapes = jax.eval_shape(program._jitted, *arguments)
        return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)

    monkeypatch.setattr(problem.Program, "__call__", traced)
    p = problem.make("il_baseline", "meta", "float32", problem.REDUCED)
    problem.compile_all(p)
    done = {name: f()[1] for name, f in speed.contestants(p, updates=10).items()}
    # Without an image of each class: those are held out.
    images = (2 * 24 + 10 * 6) - 12
    assert done == {"train": 160, "epoch": images, "evaluate": 12 * 4, "herding": 2}
    spec = problem.rival_spec(p, 5)
    assert json.loads(json.dumps(spec)) == spec and spec["images"] == images


@pytest.mark.slow
def test_speed(load, gpu_output):
    results = found_by(gpu_output, "speed")["results"]
    lines = load("speed_table").markdown(results).splitlines()
    assert [line.count("|") for line in lines[:5]] == [14] * 5
    (result,) = results
    assert list(result["priors"]) == ["none", "balanced", "meta"]
    more = {"balanced over none", "meta over balanced"}
    assert result["more_time_percent"].keys() == more
    for facts in result["priors"].values():
        for name in ("train", "epoch", "evaluate", "herding"):
            assert facts[name]["per_s"] > 0
        assert facts["temp_bytes"] > 0 and facts["updates_per_call"] in (5, 10)
    none, _, meta = result["priors"].values()
    assert none["compile_s"].keys() >= {"incremental_update", "evaluate", "herd"}
    assert "incremental_meta_update" in meta["compile_s"]
    assert 0 < none["share_of_floor"] < 1
    if result["torch"]:
        assert none["train"]["ratio"]["eager"] > 0
        assert none["epoch"]["ratio"]["loader"] > 0
    assert result["seconds_to_first_update"]["warm"] > 0
    profile = result["profile"]
    assert len(profile["hottest"]) == 10 and list(gpu_output.rglob("*.xplane.pb"))
    assert profile["busy_ms"] > 0 and 0 <= profile["idle_percent"] < 100
    assert result["rounds"] == 2


HLO = """
ENTRY %main {
  %a = bf16[2,3]{1,0} parameter(0)
  %b.1 = f32[4]{0} parameter(1)
  %call = (bf16[2,2]{1,0}, u8[99]{0}) custom-call(%a, %b.1), custom_call_target="conv"
  ROOT %sum = f32[4]{0} add(%b.1, %b.1)
}
"""


def test_bytes_of_library_calls(load):
    assert load("cost").library_bytes(HLO) == 2 * 6 + 4 * 4 + 2 * 4


def test_flops_are_counted_where_the_device_cannot(load):
    """Two flops a multiply-add; what `Lowered.cost_analysis` has on CPU."""
    a, b = jnp.ones((3, 5)), jnp.ones((5, 7))
    traced = jax.jit(lambda pair: {"product": jnp.dot(*pair)}).trace((a, b))
    found = load("cost").counted(traced)
    known = traced.lower().cost_analysis()
    assert found["flops"] == known["flops"] == 2 * 3 * 5 * 7


def test_what_a_trace_says(load):
    """Two lines of a device; the busier one works 6 of 10 ns."""

    def event(name, start, end, **stats):
        return types.SimpleNamespace(
            name=name,
            start_ns=start,
            end_ns=end,
            duration_ns=end - start,
            stats=list(stats.items()),
        )

    first = [
        event("a", 0, 4, hlo_op="fusion.12"),
        event("b", 1, 2, hlo_op="add.3"),
        event("c", 8, 10, hlo_op="fusion.7.1"),
        event("host", 0, 99),
    ]
    second = [event("copy", 2, 5, correlation_id=1)]
    lines = [
        types.SimpleNamespace(name=f"Stream #{n}", events=events)
        for n, events in enumerate((first, second))
    ]
    plane = types.SimpleNamespace(name="/device:GPU:0", lines=lines)
    found = load("profiles").summary(types.SimpleNamespace(planes=[plane]))
    assert [entry[:2] for entry in found["hottest"]] == [
        ["fusion", 2],
        ["copy", 1],
        ["add", 1],
    ]
    assert [entry[3] for entry in found["hottest"]] == [55.6, 33.3, 11.1]
    assert (found["operations"], found["idle_percent"]) == (4, 40.0)


@pytest.fixture
def gpu(load, monkeypatch) -> types.ModuleType:
    module = load("gpu")
    monkeypatch.setattr(module, "GRACE", 0.5)
    monkeypatch.setattr(module, "LEAST", dict.fromkeys(module.STAGES, 0))
    return module


@pytest.mark.parametrize("extra", [[], ["--reduced"]])
def test_gpu_commands_are_valid(gpu, load, monkeypatch, tmp_path, extra):
    flags = ["gpu.py", f"--output={tmp_path}", "--updates_per_call=20", *extra]
    monkeypatch.setattr(sys, "argv", [*flags, "--limit_seconds=600"])
    tasks = list(gpu.tasks(gpu.parse(), time.monotonic() + 570))
    assert {task.stage for task in tasks} == set(gpu.STAGES)
    speed = [task.command for task in tasks if task.stage == "speed"]
    assert sum("--no-startup" not in command for command in speed) == 1
    assert len({task.name for task in tasks}) == len(tasks)
    for task in tasks:
        if task.stage != "runs":
            script = pathlib.Path(task.command[1])
            monkeypatch.setattr(sys, "argv", task.command[1:])
            options = load(script.stem).parse()
            assert options.output == str(task.result)
            assert options.reduced == bool(extra)
    arguments = tasks[0].command[3:]  # what matters most comes first
    options = reproduce.parse(arguments)
    chosen = reproduce.choose(options)
    assert chosen.overrides == ("--config.updates_per_call=20",)
    assert options.in_process and 9.4 <= options.minutes <= 9.5
    assert tasks[0].result == pathlib.Path(options.output, "manifest.json")
    if extra:
        assert reproduce.main([*arguments, "--dry_run"]) == 0
    else:
        assert chosen.tables == ("table1", "table3", "table5")
        assert chosen.columns == ("cifar100-5", "5-average")
        assert (chosen.dataset, chosen.rows) == ("cifar100", gpu.ROWS)


WORK = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{\"x\": 1}')"
SLEEP_ONCE = """
import pathlib, sys, time
result = pathlib.Path(sys.argv[1])
begun = result.with_suffix(".begun")
if not begun.exists():
    begun.touch()
    time.sleep(100)
result.write_text("{}")
"""


def all_tasks(gpu, monkeypatch, folder, codes, limit=0.0):
    """Runs tasks of the given Python codes; the summary on the disk."""

    def tasks(options, deadline):
        for name, code in codes.items():
            result = folder / f"{name}.json"
            command = [sys.executable, "-c", code, str(result)]
            yield gpu.Task(name, "meta", command, result)

    monkeypatch.setattr(gpu, "tasks", tasks)
    summary = {"reduced": True, "commands": ["test"], "tasks": {}}
    file = folder / "summary.json"
    if file.exists():
        summary = json.loads(file.read_text())
    options = argparse.Namespace(output=folder, limit_seconds=limit, reduced=True)
    gpu.run_all(options, summary)
    assert json.loads(file.read_text()) == summary
    return summary["tasks"]


def test_gpu_keeps_what_is_done_and_repeats_what_failed(gpu, monkeypatch, tmp_path):
    codes = {"bad": "raise SystemExit('out of cheese')", "good": WORK}
    first = all_tasks(gpu, monkeypatch, tmp_path, codes)
    assert first["bad"]["status"] == "failed"
    assert first["bad"]["note"] == "out of cheese"
    assert first["good"]["status"] == "done" and first["good"]["result"] == {"x": 1}
    codes = {"bad": WORK, "good": "raise SystemExit('called again')"}
    second = all_tasks(gpu, monkeypatch, tmp_path, codes)
    assert second["bad"]["status"] == second["good"]["status"] == "done"
    assert (second["bad"]["attempts"], second["good"]["attempts"]) == (2, 1)
    assert "out of cheese" in (tmp_path / "meta.log").read_text()


def test_gpu_ends_at_the_limit_and_continues(gpu, monkeypatch, tmp_path):
    codes = {"before": WORK, "long": SLEEP_ONCE, "after": WORK}
    first = all_tasks(gpu, monkeypatch, tmp_path, codes, limit=gpu.GRACE + 3)
    statuses = [first[name]["status"] for name in codes]
    assert statuses == ["done", "unfinished", "to do"]
    assert 0 < first["long"]["seconds"] < 20
    second = all_tasks(gpu, monkeypatch, tmp_path, codes)
    assert {task["status"] for task in second.values()} == {"done"}
    assert second["long"]["attempts"] == 2
    assert second["long"]["seconds"] >= first["long"]["seconds"]


def test_gpu_times_rivals_against_the_fastest_graphs(gpu, monkeypatch, tmp_path):
    flags = ["gpu.py", f"--output={tmp_path}", "--stages=speed", "--reduced"]

    def graphs_of_speed() -> str:
        monkeypatch.setattr(sys, "argv", flags)
        (task,) = gpu.tasks(gpu.parse(), time.monotonic() + 600)
        return task.command[task.command.index("--graphs") + 1]

    assert graphs_of_speed() == "default"
    rates = {"default": 1.0, "concurrent": 3.0, "whole": 2.0}
    found = [{"graphs": k, "train": {"per_s": rate}} for k, rate in rates.items()]
    (tmp_path / "tasks").mkdir()
    earlier = tmp_path / "tasks" / "graphs-il_baseline-bfloat16.json"
    earlier.write_text(json.dumps({"results": found}))
    assert graphs_of_speed() == "concurrent"


def test_gpu_begins_nothing_that_has_no_time(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "LEAST", {"meta": 60})
    found = all_tasks(gpu, monkeypatch, tmp_path, {"a": WORK}, limit=gpu.GRACE + 30)
    assert found["a"]["status"] == "to do" and not (tmp_path / "a.json").exists()


def test_gpu_keeps_what_an_unfinished_task_has_found(gpu, monkeypatch, tmp_path):
    code = WORK + "; import time; time.sleep(100)"
    found = all_tasks(gpu, monkeypatch, tmp_path, {"a": code}, limit=gpu.GRACE + 3)
    assert found["a"]["status"] == "unfinished" and found["a"]["result"] == {"x": 1}


def test_gpu_runs_with_something_left_are_not_done(gpu, monkeypatch, tmp_path):
    manifest = tmp_path / "manifest.json"
    run = {"name": "a", "workdir": "runs/a", "status": "to do"}
    text = json.dumps({"cells": [{"runs": [run]}]})
    code = f"import sys, pathlib; pathlib.Path({str(manifest)!r}).write_text({text!r})"
    summary = {}
    for status, expected in ((3, "unfinished"), (1, "failed"), (0, "done")):
        command = [sys.executable, "-c", f"{code}; print('end'); sys.exit({status})"]
        task = gpu.Task("runs", "runs", command, manifest)
        monkeypatch.setattr(gpu, "tasks", lambda *_, task=task: [task])
        options = argparse.Namespace(output=tmp_path, limit_seconds=0, reduced=True)
        summary = summary or {"reduced": True, "commands": ["test"], "tasks": {}}
        gpu.run_all(options, summary)
        assert summary["tasks"]["runs"]["status"] == expected
    assert summary["tasks"]["runs"]["result"]["a"]["steps"] == 0
    assert "| a | to do |" in (tmp_path / "summary.md").read_text()
