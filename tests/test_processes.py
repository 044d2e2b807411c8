"""Runs of two real processes: the same results, and what happens when one fails."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from bsce_jax.checkpoints import store
from bsce_jax.hosts import peers
from tests import process_worker, runs
from tests.test_resume import newest

EVERY_UPDATE = "--config.checkpoint.minutes=0"


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextlib.contextmanager
def started(commands, devices: int) -> Iterator[list[subprocess.Popen]]:
    """Processes that are ended at the latest when the test is."""
    processes = [
        subprocess.Popen(
            command,
            cwd=runs.ROOT,
            env=runs.environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for command in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


PATCHED = """
import sys
from bsce_jax import main, terminal
from bsce_jax.run import programs
from tests import small
programs.build_model = small.build_model
{patch}
terminal.log_to_stderr()
sys.exit(main.main(sys.argv))
"""


def together(config, workdir, *overrides, devices=1, patch="", second=()):
    """Two processes of one run; each first executes the lines of `patch`.

    `second` are overrides of the second process alone.
    """
    address = free_address()
    commands = [
        runs.command(
            config,
            workdir,
            f"--coordinator_address={address}",
            "--num_processes=2",
            f"--process_id={process}",
            *overrides,
            *(second if process else ()),
        )
        for process in range(2)
    ]
    if patch:
        program = ["-c", PATCHED.format(patch=patch)]
        commands = [[command[0], *program, *command[3:]] for command in commands]
    return started(commands, devices)


def wait_for(workdir, number: int, processes) -> None:
    """Returns once checkpoint `number` is there."""
    while newest(workdir) < number:
        time.sleep(0.01)
        for process in processes:
            assert process.poll() is None, process.communicate()[1]


@pytest.mark.slow
@pytest.mark.parametrize("cases", ["few", "all"])
def test_two_processes_compute_what_one_device_does(tmp_path, cases):
    """Three updates in float64; a whole set; `all`: every loss, with Meta and not."""
    address = free_address()
    commands = [
        [sys.executable, "-m", "tests.process_worker"]
        + [address, str(i), str(tmp_path), cases]
        for i in range(2)
    ]
    with started(commands, 4) as processes:
        expected = process_worker.everything(jax.devices()[:1], cases)
        for process in processes:
            _, errors = process.communicate(timeout=400)
            assert process.returncode == 0, errors
    first, second = (np.load(tmp_path / f"{i}.npz") for i in range(2))
    assert first["largest"].tolist() == second["largest"].tolist() == [1, 7]
    assert first["local rows"].tolist() == list(range(8))
    assert second["local rows"].tolist() == list(range(8, 16))
    assert len(expected) > {"few": 20, "all": 60}[cases]
    for name, value in expected.items():
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
        if value.dtype.kind == "f":
            exact = 1e-9 if value.dtype == np.float64 else 1e-5
            np.testing.assert_allclose(
                first[name], value, rtol=exact, atol=exact, err_msg=name
            )
        else:
            np.testing.assert_array_equal(first[name], value, err_msg=name)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baseline")
    return runs.config_file(folder, classes=6, base=4, steps=2, epochs=3)


@pytest.fixture(scope="module")
def undisturbed(baseline):
    """One process, one device."""
    workdir = baseline.parent / "undisturbed"
    runs.here(baseline, workdir, EVERY_UPDATE)
    return workdir


def same_run(workdir, other, hashes: bool = True) -> None:
    """The same scenario and exemplars; losses, alpha and accuracies up to rounding."""
    ours, theirs = runs.results(workdir), runs.results(other)
    names = ("config_hash", "base_hash") if hashes else ()
    for name in ("class_order", "status", *names):
        assert ours[name] == theirs[name]
    for a, b in zip(ours["steps"], theirs["steps"], strict=True):
        for name, value in b["result"].items():
            if name == "alpha":
                np.testing.assert_allclose(a["result"][name], value, rtol=1e-3)
            elif name == "phases":
                assert a["result"][name].keys() == value.keys()
                for phase, found in value.items():
                    ours_of = a["result"][name][phase]
                    np.testing.assert_allclose(
                        ours_of["loss"], found["loss"], rtol=1e-3
                    )
                    assert ours_of["accuracy"] == pytest.approx(found["accuracy"])
            elif name not in ("parameters_sha256", "confusion"):
                assert a["result"][name] == pytest.approx(value), name
    rankings = [ranking(folder) for folder in (workdir, other)]
    np.testing.assert_array_equal(*rankings)
    assert (rankings[0] >= 0).all()


def ranking(workdir) -> np.ndarray:
    folder = workdir / "checkpoints"
    shape = jax.ShapeDtypeStruct((6, 3), np.int32)
    last = newest(workdir)
    return store.restore(folder, last, {"ranking": shape}, partial=True).arrays[
        "ranking"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "devices", "mode"),
    [("lucir", 4, "pmap"), ("podnet", 4, "jit"), ("podnet", 4, "pmap")],
)
def test_a_run_of_two_processes_is_that_of_one_device(tmp_path, method, devices, mode):
    """All phases: new head rows, exemplars, fine-tuning, evaluation."""
    config = runs.config_file(tmp_path, classes=6, base=4, steps=2, method=method)
    overrides = ("--config.phase.finetune.epochs=2", EVERY_UPDATE)
    parallel = f"--config.parallel={mode}"
    workdir = tmp_path / "two"
    with together(config, workdir, *overrides, parallel, devices=devices) as processes:
        printed = []
        for process in processes:
            printed.append(process.communicate(timeout=400))
            assert process.returncode == 0, printed[-1][1]
    (table, log), (other_table, other_log) = printed
    assert "average incremental accuracy" in table and "step 2/2" in log
    assert "average" not in other_table and "step" not in other_log  # the first alone
    runs.here(config, tmp_path / "one", *overrides, parallel)
    same_run(workdir, tmp_path / "one")
    assert runs.results(workdir)["steps"][0]["telemetry"]["processes"] == 2


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_the_run_goes_on(baseline, undisturbed):
    """Killed while training: a clear line at once, then two devices."""
    workdir = baseline.parent / "killed"
    with together(baseline, workdir, EVERY_UPDATE) as processes:
        wait_for(workdir, 3, processes)
        processes[1].kill()
        killed = time.monotonic()
        _, errors = processes[0].communicate(timeout=120)
        assert time.monotonic() - killed < 60
    assert processes[0].returncode == peers.LOST, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("bsce_jax:")]
    assert line.startswith("bsce_jax: process 0 ends: process 1 is gone")
    assert line.endswith("continues from the last checkpoint")
    assert not (workdir / "results.json").exists() or newest(workdir) < 15
    runs.here(baseline, workdir, EVERY_UPDATE, devices=2)
    same_run(workdir, undisturbed)


@pytest.mark.slow
def test_the_death_of_the_first_process_is_noticed_at_once(baseline):
    workdir = baseline.parent / "first"
    with together(baseline, workdir, EVERY_UPDATE) as processes:
        wait_for(workdir, 2, processes)
        processes[0].kill()
        killed = time.monotonic()
        _, errors = processes[1].communicate(timeout=120)
        assert time.monotonic() - killed < 60
    assert processes[1].returncode != 0
    assert "bsce_jax: process 1 ends: process 0 is gone" in errors


@pytest.mark.slow
def test_sigterm_at_different_moments_stops_all_at_one_update(baseline, undisturbed):
    workdir = baseline.parent / "terminated"
    with together(baseline, workdir, EVERY_UPDATE) as processes:
        wait_for(workdir, 7, processes)  # in the second step, compiled
        processes[1].send_signal(signal.SIGTERM)
        sent = time.monotonic()
        time.sleep(0.4)  # all may have saved by then: it must not matter
        processes[0].send_signal(signal.SIGTERM)
        printed = [process.communicate(timeout=60)[1] for process in processes]
        assert time.monotonic() - sent < 30
    assert [process.returncode for process in processes] == [143, 143], printed
    (where,) = re.findall(r"stopped in step (\d) after update (\d+); saved", printed[0])
    step, update = map(int, where)
    meta = store.read_meta(workdir / "checkpoints", newest(workdir))
    ((_, history),) = meta["histories"]
    assert (meta["step"], history["updates"]) == (step, update)
    with together(baseline, workdir, EVERY_UPDATE) as processes:
        for process in processes:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors
    same_run(workdir, undisturbed)


def test_an_error_of_one_process_is_told_to_the_others(baseline):
    """The second one finds no data."""
    workdir = baseline.parent / "elsewhere"
    nowhere = ["--config.data.data_dir=/nowhere"]
    with together(baseline, workdir, second=nowhere) as processes:
        errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    assert "data set 'blobs' is not on this machine" in errors[1]
    assert (
        "process 0 ends: process 1 failed: config.data.name='blobs': data set"
        in errors[0]
    )
    assert not any("same command" in error for error in errors)


@pytest.mark.slow
def test_an_error_of_all_processes_at_once_has_one_status(baseline):
    workdir = baseline.parent / "not finite"
    rates = ("learning_rate=1e4", "rate.head=1e6")
    overrides = (*(f"--config.phase.base.{rate}" for rate in rates), EVERY_UPDATE)
    with together(
        baseline, workdir, "--config.deterministic=true", *overrides
    ) as processes:
        errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    for error in errors:
        (line,) = [line for line in error.splitlines() if line.startswith("bsce_jax:")]
        assert re.match(
            "bsce_jax: the loss is (nan|inf) in step 0, phase base at ", line
        )
        assert "last good: " in line


SLOW_SAVE = """
import pathlib, time
from bsce_jax.checkpoints import store

