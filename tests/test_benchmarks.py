"""The benchmark scripts run, at tiny sizes; their numbers mean nothing here."""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

from bsce_jax import main
from bsce_jax.config import resolve
from tests.runs import ROOT

FOLDER = ROOT / "benchmarks"
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles in half the time
}


def run(script: str, *flags: str) -> str:
    """Standard output of a script that succeeds."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), "--reduced", *flags],
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_meta_gradient():
    found = json.loads(run("meta_gradient.py"))
    assert found["environment"]["platform"] == "cpu"
    (result,) = found["results"]
    assert set(found["targets"]) <= set(result)
    unit = result["train_step"]
    assert unit["time_ratio"] == unit["memory_ratio"] == 1
    forward, reverse = result["gradient_forward"], result["gradient_reverse"]
    assert 0 < forward["memory_ratio"] < reverse["memory_ratio"]
    assert result["alpha_and_train_step"]["ms_min"] > 0


def test_loop_on_cpu():
    found = json.loads(run("loop_on_cpu.py"))
    assert (found["host"]["updates_per_call"], found["loop"]["updates_per_call"]) == (
        1,
        found["options"]["updates"],
    )
    assert found["ratio"] > 0


@pytest.fixture
def gpu(monkeypatch) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", FOLDER / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "GRACE", 0.5)
    return module


def test_gpu_commands_are_valid(gpu, monkeypatch, tmp_path):
    flags = ["gpu.py", f"--output={tmp_path}", "--updates_per_call=20"]
    base = tmp_path / "runs" / "balanced"
    base.mkdir(parents=True)
    (base / "results.json").write_text('{"steps": [{}]}')
    for extra in ([], ["--reduced"]):
        monkeypatch.setattr(sys, "argv", flags + extra)
        tasks = {task.name: task for task in gpu.tasks(gpu.parse())}
        for stage in gpu.STAGES:
            assert any(task.stage == stage for task in tasks.values())
        runs = {name: t for name, t in tasks.items() if "bsce_jax.main" in t.command}
        configs = {}
        for name, task in runs.items():
            arguments = task.command[task.command.index("bsce_jax.main") :]
            config, workdir = main.parse(arguments)
            configs[name] = resolve(config)
            assert task.result == pathlib.Path(workdir) / "results.json"
        assert configs["none"].init_from == configs["meta_run"].init_from == str(base)
        assert configs["balanced"].init_from == ""
        assert configs["none"].model.dtype == "bfloat16"
        assert configs["speed-bsce_jax-float32-20"].model.dtype == "float32"
        assert {config.updates_per_call for config in configs.values()} == {20}
        if not extra:
            meta = configs["meta_run"]
            assert meta.prior == "meta" and meta.scenario.steps == 5
            assert meta.optim.epochs == meta.optim.base_epochs == 250
            relaxed = configs["podnet0_relaxed"]
            assert (relaxed.method, relaxed.memory.kind) == ("podnet", "none")
            assert relaxed.epsilon == 1.0 and relaxed.init_from == ""


@pytest.mark.slow
def test_torch(tmp_path):
    pytest.importorskip("torch")
    output = tmp_path / "torch.json"
    run("gpu.py", "--torch=bfloat16", f"--output={output}")
    assert json.loads(output.read_text())["images_per_s"] > 0


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

    def tasks(options):
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


@pytest.mark.slow
def test_gpu_in_whole(tmp_path):
    run("gpu.py", f"--output={tmp_path}")
    found = json.loads((tmp_path / "summary.json").read_text())["tasks"]
    assert {task["status"] for task in found.values()} <= {"done", "skipped"}
    base_steps = [found[name]["result"]["base_step"] for name in ("none", "meta_run")]
    assert base_steps == ["own", "taken over"]
    assert "| meta_run |" in (tmp_path / "summary.md").read_text()
