"""What is known of a running experiment: TensorBoard events, versions, compiles.

Nothing here changes a result. On several hosts only the first process writes anything;
the others call the same functions to no effect.
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
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Self

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


def environment() -> dict[str, Any]:
    """Versions, devices and source of this process, for the results.

    Returns:
      versions: see `versions`;
      platform, device and devices: backend, kind and number, over all processes;
      processes; cpus: those this process may use; commit: see `commit`;
      xla_flags: the environment variable's.
    """
    allowed = getattr(os, "sched_getaffinity", None)  # absent on macOS
    return {
        "versions": versions(),
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpus": len(allowed(0)) if allowed else os.cpu_count(),
        "commit": commit(pathlib.Path(__file__)),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def versions() -> dict[str, str | None]:
    """Versions of python and of each package, None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, distribution in _PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


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
        if not first_process(enabled):
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


def first_process(enabled: bool | None) -> bool:
    """`enabled` where it is given, or whether this is the first process."""
    return jax.process_index() == 0 if enabled is None else enabled
