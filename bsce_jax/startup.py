"""Prepares the process for a run: JAX's settings, the workdir, signals."""

import logging
import os
import signal
import threading
import types
import warnings

import jax
from etils import epath
from ml_collections import ConfigDict

from bsce_jax.config import config_hash
from bsce_jax.errors import UserError

logger = logging.getLogger("bsce_jax")


def configure_jax(config: ConfigDict, workdir: epath.Path) -> None:
    """Applies the configuration's JAX settings; before any computation.

    Args:
      config: resolved configuration.
      workdir: where compiled programs are kept, if config.compile_cache and unless
        JAX_COMPILATION_CACHE_DIR names another folder.
    """
    jax.config.update("jax_default_matmul_precision", config.matmul_precision)
    if config.deterministic:
        # Autotuning picks kernels by timing: its choices must be kept with the run.
        flags = ["--xla_gpu_deterministic_ops=true"]
        if "://" in str(workdir):
            logger.warning(
                "config.deterministic=True: XLA keeps its choice of kernels in a local "
                "folder only, not in %s; another machine may choose others",
                workdir,
            )
        else:
            folder = workdir / "autotune"
            flags.append(f"--xla_gpu_per_fusion_autotune_cache_dir={folder}")
        known = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = " ".join([known, *flags]).strip()
    if config.compile_cache:
        if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        # A cache that cannot be written costs time, not results.
        warnings.filterwarnings("ignore", message=".*persistent compilation cache.*")


def open_workdir(config: ConfigDict, workdir: str) -> epath.Path:
    """Makes the run's folder; "" stands for runs/<name>-seed<seed>-<hash>.

    Raises:
      UserError: it cannot be made.
    """
    if not workdir:
        short = config_hash(config)[:8]
        workdir = f"runs/{config.name}-seed{config.seed}-{short}"
    remote = "://" in workdir
    try:
        path = epath.Path(workdir) if remote else epath.Path(workdir).expanduser()
        path.mkdir(parents=True, exist_ok=True)
    except ImportError:
        raise UserError(
            f"--workdir={workdir!r} needs gcsfs: pip install 'bsce_jax[gcs]'"
        ) from None
    except OSError as error:
        raise UserError(f"--workdir={workdir!r} cannot be made: {error}") from None
    return path if remote else path.resolve()


class StopSignal:
    """SIGTERM and Ctrl-C ask the run to save and end; a second one ends it at once.

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

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        self.number = number
        for known, handler in self._previous.items():
            signal.signal(known, handler)  # type: ignore[arg-type]
