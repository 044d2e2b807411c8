"""Progress display, TensorBoard events, versions and compile counts."""

import contextlib
import io
import logging
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from tensorboardX.crc32c import crc32c
from tensorboardX.proto import event_pb2

from bsce_jax import terminal
from bsce_jax.errors import UserError
from bsce_jax.run import monitor as run_monitor
from bsce_jax.run.loop import History
from bsce_jax.telemetry import bar, compiles, environment
from bsce_jax.telemetry.events import Timeline

# environment


def test_environment() -> None:
    found = environment.environment()
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"]["numpy"] == np.__version__
    assert sys.version.startswith(found["versions"]["python"])
    assert set(found["versions"]) == {
        *("bsce_jax", "jax", "jaxlib", "flax", "optax", "orbax", "numpy", "python")
    }
    assert found["platform"] == "cpu"
    assert (found["devices"], found["processes"]) == (8, 1)
    assert 1 <= found["cpus"] <= (os.cpu_count() or 1)


def test_commit(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("git") is None:
        pytest.skip("no git")
    tracked, untracked = tmp_path / "tracked.py", tmp_path / "untracked.py"
    assert environment.commit(tracked) is None  # no checkout
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(
            ["git", *identity, *arguments],
            cwd=tmp_path,
            capture_output=True,
            check=True,
            text=True,
        ).stdout.strip()

    git("init", "--quiet")
    tracked.write_text("1")
    git("add", "tracked.py")
    git("commit", "--quiet", "--message", "first")
    git("tag", "v1")  # does not hide the hash
    untracked.write_text("1")
    head = git("rev-parse", "HEAD")
    assert environment.commit(tracked) == head
    assert environment.commit(untracked) is None  # installed inside someone's checkout
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as in a git hook
    assert environment.commit(tracked) == head
    tracked.write_text("2")
    assert environment.commit(tracked) == f"{head}-dirty"
    monkeypatch.setenv("PATH", "")
    assert environment.commit(tracked) is None  # no git


def test_the_environment_names_the_commit_of_a_tree_without_git(monkeypatch) -> None:
    monkeypatch.setattr(environment, "commit", lambda file: None)
    assert environment.environment()["commit"] is None
    for told in ("0123abc", f"{'0123456789' * 4}-dirty"):
        monkeypatch.setenv("BSCE_JAX_COMMIT", told)
        assert environment.environment()["commit"] == told
    monkeypatch.setenv("BSCE_JAX_COMMIT", "main")
    with pytest.raises(UserError, match="BSCE_JAX_COMMIT='main': expected a commit"):
        environment.environment()
    monkeypatch.setattr(environment, "commit", lambda file: "git's")
    assert environment.environment()["commit"] == "git's"  # which knows better


# compiles


def test_compiles_are_counted_by_function_name() -> None:
    def doubled_sine(x: jax.Array) -> jax.Array:
        return 2 * jnp.sin(x)

    def outer_cosine(x: jax.Array) -> jax.Array:
        return jnp.cos(jitted(x))

    jitted = jax.jit(doubled_sine)
    counts = compiles.compile_counter()
    jitted(np.ones(3, np.float32))
    assert counts["doubled_sine"] == 1
    jitted(np.zeros(3, np.float32))
    assert counts["doubled_sine"] == 1
    later = compiles.compile_counter()
    jitted(np.ones(5, np.float32))
    assert counts["doubled_sine"] == 2
    assert later == {"doubled_sine": 1}
    jax.jit(outer_cosine)(np.ones(3, np.float32))
    assert later == {"doubled_sine": 1, "outer_cosine": 1}  # inner: the same program


def test_a_dropped_counter_costs_nothing() -> None:
    counts = compiles.compile_counter()
    del counts

    @jax.jit
    def after_the_drop(x: jax.Array) -> jax.Array:
        return x + 1

    after_the_drop(np.ones(3, np.float32))  # its listener is still registered


CACHED = """
import sys
import jax, numpy as np
from bsce_jax.telemetry import compiles
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
hits = []
jax.monitoring.register_event_listener(
    lambda event, **kwargs: hits.append(event) if event.endswith("cache_hits") else None
)
counts = compiles.compile_counter()
for _ in range(2):
    jax.jit(lambda x: 3 * x)(np.ones(3, np.float32))
    print(len(hits), dict(counts))
    jax.clear_caches()  # as in the next process
"""


def test_a_hit_in_the_persistent_cache_counts(tmp_path: pathlib.Path) -> None:
    root = pathlib.Path(environment.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", CACHED, str(tmp_path)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
        capture_output=True,
        check=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "0 {'<lambda>': 1}\n1 {'<lambda>': 2}\n"


# TensorBoard


def masked_crc(data: bytes) -> int:
    crc = crc32c(data) & 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_events(path: pathlib.Path) -> list[Any]:
    """Events of a file, up to a record that a killed process left torn."""
    data, events = path.read_bytes(), []
    while len(data) >= 12:
        (length,) = struct.unpack("<Q", data[:8])
        body, data = data[: 16 + length], data[16 + length :]
        if len(body) < 16 + length:
            break
        assert struct.unpack("<I", body[8:12])[0] == masked_crc(body[:8])
        assert struct.unpack("<I", body[-4:])[0] == masked_crc(body[12:-4])
        events.append(event_pb2.Event.FromString(body[12:-4]))
    return events


def points(folder: pathlib.Path) -> list[tuple[int, str, float]]:
    """What TensorBoard shows: a restart drops earlier points at or after its step."""
    shown: list[tuple[int, str, float]] = []
    for path in sorted(folder.iterdir()):
        assert "tfevents" in path.name
        events = read_events(path)
        assert events[0].file_version == "brain.Event:2"
        for event in events:
            if event.session_log.status == event_pb2.SessionLog.START:
                shown = [point for point in shown if point[0] < event.step]
            for value in event.summary.value:
                shown.append((event.step, value.tag, value.simple_value))
    return shown


def test_events_can_be_read_back(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "made" / "events"
    with contextlib.closing(Timeline(folder)) as timeline:
        timeline.scalars(10, {"loss": 0.5, "images/s": 1000})
        timeline.scalars(20, {"loss": np.float32(0.25), "alpha": jnp.float32(2)})
    timeline.scalars(30, {"loss": 1.0})  # closed: dropped
    assert points(folder) == [
        (10, "loss", 0.5),
        (10, "images/s", 1000.0),
        (20, "loss", 0.25),
        (20, "alpha", 2.0),
    ]
    assert all(event.wall_time > 1e9 for event in read_events(next(folder.iterdir())))


def test_a_resumed_run_shows_no_point_twice(tmp_path: pathlib.Path) -> None:
    killed = Timeline(tmp_path)
    for update in (10, 20, 30, 40):
        killed.scalars(update, {"loss": 1.0})
    killed.close()  # rather: killed, in the middle of a record
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    with contextlib.closing(Timeline(tmp_path, update=25)) as resumed:
        for update in (30, 40, 50):
            resumed.scalars(update, {"loss": 2.0})
    assert points(tmp_path) == [
        (10, "loss", 1.0),
        (20, "loss", 1.0),
        (30, "loss", 2.0),
        (40, "loss", 2.0),
        (50, "loss", 2.0),
    ]


def test_flushed_events_survive_a_kill(tmp_path: pathlib.Path) -> None:
    timeline = Timeline(tmp_path)
    timeline.scalars(1, {"loss": 1.0})
    timeline.flush()
    assert points(tmp_path) == [(1, "loss", 1.0)]  # with the file still open
    timeline.close()


def test_other_processes_write_no_events(tmp_path: pathlib.Path) -> None:
    with contextlib.closing(Timeline(tmp_path / "events", enabled=False)) as timeline:
        timeline.scalars(1, {"loss": 1.0})
        timeline.flush()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_ends_the_events_not_the_run(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    timeline = Timeline(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    for update in range(3):
        timeline.scalars(update, {"loss": 1.0})
        timeline.flush()
    timeline.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left" in caplog.text


def test_an_unwritable_folder_means_no_events_and_no_error(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with contextlib.closing(Timeline(tmp_path / "file" / "events")) as timeline:
        timeline.scalars(1, {"loss": 1.0})
        timeline.flush()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no TensorBoard events: [Errno 20] Not a directory" in caplog.text


# progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_elsewhere_progress_is_a_log_line_now_and_then(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, logger="bsce_jax")
    clock, stream = Clock(), io.StringIO()
    with contextlib.closing(
        bar.Bar(1000, done=100, seconds=10.0, stream=stream, clock=clock)
    ) as progress:
        for update in range(300):
            clock.seconds += 0.125
            progress.advance(1, images=64, loss=1.0 / (update + 1), where="step 1/2")
        progress.note("step 1: top-1 61.20")
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "step 1/2, 180/1000 updates, 512 images/s, loss 0.0125, 1:42 left",
        "step 1/2, 260/1000 updates, 512 images/s, loss 0.00625, 1:32 left",
        "step 1/2, 340/1000 updates, 512 images/s, loss 0.004167, 1:22 left",
        "step 1: top-1 61.20",
        "step 1/2, 400/1000 updates, 512 images/s, loss 0.003333, 1:15 left",
    ]
    assert stream.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_the_pace_is_that_of_the_last_minute(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="bsce_jax")
    clock = Clock()
    with contextlib.closing(bar.Bar(10**6, seconds=5.0, clock=clock)) as shown:
        for speed in (100, 1000):
            for _ in range(120):
                clock.seconds += 1.0
                shown.advance(1, images=speed)
    lines = [record.getMessage() for record in caplog.records]
    assert "5/1000000 updates, 100 images/s" in lines[0]
    assert "240/1000000 updates, 1000 images/s" in lines[-1]


def test_progress_on_a_terminal_is_a_bar() -> None:
    clock, stream = Clock(), Terminal()
    with contextlib.closing(
        bar.Bar(100, done=40, stream=stream, clock=clock)
    ) as progress:
        for _ in range(10):
            clock.seconds += 1.0
            progress.advance(1, images=32, loss=0.5, where="step 2/2, epoch 1/3")
        progress.note("step 2: top-1 48.00")
    shown = stream.getvalue()
    assert "step 2/2, epoch 1/3  50%|" in shown
    assert "50/100 updates, loss 0.5, 0:50 left" in shown  # 80 columns
    assert "\rstep 2: top-1 48.00\n" in shown or "\nstep 2: top-1 48.00\n" in shown
    assert shown.endswith("\n")


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        (20, "0:50 left"),
        (40, "0:50 left"),
        (60, "0:50 left"),
        (80, "50/100 updates, loss 0.5, 0:50 left"),
        (120, "50/100 updates, 32 images/s, loss 0.5, 0:50 left"),
    ],
)
def test_a_bar_has_a_line_of_any_width(
    monkeypatch: pytest.MonkeyPatch, columns: int, parts: str
) -> None:
    """What matters less gives way to the bar; nothing wraps."""
    monkeypatch.setattr(terminal, "columns", lambda stream: columns)
    monkeypatch.setenv("COLUMNS", str(columns))
    clock, stream = Clock(), Terminal()
    shown = bar.Bar(100, done=40, stream=stream, clock=clock)
    with contextlib.closing(shown) as progress:
        progress._tqdm.dynamic_ncols = None
        progress._tqdm.ncols = columns
        for _ in range(10):
            clock.seconds += 1.0
            progress.advance(1, images=32, loss=0.5, where="step 2/2, epoch 1/3")
    lines = re.split("[\r\n]+", stream.getvalue())
    assert lines[-2].endswith(parts), lines
    assert max(map(len, lines)) <= columns


def test_a_dumb_terminal_has_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="bsce_jax")
    monkeypatch.setenv("TERM", "dumb")
    clock, stream = Clock(), Terminal()
    with contextlib.closing(bar.Bar(10, stream=stream, clock=clock)) as progress:
        for _ in range(125):
            clock.seconds += 1.0
            progress.advance(0, images=1)
    assert stream.getvalue() == ""
    assert len(caplog.records) == 3  # one a minute, and the last


def test_a_bar_does_not_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="bsce_jax")
    clock = Clock()
    with contextlib.closing(bar.Bar(10, stream=Terminal(), clock=clock)) as progress:
        clock.seconds += 100.0
        progress.advance(1, images=1)
        progress.note("note")
    assert not caplog.records


def test_the_newest_loss_stays(caplog: pytest.LogCaptureFixture) -> None:
    """An epoch has one when it ends: most calls have none."""
    caplog.set_level(logging.INFO, logger="bsce_jax")
    clock = Clock()
    with contextlib.closing(bar.Bar(10, seconds=1.0, clock=clock)) as shown:
        for loss in (None, 3.0, 2.0, None):
            clock.seconds += 1.0
            shown.advance(1, images=1, loss=loss)
    lines = [record.getMessage() for record in caplog.records]
    assert "loss" not in lines[0] and "loss 3," in lines[1]
    assert all("loss 2," in line for line in lines[2:]) and len(lines) == 5


def test_other_processes_show_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="bsce_jax")
    clock, stream = Clock(), Terminal()
    silent = bar.Bar(10, stream=stream, clock=clock, enabled=False)
    with contextlib.closing(silent) as progress:
        clock.seconds += 100.0
        progress.advance(1, images=100, loss=1.0)
        progress.note("note")
    assert stream.getvalue() == "" and not caplog.records


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3723, "1:02:03")],
)
def test_durations(seconds: float, text: str) -> None:
    assert bar._duration(seconds) == text


