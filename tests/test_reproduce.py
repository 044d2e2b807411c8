"""The runner of the paper's tables: shared base steps, going on, the command."""

import json
import pathlib
import sys
import textwrap
import time

import pytest
from etils import epath

from bsce_jax.errors import UserError
from bsce_jax.hosts.workdir import lock
from bsce_jax.report import results
from bsce_jax.reproduce import __main__ as command
from bsce_jax.reproduce import process, runner, tables
from bsce_jax.reproduce.tables import Job, expand
from tests import example_jobs
from tests.example_jobs import fake
from tests.example_results import make_results


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> pathlib.Path:
    return example_jobs.write_config(tmp_path_factory.mktemp("reproduce"))


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


def test_a_table_is_run_reported_and_not_run_again(small, scripted, tmp_path, capsys):
    """As with real runs above, but with scripts in their place."""
    chosen = command.choose(command.parse(arguments(small, tmp_path)))
    jobs = {job.name: job for cell in expand(chosen) for job in cell.jobs}
    first, second = jobs
    scripted(list(jobs.values()))
    assert command.main(arguments(small, tmp_path)) == 0
    assert "2 of 2 runs done" in capsys.readouterr().out
    assert order(tmp_path) == [first, f"{second} {first}"]
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert written["protocol"].startswith("reduced: ")
    statuses = [run["status"] for cell in written["cells"] for run in cell["runs"]]
    assert statuses == ["done"] * 4
    for name in ("report.html", "report.md", "report.csv"):
        assert (tmp_path / name).stat().st_size > 100
    assert command.main(arguments(small, tmp_path)) == 0
    assert "2 of 2 runs done" in capsys.readouterr().out
    assert len(order(tmp_path)) == 2


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
        (["--shard=\N{SUPERSCRIPT TWO}/3"], "expected I/N"),
        (["--shard=1/1000000000000"], "expected I/N"),
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
        ("--minutes=0.9", "--minutes=0.9: expected 0 (none) or more than 1, in which"),
        ("--minutes=-5", "--minutes=-5: expected 0"),
        ("--export=out", "--export=out: expected with --in_process only"),
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
