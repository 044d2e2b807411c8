"""What a running experiment shows: progress, TensorBoard events, versions, compiles.

Nothing here changes a result. On several hosts only the first process shows and writes
anything; the others call the same functions to no effect.
"""

import contextlib
import importlib.metadata
import io
import logging
import os
import pathlib
import platform
import re
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, TextIO

import jax
from etils import epath

logger = logging.getLogger("bsce_jax")

# JAX records this event for each executable it makes for a jitted function, after
# tracing and lowering: also when the persistent compilation cache supplies it, but not
# when the function's own cache does, nor for a jitted function inside another one.
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

_PACKAGES = {
    "bsce_jax": "bsce_jax",
    "jax": "jax",
    "jaxlib": "jaxlib",
    "flax": "flax",
    "optax": "optax",
    "orbax": "orbax-checkpoint",
    "numpy": "numpy",
}
_WINDOW_SECONDS = 60.0  # rates are means over this long


def environment() -> dict[str, Any]:
    """Versions, devices and source of this process, for the results.

    Returns:
      versions: of each package (None where it is not installed) and of python;
      platform, device and devices: backend, kind and number, over all processes;
      processes; cpus: those this process may use; commit: see `commit`.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name, distribution in _PACKAGES.items():
        try:
            versions[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    allowed = getattr(os, "sched_getaffinity", None)  # absent on macOS
    return {
        "versions": versions,
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpus": len(allowed(0)) if allowed else os.cpu_count(),
        "commit": commit(pathlib.Path(__file__)),
    }


def commit(file: pathlib.Path) -> str | None:
    """Commit of the git checkout that tracks a file, "-dirty" after it if changed.

    None where there is no git, or the file is only installed inside someone's checkout.
    """
    # Inside a git hook these variables point at another repository.
    env = {key: value for key, value in os.environ.items() if key[:4] != "GIT_"}

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=file.parent,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=10,
            check=True,
            encoding="utf-8",
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


class CompileCounts(Counter[str]):
    """Number of compiles by function name; a live one keeps counting."""


def compile_counter() -> CompileCounts:
    """Counts from now on the programs made in this process, by function name.

    A program read from the persistent compilation cache counts: it was traced again.
    Eager operations count under their own names, and all functions under `jax.pmap`,
    which JAX does not tell apart, as "_fun".

    Returns:
      name -> count, live, for as long as it is referenced.
    """
    counts = CompileCounts()
    target = weakref.ref(counts)
    lock = threading.Lock()

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        counts = target()
        if event != COMPILE_EVENT or counts is None:
            return
        name = str(kwargs.get("fun_name", "unknown"))
        wrapped = re.fullmatch(r"\w+\((.*)\)", name)  # "jit(train_step)"
        with lock:
            counts[wrapped[1] if wrapped else name] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    return counts


class Timeline:
    """TensorBoard events of a run, written without TensorFlow.

    Written through at each flush: tensorboardX's own SummaryWriter keeps points in a
    queue that its flush does not empty, so that a killed run would lose some for good.
    A full or unwritable disk ends the events with a warning, not the run.
    """

    def __init__(
        self, folder: epath.PathLike, update: int = 0, enabled: bool | None = None
    ) -> None:
        """Opens a new event file.

        Args:
          folder: of the event files; made if it does not exist.
          update: the first update that this process writes. TensorBoard drops what a
            killed process wrote from there on, so that no point is double.
          enabled: whether to write at all; None = in the first process only.
        """
        self._writer: Any = None
        if not _first_process(enabled):
            return
        # Loaded here: it looks for PyTorch and cloud libraries, which takes seconds.
        from tensorboardX import record_writer
        from tensorboardX.proto import event_pb2

        self._event = event_pb2.Event
        folder = epath.Path(folder)
        # TensorBoard reads the files of a folder in the order of their names.
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}"
        # tensorboardX's own way to gs:// needs another library and its credentials.
        record_writer.register_writer_factory("store", _StoreFile)
        prefix = "store:" if "://" in os.fspath(folder) else ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = record_writer.RecordWriter(prefix + os.fspath(folder / name))
        except OSError as error:
            logger.warning("no TensorBoard events: %s", error)
        self._write(file_version="brain.Event:2")
        self._write(step=update, session_log={"status": "START"})
        self.flush()

    def scalars(self, update: int, values: Mapping[str, float]) -> None:
        """Adds values by name at an update, counted over the whole run."""
        points = [
            {"tag": name, "simple_value": float(value)}
            for name, value in values.items()
        ]
        self._write(step=update, summary={"value": points})

    def flush(self) -> None:
        """Puts all points on the disk."""
        self._try(lambda writer: writer.flush())

    def close(self) -> None:
        """Flushes and closes the file; later points are dropped."""
        self.flush()
        self._try(lambda writer: writer.close())
        self._writer = None

    def _write(self, **fields: Any) -> None:
        if self._writer is not None:
            event = self._event(wall_time=time.time(), **fields).SerializeToString()
            self._try(lambda writer: writer.write(event))

    def _try(self, action: Callable[[Any], None]) -> None:
        if self._writer is None:
            return
        try:
            action(self._writer)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None
            logger.warning("no more TensorBoard events: %s", error)

    def __enter__(self) -> Self:
        """The timeline itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the file."""
        self.close()


class _StoreFile:
    """A file on an object store, which takes whole files only: at each flush."""

    def __init__(self, path: epath.Path) -> None:
        self._path, self._content = path, io.BytesIO()

    def write(self, data: bytes) -> None:
        self._content.write(data)

    def flush(self) -> None:
        try:
            self._path.write_bytes(self._content.getvalue())
        except Exception as error:  # each store has its own
            raise OSError(" ".join(f"{self._path}: {error}".split())) from error

    close = flush

    @classmethod
    def open(cls, path: str) -> Self:
        """What tensorboardX calls for "store:PATH"."""
        return cls(epath.Path(path.partition(":")[2]))


class Progress:
    """Progress of a whole run: a bar on a terminal, now and then a log line elsewhere.

    Shows updates done of all updates of all steps, images/s and the time left at the
    pace of the last minute, and the newest loss that is ready: it never waits for a
    device.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        *,
        seconds: float = 10.0,
        stream: TextIO | None = None,
        enabled: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the display.

        Args:
          total: updates of the run, all steps together.
          done: updates already done by an earlier process.
          seconds: least time between two log lines.
          stream: where the bar goes if it is a terminal; None = standard error.
          enabled: whether to show anything; None = in the first process only.
          clock: time in seconds.
        """
        stream = sys.stderr if stream is None else stream
        self._total, self._done, self._images = total, done, 0
        self._seconds, self._clock = seconds, clock
        self._enabled = _first_process(enabled)
        self._where = ""
        self._loss: float | None = None
        self._pending: deque[Any] = deque(maxlen=64)
        self._shown = clock()
        self._marks = deque([(self._shown, done, 0)])
        self._bar: Any = None
        if self._enabled and stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=done,
                file=stream,
                dynamic_ncols=True,
                bar_format="{desc}{percentage:3.0f}%|{bar}|{postfix}",
            )

    def advance(
        self, updates: int, images: int, loss: Any = None, where: str = ""
    ) -> None:
        """Counts finished (or dispatched) updates.

        Args:
          updates: since the last call.
          images: training images in them, of all hosts.
          loss: a number or a scalar array, of any of them.
          where: position in the run, "step 2/5, epoch 14/60"; "" = as before.
        """
        self._done += updates
        self._images += images
        self._where = where or self._where
        if not self._enabled:
            return
        if loss is not None:
            self._pending.append(loss)
        now = self._clock()
        interval = 0.2 if self._bar is not None else self._seconds
        if now - self._shown >= interval:
            self._show(now)

    def note(self, message: str) -> None:
        """Shows a line that stays: above the bar, or in the log."""
        if self._bar is not None:
            self._bar.write(message, file=self._bar.fp)
        elif self._enabled:
            logger.info("%s", message)

    @property
    def images_per_second(self) -> float:
        """Pace of the last minute; 0 before the first update."""
        return self._rates(self._clock())[1]

    def close(self) -> None:
        """Shows the last state and ends the bar."""
        if not self._enabled:
            return
        self._show(self._clock())
        if self._bar is not None:
            self._bar.close()
        self._enabled, self._bar = False, None

    def _show(self, now: float) -> None:
        self._shown = now
        while self._pending and _is_ready(self._pending[0]):
            self._loss = float(self._pending.popleft())
        updates_per_second, images_per_second = self._rates(now)
        self._marks.append((now, self._done, self._images))
        while now - self._marks[1][0] > _WINDOW_SECONDS:
            self._marks.popleft()
        parts = [f"{self._done}/{self._total} updates"]
        parts.append(f"{images_per_second:.0f} images/s")
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4g}")
        if updates_per_second:
            left = (self._total - self._done) / updates_per_second
            parts.append(f"{_duration(left)} left")
        if self._bar is None:
            logger.info(
                "%s", ", ".join([self._where, *parts] if self._where else parts)
            )
            return
        self._bar.n = self._done
        self._bar.set_description_str(self._where and f"{self._where} ", refresh=False)
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.refresh()

    def _rates(self, now: float) -> tuple[float, float]:
        """Updates and images a second since the oldest mark of the last minute."""
        start, done, images = self._marks[0]
        elapsed = now - start
        if elapsed <= 0:
            return 0.0, 0.0
        return (self._done - done) / elapsed, (self._images - images) / elapsed

    def __enter__(self) -> Self:
        """The display itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the display."""
        self.close()


def _first_process(enabled: bool | None) -> bool:
    return jax.process_index() == 0 if enabled is None else enabled


def _is_ready(value: Any) -> bool:
    check = getattr(value, "is_ready", None)  # arrays have it, plain numbers do not
    return check is None or check()


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
