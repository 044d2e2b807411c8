"""The runner of the paper's tables: cells to runs, shared base steps, going on."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import textwrap
import time

import pytest
from etils import epath

from bsce_jax.config.flags import parse
from bsce_jax.config.hashes import config_hash
from bsce_jax.config.resolve import resolve
from bsce_jax.errors import UserError
from bsce_jax.hosts.workdir import lock
from bsce_jax.report import published, results
from bsce_jax.reproduce import __main__ as command
from bsce_jax.reproduce import manifest, process, runner, tables
from bsce_jax.reproduce.tables import (
    Chosen,
    Job,
    TableCell,
    by_base_step,
    configs_folder,
    cost,
    expand,
    share,
)
from tests import runs
from tests.example_results import make_results

CONFIG = """
from bsce_jax.config import (
    COMMON_ARGUMENTS,
    apply_arguments,
    default_config,
    method_module,
)

def get_config(argument=None):
    c = default_config()
    apply_arguments(c, argument, COMMON_ARGUMENTS)
    method_module({method_file!r}, c.method).configure(c, "digits")
    c.data.name, c.data.data_dir = "blobs", {data_dir!r}
    c.data.mean, c.data.std, c.data.padding, c.data.flip = (0.5,), (0.5,), 1, False
    c.scenario.base_classes, c.scenario.steps = 4, 2
    c.memory.per_class = 3
    c.model.width = 4
    c.model.conv_chunks = 1
    c.optim.batch_size = 16
    c.phase.base.epochs, c.phase.base.milestones = 2, (1,)
    c.phase.incremental.epochs, c.phase.incremental.milestones = 1, (1,)
    c.meta.every, c.meta.batch_size = 2, 8
    return c
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> pathlib.Path:
    """A configuration of CIFAR-100's arguments for a data set of six classes."""
    folder = tmp_path_factory.mktemp("reproduce")
    runs.blobs(folder / "data", 6)
    path = folder / "small.py"
    path.write_text(
        CONFIG.format(
            method_file=str(runs.ROOT / "configs" / "x.py"),
            data_dir=str(folder / "data"),
        )
    )
    return path


def chosen(small, tables=("table5",), **changes) -> Chosen:
    values = {
        "tables": tuple(tables),
        "dataset": "cifar100",
        "rows": (),
        "columns": (),
        "seeds": 1,
        "files": {"cifar100": str(small)},
        "overrides": (),
        "folder": configs_folder(),
    }
    return Chosen(**{**values, **changes})


def test_every_chosen_cell_has_its_jobs_or_a_reason(small):
    found = expand(chosen(small, ("table1", "table5"), seeds=2))
    paper = published.load()
    expected = [
        (key, row.key, column.key)
        for key in ("table1", "table5")
        for row in paper[key].rows
        for column in paper[key].columns
        if column.key.startswith(("cifar100", "5-", "10-"))
    ]
    assert [(c.table, c.row, c.column) for c in found] == expected
    for cell in found:
        assert (len(cell.jobs), bool(cell.missing)) in ((2, False), (0, True))
        assert [job.seed for job in cell.jobs] in ([], [0, 1])
    reasons = {cell.row: cell.missing for cell in found if cell.missing}
    assert "the method mnemonics does not exist here yet" in reasons.values()


def test_cells_of_one_configuration_share_their_job(small):
    found = expand(chosen(small, ("table1", "table5")))
    by_key = {(c.table, c.row, c.column): c.jobs for c in found}
    (job,) = by_key["table5", "alpha-1.0", "5-average"]
    assert by_key["table5", "alpha-1.0", "5-final"] == (job,)
    assert by_key["table1", "il_baseline_balanced", "cifar100-5"] == (job,)
    names = {j.name: j.config_hash for jobs in by_key.values() for j in jobs}
    assert len(set(names.values())) == len(names)
    (other,) = by_key["table5", "alpha-0.5", "5-average"]
    assert other.base_hash == job.base_hash and other.config_hash != job.config_hash
    assert job.updates > job.base_updates > 0