def test_a_pass_that_takes_long_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="bsce_jax")
    batches = iter("abc")
    passing = bar.passing(batches, 25, 10, "features", interval=0.0)
    assert list(passing) == list("abc")
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["features: 10/25 images", "features: 20/25 images"]
    caplog.clear()
    assert list(bar.passing("abc", 25, 10, "features")) == list("abc")  # short
    silent = bar.passing("abc", 25, 10, "features", interval=0.0, enabled=False)
    assert list(silent) == list("abc")
    assert not caplog.records


def test_a_pass_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    for number, _ in enumerate(bar.passing("abc", 25, 10, "features", 0.01)):
        time.sleep(0.15)
        assert ("features" in stream.getvalue()) == (number > 0)
    assert "80%" in stream.getvalue()


def test_what_lies_between_phases_is_not_training(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exemplars are chosen and programs compiled there."""
    now = [0.0]
    monkeypatch.setattr(run_monitor.time, "time", lambda: now[0])
    phase = types.SimpleNamespace(name="p", first_epoch=0, epochs=1)
    data = types.SimpleNamespace(step=0, phase=phase)
    training = types.SimpleNamespace(
        data=data, updates_per_epoch=100, learning_rates=(0.1,)
    )
    monitor = run_monitor.Monitor(epath.Path(tmp_path), 1, 100, 60.0)
    monitor.start(0)
    monitor.begin_step()
    history, calls = History(), 0
    for seconds in (2, 1, 1, None, 50, 1, 1):  # the first call of a phase compiles
        if seconds is None:
            monitor.begin_phase()
            continue
        now[0] += seconds
        calls += 1
        history.updates = calls
        monitor.trained(training, history, 0, 30)
    assert monitor.step_telemetry()["images_per_second"] == 30.0
    monitor.close()