def slow(directory, number, *arguments, save=store.save, **options):
    pathlib.Path(directory, "..", "saving").resolve().write_text(str(number))
    time.sleep(4.0)
    save(directory, number, *arguments, **options)

store.save = slow
"""


@pytest.mark.slow
def test_a_checkpoint_being_written_is_completed_when_another_process_dies(baseline):
    workdir = baseline.parent / "slow"
    saving = workdir / "saving"
    with together(baseline, workdir, EVERY_UPDATE, patch=SLOW_SAVE) as processes:
        while not saving.exists():
            time.sleep(0.01)
            assert processes[0].poll() is None, processes[0].communicate()[1]
        processes[1].kill()
        _, errors = processes[0].communicate(timeout=60)
    assert processes[0].returncode == peers.LOST, errors
    assert "process 0 ends: process 1 is gone" in errors
    assert newest(workdir) == int(saving.read_text())
    assert ranking(workdir).shape == (6, 3)  # whole


INTERRUPTED = """
import os, signal
from bsce_jax import experiment

# Where the tests run in the background it is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

def save(*arguments, original=experiment.save, **options):
    original(*arguments, **options)
    if "--process_id=1" in sys.argv:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

experiment.save = save
"""


@pytest.mark.slow
def test_a_second_interrupt_of_one_process_ends_the_others(baseline):
    workdir = baseline.parent / "interrupted"
    with together(baseline, workdir, EVERY_UPDATE, patch=INTERRUPTED) as processes:
        errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [peers.LOST, 130], errors
    assert errors[1].endswith("bsce_jax: interrupted\n")
    assert "process 0 ends: process 1 failed: interrupted. The same" in errors[0]


def test_processes_of_different_configurations_do_not_train_together(baseline):
    workdir = baseline.parent / "different"
    with together(baseline, workdir, second=["--config.seed=1"]) as processes:
        errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    for text in errors:
        assert "bsce_jax: process 1 has another configuration than process 0" in text