def test_a_cell_whose_configuration_is_refused_says_why(small):
    found = expand(
        chosen(small, ("table4",), overrides=("--config.memory.per_class=1",))
    )
    meta = {cell.missing for cell in found if cell.row.endswith("meta")}
    assert len(meta) == 1 and "at least 2 for prior=meta" in meta.pop()
    wrong = "config.phase.incremental.epochs=-1"
    with pytest.raises(UserError, match=f"nothing can be run: {wrong}"):
        expand(chosen(small, overrides=(f"--{wrong}",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tables": ("table9",)}, "table 'table9': expected one of table1, table2"),
        ({"rows": ("mine",)}, "row 'mine' of table5: one of alpha-0.1"),
        ({"columns": ("mine",)}, "column 'mine' of table5: one of 5-final_base"),
        ({"dataset": "mnist"}, "--dataset 'mnist' of table5: one of cifar100"),
        (
            {"tables": ("table1", "table5"), "rows": ("alpha-0.5", "podnett")},
            "row 'podnett' of table1, table5: one of ",
        ),
        (
            {"files": {"cifar10": "cifar100_cpu"}},
            "--file 'cifar10' of table5: one of cifar100",
        ),
        ({"files": {"cifar100": "none"}}, "none.py does not exist yet"),
    ],
)
def test_a_wrong_choice_is_one_line(small, changes, message):
    with pytest.raises(UserError, match=message):
        expand(chosen(small, **changes))


def fake(name: str, base: str, updates: int = 10, base_updates: int = 4) -> Job:
    return Job(name, 0, (), f"hash of {name}", base, updates, base_updates)


def test_shares_keep_base_steps_together_and_lose_nothing():
    jobs = [fake(f"{b}{i}", b, 10 + i) for b in "abcde" for i in range(3)]
    for count in (1, 2, 3, 5):
        parts = [share(jobs, i + 1, count) for i in range(count)]
        assert sorted(j.name for part in parts for j in part) == sorted(
            j.name for j in jobs
        )
        bases = [{j.base_hash for j in part} for part in parts]
        assert sum(map(len, bases)) == 5  # no base step in two parts
        assert max(map(load, parts)) - min(map(load, parts)) <= load(jobs) / 5


def test_a_base_step_with_more_runs_than_a_share_is_cut():
    """Four runs of 96 updates and a base step of 4, beside one small run."""
    large = [fake(f"a{i}", "a", 100) for i in range(4)]
    jobs = [*large, fake("b0", "b", 14)]
    parts = [share(jobs, i + 1, 4) for i in range(4)]
    assert sorted(j.name for p in parts for j in p) == ["a0", "a1", "a2", "a3", "b0"]
    assert sorted(map(load, parts)) == [100, 100, 100, 114]
    weighed = [fake("a", "a", 100), *(fake(f"b{i}", f"b{i}", 10) for i in range(3))]
    wide = dataclasses.replace(weighed[1], pixels=10)
    (first,), others = (share([wide, *weighed[2:]], i, 2) for i in (1, 2))
    assert first == wide and len(others) == 2  # ten times the work of the others


def load(part) -> int:
    return sum(map(cost, by_base_step(part)))


# The runner, with scripts in place of runs.

SCRIPT = """
    import json, os, pathlib, signal, sys, time
    workdir, behaviour = pathlib.Path(sys.argv[1]).absolute(), sys.argv[2]
    taken = sys.argv[3:]
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir.parent.parent / "order").open("a") as file:
        print(workdir.name, *[pathlib.Path(base).name for base in taken], file=file)
    if behaviour == "two":
        print("80/100 updates", flush=True)
        time.sleep(0.7)
        print("85/100 updates", flush=True)
    else:
        print("step 1/2, 3/10 updates", flush=True)
    if behaviour == "fail":
        raise SystemExit("out of cheese")
    if behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "patient":
        def end(*_):
            (workdir / "told").write_text(str(time.time()))
            time.sleep(1)
            (workdir / "ended").write_text(str(time.time()))
            sys.exit(143)
        signal.signal(signal.SIGTERM, end)
        (workdir / "listens").touch()
        time.sleep(100)
    if behaviour == "slow":
        time.sleep(100)
    (workdir / "checkpoints" / "4").mkdir(parents=True)
    (workdir / "results.json").write_text((workdir.parent.parent / workdir.name)
                                          .read_text())
"""


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """Makes a runner whose runs are scripts with a behaviour each."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    monkeypatch.setattr(runner, "GRACE", 1.0)
    monkeypatch.setattr(runner, "LOOK_SECONDS", 0.1)

    def make(jobs, behaviours=None, at_once=1):
        behaviours = behaviours or {}
        for job in jobs:
            made = make_results() | {
                "config_hash": job.config_hash,
                "base_hash": job.base_hash,
            }
            (tmp_path / job.name).write_text(json.dumps(made))

        def of(job, workdir, base):
            arguments = [workdir, behaviours.get(job.name, "work")]
            return [sys.executable, str(script), *arguments, *([base] if base else [])]

        monkeypatch.setattr(tables, "command", of)
        (tmp_path / "runs").mkdir(exist_ok=True)
        shown, states = [], []
        made = runner.Runner(
            jobs, tmp_path, at_once, shown.append, lambda s, _: states.append(dict(s))
        )
        return made, shown, states

    return make


def order(folder: pathlib.Path) -> list[str]:
    return (folder / "order").read_text().splitlines()


def test_a_base_step_is_trained_once_and_done_runs_are_skipped(scripted, tmp_path):
    jobs = [fake("a0", "a"), fake("a1", "a"), fake("b0", "b"), fake("a2", "a")]
    made, shown, states = scripted(jobs[:2], at_once=2)
    made.work(float("inf"), lambda: False)
    assert order(tmp_path) == ["a0", "a1 a0"]  # a1 waited, although there was room
    assert states[-1] == {"a0": "done", "a1": "done"}
    made, _, states = scripted(jobs, at_once=1)
    assert made.states["a0"] == "done"
    made.work(float("inf"), lambda: False)
    assert order(tmp_path)[2:] == ["b0", "a2 a0"]
    assert set(states[-1].values()) == {"done"}
    assert any("a0: done" in line for line in shown)


def test_a_failed_run_is_named_and_the_others_go_on(scripted, tmp_path):
    jobs = [fake("a0", "a"), fake("a1", "a")]
    made, shown, _ = scripted(jobs, {"a0": "fail"})
    made.work(float("inf"), lambda: False)
    assert made.states == {"a0": "failed", "a1": "done"}
    assert any("a0: failed, out of cheese" in line for line in shown)
    made, _, _ = scripted(jobs)  # called again, it is tried again
    made.work(float("inf"), lambda: False)
    assert made.states == {"a0": "done", "a1": "done"}
    assert order(tmp_path)[-1] == "a0 a1"


def test_a_killed_run_has_failed_and_is_not_started_again(scripted, tmp_path):
    """Or one that has not enough memory would be started for ever."""
    made, shown, _ = scripted([fake("a0", "a")], {"a0": "killed"})
    made.work(float("inf"), lambda: False)
    assert made.states == {"a0": "failed"} and order(tmp_path) == ["a0"]
    assert any("killed by SIGKILL (out of memory?)" in line for line in shown)


def test_all_runs_are_told_to_end_before_the_first_is_waited_for(
    scripted, monkeypatch, tmp_path
):
    monkeypatch.setattr(runner, "GRACE", 20.0)
    jobs = [fake(f"{b}0", b) for b in "abc"]
    behaviours = {job.name: "patient" for job in jobs}
    made, *_ = scripted(jobs, behaviours, at_once=3)
    workdirs = [tmp_path / "runs" / job.name for job in jobs]
    made.work(float("inf"), lambda: all((w / "listens").exists() for w in workdirs))
    told, ended = (
        [float((workdir / name).read_text()) for workdir in workdirs]
        for name in ("told", "ended")
    )
    assert max(told) < min(ended)
    assert set(made.states.values()) == {"to do"}


def test_a_workdir_that_another_process_has_is_waited_for(scripted, tmp_path):
    """Of two runners on one folder, or after one that was killed."""
    made, shown, _ = scripted([fake("a0", "a"), fake("a1", "a")])
    folder = tmp_path / "runs" / "a0"
    folder.mkdir()
    with lock(epath.Path(folder)):
        made.work(time.monotonic() + 0.5, lambda: False)
        assert made.states == {"a0": "elsewhere", "a1": "to do"}
    assert "a0: runs in another process" in shown and not (tmp_path / "order").exists()
    made.work(float("inf"), lambda: False)
    assert made.states == {"a0": "done", "a1": "done"}
    assert order(tmp_path) == ["a0", "a1 a0"]


def test_at_the_limit_runs_are_asked_to_end_and_continue_later(scripted, tmp_path):
    jobs = [fake("a0", "a"), fake("a1", "a")]
    made, _, states = scripted(jobs, {"a0": "slow"})
    made.work(time.monotonic() + 0.5, lambda: False)
    assert states[-1] == {"a0": "to do", "a1": "to do"}
    made, _, states = scripted(jobs)
    made.work(float("inf"), lambda: False)
    assert states[-1] == {"a0": "done", "a1": "done"}


def test_progress_counts_a_shared_base_step_once(scripted, tmp_path):
    jobs = [fake("a0", "a", 10, 4), fake("a1", "a", 12, 4), fake("b0", "b", 5, 1)]
    made, *_ = scripted(jobs)
    assert made.progress().startswith("0/3 runs, 0.0 %")
    made, *_ = scripted(jobs[:1])
    made.work(float("inf"), lambda: False)
    made, *_ = scripted(jobs)
    assert made.progress().startswith(f"1/3 runs, {100 * 10 / 23:.1f} %")


def test_a_run_of_another_configuration_in_the_way_is_refused(scripted, tmp_path):
    made, *_ = scripted([fake("a0", "a")])
    made.work(float("inf"), lambda: False)
    other = Job("a0", 0, (), "another hash", "a", 10, 4)
    with pytest.raises(UserError, match="a run of another configuration"):
        scripted([other])


def test_time_left_is_that_of_what_this_call_has_done(scripted, tmp_path):
    """A run that goes on at 80 of 100 updates has not done 80 in this call."""
    job = fake("a0", "a", 100, 10)
    (tmp_path / "logs").mkdir()
    (tmp_path / "runs" / "a0" / "checkpoints").mkdir(parents=True)
    (tmp_path / "logs" / "a0.log").write_text("step 3/5, 80/100 updates\n")
    made, shown, _ = scripted([job, fake("b0", "b", 100, 10)], {"a0": "two"})
    assert made.progress() == "0/2 runs, 40.0 %"
    made.work(float("inf"), lambda: False)
    made._began = time.monotonic() - 3600  # an hour for 5 updates; 112 are left
    made.states = {"a0": "to do", "b0": "to do"}
    assert made.progress() == "0/2 runs, 44.0 %, about 22.4 h left"


# The list of cells that the report is made from.


ROWS = {"a": "il_baseline", "b": "lucir", "c": "podnet", "d": "il_baseline_meta"}


def listed(folder, *names: str, protocol="full", **states):
    found = [
        TableCell("table1", ROWS.get(name, name), "cifar100-5", "", (fake(name, "a"),))
        for name in names
    ]
    manifest.write(folder, protocol, found, states)
    written = json.loads((folder / manifest.NAME).read_text())
    return {run["name"]: run["status"] for c in written["cells"] for run in c["runs"]}


def test_cells_of_earlier_commands_stay_in_the_manifest(tmp_path):
    assert listed(tmp_path, "a", "b", a="done", b="failed") == {
        "a": "done",
        "b": "failed",
    }
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "results.json").write_text(json.dumps(make_results()))
    known = {"a": "done", "b": "failed", "c": "running"}
    assert listed(tmp_path, "c", c="elsewhere") == known
    assert listed(tmp_path, "b", b="to do") == known | {"b": "to do", "c": "to do"}
    assert listed(tmp_path, "d", protocol="reduced: x", d="done") == {"d": "done"}
    # A row that has gone from the paper's tables would cost the page.
    found = listed(tmp_path, "gone", protocol="reduced: x", gone="done")
    assert found == {"d": "to do", "gone": "done"}
    found = listed(tmp_path, "a", protocol="reduced: x", a="to do")
    assert found == {"d": "to do", "a": "to do"}


def test_many_processes_may_write_one_manifest(tmp_path):
    code = (
        "import sys; from etils import epath; from bsce_jax.report import results\n"
        "target = epath.Path(sys.argv[1])\n"
        "for _ in range(300): results.replace(target, sys.argv[2], shared=True)"
    )
    empty = json.dumps({"schema": 1, "protocol": "full", "cells": []})
    arguments_ = [sys.executable, "-c", code, str(tmp_path / manifest.NAME), empty]
    other = subprocess.Popen(arguments_, cwd=runs.ROOT)
    while other.poll() is None:
        manifest.write(tmp_path, "full", [], {})
    assert other.returncode == 0
    assert json.loads((tmp_path / manifest.NAME).read_text())["cells"] == []
    assert [path.name for path in tmp_path.iterdir()] == [manifest.NAME]


# The command.


def arguments(small, output, *more: str) -> list[str]:
    return [
        "--table=5",
        "--rows",
        "alpha-0.5",
        "alpha-1.0",
        "--columns",
        "5-average",
        "5-final",
        "--file",
        f"cifar100={small}",
        f"--output={output}",
        *more,
    ]


@pytest.mark.slow
def test_real_runs_of_a_table_are_reported_and_not_run_again(small, tmp_path, capsys):
    """End to end, with real runs; the second takes over the first one's base step."""
    assert command.main(arguments(small, tmp_path)) == 0
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert written["protocol"].startswith("reduced: ")
    workdirs = sorted((tmp_path / "runs").iterdir())
    found = [results.read(workdir) for workdir in workdirs]
    assert len(found) == 2 and {r["status"] for r in found} == {"done"}
    assert found[0]["base_hash"] == found[1]["base_hash"]
    compiled = [r["steps"][-1]["telemetry"]["compiles"] for r in found]
    assert sum("base_update" in counts for counts in compiled) == 1
    assert str(tmp_path) not in json.dumps([r["config"] for r in found])
    statuses = [run["status"] for cell in written["cells"] for run in cell["runs"]]
    assert statuses == ["done"] * 4
    for name in ("report.html", "report.md", "report.csv"):
        assert (tmp_path / name).stat().st_size > 100
    times = [(w / "results.json").stat().st_mtime for w in workdirs]
    capsys.readouterr()
    assert command.main(arguments(small, tmp_path)) == 0
    assert "2 of 2 runs done" in capsys.readouterr().out
    assert [(w / "results.json").stat().st_mtime for w in workdirs] == times


def test_a_table_is_run_reported_and_not_run_again(
    small, scripted, monkeypatch, tmp_path, capsys
):
    """As with real runs above, but for the runs."""
    chosen_ = command.choose(command.parse(arguments(small, tmp_path)))
    jobs = list({job.name: job for cell in expand(chosen_) for job in cell.jobs})
    assert len(jobs) == 2
    scripted([job for cell in expand(chosen_) for job in cell.jobs])
    assert command.main(arguments(small, tmp_path)) == 0
    assert "2 of 2 runs done" in capsys.readouterr().out
    assert order(tmp_path) == [jobs[0], f"{jobs[1]} {jobs[0]}"]
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert written["protocol"].startswith("reduced: ")
    statuses = [run["status"] for cell in written["cells"] for run in cell["runs"]]
    assert statuses == ["done"] * 4
    for name in ("report.html", "report.md", "report.csv"):
        assert (tmp_path / name).stat().st_size > 100
    assert command.main(arguments(small, tmp_path)) == 0
    assert "2 of 2 runs done" in capsys.readouterr().out
    assert len(order(tmp_path)) == 2


def test_the_commands_of_jobs_are_valid(small, tmp_path):
    """What runs is the configuration that the job's hashes and updates are of."""
    (first, *_), *others = (c.jobs for c in expand(chosen(small)) if c.jobs)
    assert others
    for job, base in ((first, ""), (others[-1][0], "runs/first")):
        flags = tables.command(job, "runs/x", base)[3:]
        values = parse(["main", *flags])
        assert values.workdir == "runs/x"
        config = resolve(values.config)
        assert (config.init_from, config_hash(config)) == (base, job.config_hash)


def test_a_dry_run_prints_the_commands(small, tmp_path, capsys):
    assert command.main(arguments(small, tmp_path / "x", "--dry_run", "--seeds=2")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and not (tmp_path / "x").exists()
    assert all("bsce_jax.main --config=" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shard=3/2"], "--shard '3/2': expected I/N"),
        (["--shard=x"], "--shard 'x'"),
        (["--file", "cifar100"], "--file cifar100: expected NAME=OTHER"),
        (["--config.phase.incremental.epoch=1"], "epoch"),
        (["--file", f"cifar100={'small'}", "table9=x"], "--file 'table9' of table5"),
    ],
)
def test_mistakes_are_one_line(small, tmp_path, capsys, flags, message):
    assert command.main(arguments(small, tmp_path, *flags)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("bsce_jax: ") and message in line


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--limit_seconds=50", "--limit_seconds=50: expected 0 (none) or more than 60"),
        ("--limit_seconds=-5", "--limit_seconds=-5: expected 0"),
        ("--output=gs://bucket/x", "expected a folder of this machine"),
        ("--config.seed=3", "unexpected '--config.seed=3': give --seeds"),
        ("--config.print_plan=True", "give --dry_run"),
    ],
)
def test_flags_that_cannot_be_meant(flag, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--table=5", flag])
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_relative_data_dir_is_one_of_the_callers_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = ["--table=5", "--config.data.data_dir=here", "--config.seed_=1"]
    chosen_ = command.choose(command.parse(flags))
    assert chosen_.overrides == (
        f"--config.data.data_dir={tmp_path / 'here'}",
        "--config.seed_=1",
    )
    assert process.absolute("gs://bucket/data") == "gs://bucket/data"
    assert process.absolute("here") == str(tmp_path / "here")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "full"),
        (["--config.log_seconds=60", "--config.checkpoint.minutes=5.0"], "full"),
        (["--config.deterministic=True", "--config.parallel=pmap"], "full"),
        (["--config.phase.base.epochs=9"], "reduced: phase.base.epochs=9"),
        (
            ["--file", "cifar100=digits", "--config.phase.base.milestones=(10, 20)"],
            "reduced: configs/digits.py for configs/cifar100.py; "
            "phase.base.milestones=(10, 20)",
        ),
    ],
)
def test_the_protocol_is_told_as_it_is(flags, expected):
    options = command.parse(["--table=5", *flags])
    assert command.protocol(command.choose(options)) == expected
