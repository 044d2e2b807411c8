"""Rows in one process: their order, the limit, and the same bits as alone."""

import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import time
from unittest import mock

import jax
import pytest

from bsce_jax import experiment
from bsce_jax.compute import parallel
from bsce_jax.errors import UserError
from bsce_jax.hosts.stop import StopSignal
from bsce_jax.hosts.workdir import lock
from bsce_jax.report import results
from bsce_jax.reproduce import __main__ as command
from bsce_jax.reproduce import archive, in_process, tables
from bsce_jax.reproduce.process import absolute_folders
from bsce_jax.reproduce.tables import Job
from bsce_jax.run.loop import StopRequested
from tests import example_jobs, runs
from tests.example_results import make_results


def job(name: str, base: str) -> Job:
    fields = {name: False for name in in_process._OF_PROCESS}
    config = fields | {"scenario.steps": 2, "scenario.base_classes": 5 * (name != "e0")}
    return dataclasses.replace(example_jobs.fake(name, base), config=config)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Makes rows whose runs are functions; what they do is in `begun`."""
    begun: list[str] = []
    behaviours: dict[str, object] = {}
    (tmp_path / "runs").mkdir()
    compiled: concurrent.futures.Future[bool] = concurrent.futures.Future()
    compiled.set_result(True)
    shared = mock.Mock(compile_ahead=mock.Mock(return_value=compiled))

    def carry_out(prepared, stop, after_step):
        (config, base), folder = prepared
        begun.append(" ".join([folder.name, base]).strip())
        if folder.name in behaviours:
            behaviours[folder.name](stop)
        base_hash = {"config_hash": config.config_hash, "base_hash": config.base_hash}
        text = json.dumps(make_results() | base_hash)
        (folder / "checkpoints" / "1").mkdir(parents=True)
        (folder / "results.json").write_text(text)
        after_step()

    monkeypatch.setattr(in_process, "config_of", lambda job, base="": (job, base))
    monkeypatch.setattr(
        experiment,
        "prepared",
        lambda *a: contextlib.nullcontext((a[0], pathlib.Path(a[1]))),
    )
    monkeypatch.setattr(experiment, "carry_out", carry_out)

    def make(*jobs: Job, **kwargs):
        shown, states = [], []
        changed = lambda s, last: states.append((dict(s), last))  # noqa: E731
        made = in_process.Rows(jobs, tmp_path, shared, shown.append, changed, **kwargs)
        return made, shown, states

    make.begun, make.behaviours, make.shared = begun, behaviours, shared
    return make


FOREVER = float("inf")


def test_jobs_run_in_their_order_and_share_base_steps(rows, tmp_path):
    made, _, states = rows(job("b0", "b"), job("a0", "a"), job("b1", "b"))
    made.work(FOREVER, StopSignal())
    assert rows.begun == ["b0", "a0", "b1 runs/b0"]
    assert states[-1] == ({"b0": "done", "a0": "done", "b1": "done"}, True)
    assert [last for _, last in states].count(True) == 1
    asked = [call.args for call in rows.shared.compile_ahead.mock_calls]
    # Each once, the next one's meanwhile; no base step where it is trained already.
    names = [(config[0].name, base) for config, base in asked]
    assert names == [("b0", True), ("a0", True), ("b1", False)]
    made, _, _ = rows(job("b0", "b"), job("c0", "c"))
    made.work(FOREVER, StopSignal())
    assert rows.begun[3:] == ["c0"] and not made.left()


def test_a_failed_run_is_named_and_the_others_go_on(rows):
    def refuse(stop):
        raise UserError("no cheese")

    def break_down(stop):
        raise MemoryError

    rows.behaviours.update(a0=refuse, a1=break_down)
    made, shown, _ = rows(job("a0", "a"), job("a1", "a"), job("b0", "b"))
    made.work(FOREVER, StopSignal())
    assert made.states == {"a0": "failed", "a1": "failed", "b0": "done"}
    assert "a0: failed, no cheese" in shown and "a1: failed, MemoryError" in shown
    assert made.left() == [
        "a0: failed, 0 of 3 steps finished",
        "a1: failed, 0 of 3 steps finished",
    ]
    made, _, _ = rows(job("e0", "e"))  # two equal steps, without a larger base step
    assert made.left() == ["e0: to do, 0 of 2 steps finished"]


def test_at_the_deadline_a_run_is_asked_to_save_and_none_begins(rows, monkeypatch):
    def save(stop):
        while not stop.number:
            time.sleep(0.01)
        raise StopRequested(1, 7, stop.number)

    monkeypatch.setattr(in_process, "COMPILING", 0.0)
    rows.behaviours["a0"] = save
    made, shown, states = rows(job("a0", "a"), job("b0", "b"))
    made.work(time.monotonic() + 0.3, StopSignal())
    assert rows.begun == ["a0"] and made.states == {"a0": "to do", "b0": "to do"}
    assert "a0: to do, stopped in step 1 after update 7; saved" in shown
    assert not any(last for _, last in states)  # there is no time to draw


def test_no_row_begins_that_cannot_reach_a_checkpoint(rows):
    made, _, _ = rows(job("a0", "a"), job("b0", "b"))
    made.work(time.monotonic() + in_process.COMPILING - 1, StopSignal())
    assert not rows.begun  # its programs are not compiled
    rows.behaviours["a0"] = lambda stop: setattr(made, "_has_time", own)

    def own(job, deadline):  # half a minute is enough where they are
        return has_time(job, time.monotonic() + 30)

    has_time = made._has_time
    made.work(time.monotonic() + in_process.COMPILING + 1, StopSignal())
    assert rows.begun == ["a0", "b0"]


def test_a_row_whose_programs_could_not_be_compiled_ahead_needs_longer(rows):
    made, _, _ = rows(job("a0", "a"))
    for compiled, begins in ((True, True), (False, False)):
        found: concurrent.futures.Future[bool] = concurrent.futures.Future()
        made._ahead["a0"] = found
        assert not made._has_time(job("a0", "a"), time.monotonic() + 30)
        found.set_result(compiled)
        assert made._has_time(job("a0", "a"), time.monotonic() + 30) is begins


def test_a_run_of_another_process_is_left_to_it(rows, tmp_path):
    made, shown, _ = rows(job("a0", "a"), job("b0", "b"))
    (tmp_path / "runs" / "a0").mkdir()
    with lock(in_process.epath.Path(tmp_path / "runs" / "a0")):
        made.work(FOREVER, StopSignal())
    assert made.states == {"a0": "elsewhere", "b0": "done"}
    assert "a0: runs in another process" in shown


@pytest.mark.parametrize("error", [UserError("the disk is full"), OSError("of disk")])
@pytest.mark.parametrize("part", ["networks", "files"])
def test_an_export_that_fails_does_not_stop_the_runs(rows, error, part):
    networks = mock.Mock(side_effect=error if part == "networks" else None)
    export = mock.Mock()
    export.write.side_effect = error if part == "files" else None
    made, shown, _ = rows(job("a0", "a"), export=export)
    with mock.patch.object(in_process, "keep_networks", networks):
        made.work(FOREVER, StopSignal())
    assert made.states == {"a0": "done"}
    assert f"not exported: {error}" in shown
    assert networks.call_count == export.write.call_count == 2  # each does its part


def test_folders_of_the_environment_are_those_of_where_it_began(monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TFDS_DATA_DIR", "data")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/cache")
    assert absolute_folders() == {
        "TFDS_DATA_DIR": str(tmp_path / "here" / "data"),
        "JAX_COMPILATION_CACHE_DIR": "gs://bucket/cache",
    }
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert absolute_folders().keys() == {"JAX_COMPILATION_CACHE_DIR"}


def test_what_holds_for_a_process_must_agree(tmp_path):
    jobs = [job("a0", "a"), job("b0", "b")]
    jobs[1].config["matmul_precision"] = True
    with pytest.raises(UserError, match="config.matmul_precision is False and True"):
        in_process.configure(jobs, tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--minutes=0.1"], "--minutes=0.1: expected 0 (none) or more than 0.17"),
        (["--jobs=2"], "--jobs=2: expected 1 with --in_process"),
        (["--export=gs://a/b"], "--export=gs://a/b: expected a folder of this"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--table=5", "--in_process", *flags])
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> pathlib.Path:
    return example_jobs.write_config(tmp_path_factory.mktemp("in_process"))


def test_rows_are_in_the_order_given_and_may_name_their_table(small):
    def names(*rows):
        chosen = example_jobs.chosen(
            small, ("table1", "table5"), rows=rows, columns=("cifar100-5", "5-average")
        )
        return [(c.table, c.row) for c in tables.expand(chosen)]

    assert names("5:meta", "1:il_baseline", "alpha-0.5", "1:il_baseline") == [
        ("table5", "meta"),
        ("table1", "il_baseline"),
        ("table5", "alpha-0.5"),
    ]
    with pytest.raises(UserError, match="row '5:lucir' of table1, table5"):
        names("5:lucir")


# Real runs.

ROWS = ["5:alpha-1.0", "5:meta", "1:lucir"]


def arguments(small, output, *more: str) -> list[str]:
    return [
        *("--table", "1", "5", "--rows", *ROWS),
        *("--columns", "cifar100-5", "5-average"),
        *("--file", f"cifar100={small}"),
        f"--output={output}",
        "--config.memory.per_class=4",
        "--config.evaluation.batch_size=64",
        *more,
    ]


def one_device():
    make, own = parallel.create, jax.devices()[:1]
    return mock.patch.object(parallel, "create", lambda mode, _=None: make(mode, own))


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory) -> dict[str, dict]:
    """Results of each row as a run of its own, by name."""
    folder = tmp_path_factory.mktemp("alone")
    chosen = command.choose(command.parse(arguments(small, folder)))
    jobs = {j.name: j for cell in tables.expand(chosen) for j in cell.jobs}
    found: dict[str, dict] = {}
    for name, each in jobs.items():
        file, *overrides = each.flags
        runs.here(file.partition("=")[2], folder / name, *overrides)
        found[name] = results.deterministic(results.read(folder / name))
    return found


def of_folder(folder: pathlib.Path) -> dict[str, dict]:
    return {
        run.name: results.deterministic(results.read(run))
        for run in (folder / "runs").iterdir()
    }


@pytest.mark.slow
def test_rows_in_one_process_have_the_bits_of_runs_alone(small, alone, tmp_path):
    with runs.small_network(), one_device():
        assert command.main(arguments(small, tmp_path, "--in_process")) == 0
    assert of_folder(tmp_path) == alone
    found = [results.read(run) for run in (tmp_path / "runs").iterdir()]
    assert str(tmp_path) not in json.dumps([run["config"] for run in found])
    # Two base steps were trained; the others were taken over.
    taken = [run["config"]["init_from"] for run in found]
    assert sorted(taken)[:2] == ["", ""] and len(set(taken)) == 2


class Killed(BaseException):
    pass


def one_step(flags: list[str], kill: bool) -> int | None:
    """Ends a command after the first step that it exports; None where it is killed.

    Killed, it has finished a second one, of which nothing is exported any more.
    """
    pack, stop, packed = in_process.Rows._pack, StopSignal(), 0

    def once(self):
        nonlocal packed
        packed += 1
        if packed > 1 and kill:
            raise Killed
        pack(self)
        stop.number = 0 if kill else 15

    with (
        runs.small_network(),
        one_device(),
        mock.patch.object(in_process.Rows, "_pack", once),
        mock.patch.object(command, "StopSignal", lambda: stop),
    ):
        try:
            return command.main(flags)
        except Killed:
            return None


@pytest.mark.slow
def test_killed_at_every_step_and_continued_elsewhere(small, alone, tmp_path):
    """Each process knows nothing but what the one before it has exported."""
    status, number = 3, 0
    while status != 0:
        more = [f"--export={tmp_path / f'out{number + 1}'}", "--in_process"]
        more += [f"--import={tmp_path / f'out{number}'}"] if number else []
        flags = arguments(small, tmp_path / f"{number}", *more)
        status = one_step(flags, kill=number % 2 == 0)
        assert status in (None, 3, 0) and number < 20
        number += 1
        files = {file.name for file in (tmp_path / f"out{number}").iterdir()}
        assert files <= set(archive.NAMES)
    assert number > 6  # of nine steps
    assert of_folder(tmp_path / f"{number - 1}") == alone
