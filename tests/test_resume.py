"""Killed at any moment and started again: the same bits as an undisturbed run."""

import random
import re
import signal
import subprocess
import time

import pytest

from bsce_jax.checkpoints import store
from bsce_jax.report import results as results_file
from tests import runs

PRIOR = ("--config.prior=meta", "--config.checkpoint.minutes=0")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    return runs.config_file(folder, classes=6, base=4, steps=2, epochs=4)


@pytest.fixture(scope="module")
def undisturbed(config):
    workdir = config.parent / "undisturbed"
    runs.here(config, workdir, *PRIOR)
    return workdir


def deterministic(workdir):
    return results_file.deterministic(runs.results(workdir))


def start(config, workdir, overrides=PRIOR) -> subprocess.Popen:
    return subprocess.Popen(
        runs.command(config, workdir, *overrides),
        cwd=runs.ROOT,
        env=runs.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def checkpoints(workdir) -> list[str]:
    """Names in the checkpoint folder, those being written included."""
    folder = workdir / "checkpoints"
    return [path.name for path in folder.iterdir()] if folder.exists() else []


def newest(workdir) -> int:
    return max((int(n) for n in checkpoints(workdir) if n.isdigit()), default=-1)


def start_and_wait(config, workdir, number: int, overrides=PRIOR) -> subprocess.Popen:
    """Starts the run and returns once it has saved checkpoint `number`."""
    process = start(config, workdir, overrides)
    while newest(workdir) < number:
        time.sleep(0.002)
        assert process.poll() is None, process.communicate()[1]
    return process


def kill_at_random(config, workdir, rng: random.Random) -> bool:
    """Starts the run and kills it some saves later; whether it was still running."""
    process = start(config, workdir)
    target = newest(workdir) + rng.randint(1, 4)
    while process.poll() is None and newest(workdir) < target:
        time.sleep(0.002)
    if rng.random() < 0.5:  # in the middle of a save
        while process.poll() is None and not any(
            "tmp" in name for name in checkpoints(workdir)
        ):
            time.sleep(0.001)
    else:
        time.sleep(rng.random() * 0.3)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return running


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A method with three phases."""
    folder = tmp_path_factory.mktemp("tuned")
    return runs.config_file(folder, classes=6, base=4, steps=2, method="podnet")


@pytest.mark.slow
def test_a_kill_inside_the_fine_tuning(tuned):
    """Base: updates 1 to 4. Step 1: 5 and 6, and 7 to 12 of the fine-tuning."""
    workdir, whole = tuned.parent / "killed", tuned.parent / "whole"
    overrides = ("--config.checkpoint.minutes=0",)
    process = start_and_wait(tuned, workdir, 9, overrides)
    process.kill()
    process.communicate()
    meta = store.read_meta(workdir / "checkpoints", newest(workdir))
    assert [name for name, _ in meta["histories"]] == ["incremental", "finetune"]
    assert (meta["step"], meta["finished"]) == (1, False)
    runs.here(tuned, workdir, *overrides)
    runs.here(tuned, whole, *overrides)
    assert deterministic(workdir) == deterministic(whole)


@pytest.mark.slow
def test_twenty_kills(config, undisturbed):
    """Over several runs, since one is over after a few."""
    for part in range(5):
        seed = time.time_ns()
        print(f"seed {seed}")
        rng = random.Random(seed)
        workdir = config.parent / f"twenty{part}"
        killed = sum(kill_at_random(config, workdir, rng) for _ in range(4))
        runs.here(config, workdir, *PRIOR)
        assert killed >= 3
        assert deterministic(workdir) == deterministic(undisturbed)


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(config, undisturbed):
    workdir = config.parent / "terminated"
    process = start_and_wait(config, workdir, number=3)
    process.terminate()
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert re.search(r"stopped in step \d after update \d+; saved", errors)
    number = store.numbers(workdir / "checkpoints")[-1]
    before = store.read_meta(workdir / "checkpoints", number)
    runs.here(config, workdir, *PRIOR)
    assert deterministic(workdir) == deterministic(undisturbed)
    times = runs.results(workdir)["steps"][before["step"]]["telemetry"]
    if before["finished"]:  # the signal came as the step ended
        assert times["seconds"] <= before["seconds"]
        return
    last_process = times["finished"] - times["started"]  # it began in this step
    assert before["seconds"] < times["seconds"] < before["seconds"] + last_process


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_a_line(config):
    """No file may grow beyond 2 kB: the network's arrays do not fit."""
    workdir = config.parent / "full"
    limit = ["prlimit", "--fsize=2000"]
    done = subprocess.run(
        [*limit, *runs.command(config, workdir, *PRIOR)],
        cwd=runs.ROOT,
        env=runs.environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("bsce_jax:")]
    assert re.search(r"cannot save checkpoint .*/full/checkpoints/\d+: File too", line)
    assert newest(workdir) == -1


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(
    config, undisturbed
):
    workdir = config.parent / "damaged"
    process = start_and_wait(config, workdir, number=6)
    process.kill()
    process.communicate()
    number = newest(workdir)
    for file in (workdir / "checkpoints" / str(number)).rglob("*"):
        if file.is_file() and file.stat().st_size:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 4
            file.write_bytes(bytes(data))
    done = runs.run(config, workdir, *PRIOR)
    assert f"{number} is damaged" in done.stderr.replace("checkpoint ", "")
    assert deterministic(workdir) == deterministic(undisturbed)
