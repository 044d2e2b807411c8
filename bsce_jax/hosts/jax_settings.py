"""JAX's settings of a run, before anything is computed."""

import logging
import os
import pathlib
import stat
import warnings

import jax
from etils import epath
from ml_collections import ConfigDict

from bsce_jax.errors import UserError, one_line

logger = logging.getLogger("bsce_jax")


DETERMINISTIC_FLAGS = ("--xla_gpu_deterministic_ops=true",)


def configure_jax(config: ConfigDict, workdir: epath.Path) -> None:
    """Applies the configuration's JAX settings; before joining other processes.

    Args:
      config: resolved configuration.
      workdir: where XLA keeps its choice of kernels. It need not exist yet.

    Raises:
      RuntimeError: config.deterministic, but JAX has read its flags already.
    """
    if config.deterministic:
        _add_xla_flags(workdir)
    jax.config.update("jax_default_matmul_precision", config.matmul_precision)


def keep_compiled(config: ConfigDict, alone: bool) -> None:
    """Keeps compiled programs between processes, where config.compile_cache says so.

    In the folder that JAX_COMPILATION_CACHE_DIR names, or else in the user's own: they
    are native code, which a workdir of somebody else must not bring along.

    Args:
      config: resolved configuration.
      alone: whether the run has one process. Several need a folder that all see, which
        only the variable can name: one that compiles may wait for the others to do so.
    """
    if not config.compile_cache:
        return
    if alone and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        try:
            folder = str(_users_cache())
        except (OSError, RuntimeError) as error:  # the latter: there is no home
            logger.warning("compiled programs are not kept: %s", error)
            return
        jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if config.deterministic:  # or JAX keeps the choice of kernels there
        jax.config.update("jax_persistent_cache_enable_xla_caches", "")
    # A cache that cannot be written costs time, not results.
    writing = "Error writing persistent compilation cache.*"
    warnings.filterwarnings("ignore", message=writing)


def _users_cache() -> pathlib.Path:
    """XDG_CACHE_HOME/bsce_jax or ~/.cache/bsce_jax, which nobody else may write.

    Raises:
      OSError: it cannot be made, or is another user's.
      RuntimeError: the user has no home.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    caches = (
        pathlib.Path(given) if os.path.isabs(given) else pathlib.Path.home() / ".cache"
    )
    folder = caches / "bsce_jax"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{folder} belongs to another user")
    if stat.S_IMODE(found.st_mode) != 0o700:
        folder.chmod(0o700)
    return folder


def require_devices() -> None:
    """Starts the devices that JAX_PLATFORMS names.

    Raises:
      UserError: there are none of the kind.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter of JAX's own
        wanted = os.environ.get("JAX_PLATFORMS", "")
        reason = one_line(error) or "there is no such device"
        raise UserError(
            f"JAX_PLATFORMS={wanted!r}: expected a platform that is here, such as cpu, "
            f"or '', for the fastest there is: {reason}"
        ) from None


def _add_xla_flags(workdir: epath.Path) -> None:
    if _jax_has_started():
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


def _jax_has_started() -> bool:
    """Whether JAX has made its devices, and read XLA's flags for that.

    There is no public question for it, but one setting that is refused from then on.
    """
    known = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    try:
        jax.config.update("jax_num_cpu_devices", known + 1 if known > 0 else 1)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", known)
    return False
