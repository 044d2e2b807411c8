"""Prepares the process for a run: JAX's settings, the workdir, signals."""

import contextlib
import fcntl
import logging
import os
import signal
import socket
import threading
import time
import types
import warnings
from collections.abc import Iterator

import jax
from etils import epath
from jax._src import xla_bridge
from ml_collections import ConfigDict

from bsce_jax.config import config_hash
from bsce_jax.errors import UserError

logger = logging.getLogger("bsce_jax")
_LOCK = ".lock"


DETERMINISTIC_FLAGS = ("--xla_gpu_deterministic_ops=true",)


def configure_jax(config: ConfigDict, workdir: epath.Path) -> None:
    """Applies the configuration's JAX settings; before joining other processes.

    Args:
      config: resolved configuration.
      workdir: where compiled programs are kept, if config.compile_cache and unless
        JAX_COMPILATION_CACHE_DIR names another folder. It need not exist yet.

    Raises:
      RuntimeError: config.deterministic, but JAX has read its flags already.
    """
    if config.deterministic:
        _add_xla_flags(workdir)
    jax.config.update("jax_default_matmul_precision", config.matmul_precision)
    if config.compile_cache:
        if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        # A cache that cannot be written costs time, not results.
        warnings.filterwarnings("ignore", message=".*persistent compilation cache.*")


def _add_xla_flags(workdir: epath.Path) -> None:
    if xla_bridge.backends_are_initialized():
        raise RuntimeError("XLA's flags are set too late: it has read them already")
    flags = list(DETERMINISTIC_FLAGS)
    if "://" in str(workdir):
        logger.warning(
            "config.deterministic=True: XLA keeps its choice of kernels in a local "
            "folder only, not in %s; another machine may choose others",
            workdir,
        )
    else:
        # Autotuning picks kernels by timing: its choices must be kept with the run.
        folder = workdir / "autotune"
        flags.append(f"--xla_gpu_per_fusion_autotune_cache_dir={folder}")
    known = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join([known, *flags]).strip()


def workdir_path(config: ConfigDict, workdir: str) -> epath.Path:
    """The run's folder; "" stands for runs/<name>-seed<seed>-<hash>."""
    if not workdir:
        short = config_hash(config)[:8]
        workdir = f"runs/{config.name}-seed{config.seed}-{short}"
    if "://" in workdir:
        return epath.Path(workdir)
    return epath.Path(workdir).expanduser().resolve()


def open_workdir(path: epath.Path) -> None:
    """Makes the run's folder; the first process also tries to write there.

    Raises:
      UserError: it cannot be made, or not be written.
    """
    where = f"--workdir={os.fspath(path)!r}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            _write_and_remove(path / f".probe-{os.getpid()}")
    except ImportError:
        raise UserError(f"{where} needs gcsfs: pip install 'bsce_jax[gcs]'") from None
    except Exception as error:  # each object store has its own
        text = " ".join(f"{type(error).__name__}: {error}".split())
        reason = getattr(error, "strerror", None) or text
        raise UserError(f"{where} cannot be written: {reason}") from None


def _write_and_remove(path: epath.Path) -> None:
    try:
        path.write_bytes(b"probe")
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(workdir: epath.Path) -> Iterator[None]:
    """Keeps other runs out of a workdir until this process ends, however it ends.

    Two runs in one workdir would spoil each other's checkpoints. Object stores have no
    such locks; where a file system has none, a log line says so.

    Raises:
      UserError: another run has it.
    """
    if "://" in os.fspath(workdir):
        yield
        return
    with (workdir / _LOCK).open("a") as file:
        try:
            _acquire(file.fileno())
        except BlockingIOError:
            owner = " ".join((workdir / _LOCK).read_text().split())
            raise UserError(
                f"--workdir={os.fspath(workdir)!r} is in use by another run ({owner})"
            ) from None
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): start no second run there", workdir, error
            )
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        yield


def _acquire(file: int) -> None:
    """Takes the lock of an open file; `in_use` may hold it for a moment.

    Raises:
      BlockingIOError: somebody keeps it.
      OSError: the file system has no locks.
    """
    for _ in range(20):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.05)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def in_use(workdir: epath.PathLike) -> bool:
    """Whether a run that lives holds the `lock` of a local workdir."""
    try:
        with open(os.path.join(workdir, _LOCK), encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or no locks there
        return False
    return False


class StopSignal:
    """SIGTERM and Ctrl-C ask the run to save and end; a second Ctrl-C ends it at once.

    A second SIGTERM changes nothing: a scheduler may send one to every process, and the
    parent of this one another. Who cannot wait has SIGKILL.

    Use as a context manager in the main thread; elsewhere it never stops.
    """

    def __init__(self) -> None:
        """No signal yet (0); handlers are installed on entry."""
        self.number = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        """Installs the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        """Restores the earlier handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def ignore(self) -> None:
        """The run has stopped: signals that come late must not change its status."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)
        self._previous = {}

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        self.number = self.number or number
        signal.signal(signal.SIGINT, self._previous[signal.SIGINT])  # type: ignore[arg-type]
