"""JAX's settings of a run, before anything is computed."""

import logging
import os
import warnings

import jax
from etils import epath
from ml_collections import ConfigDict

from bsce_jax.errors import UserError

logger = logging.getLogger("bsce_jax")


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


def require_devices() -> None:
    """Starts the devices that JAX_PLATFORMS names.

    Raises:
      UserError: there are none of the kind.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter of JAX's own
        wanted = os.environ.get("JAX_PLATFORMS", "")
        reason = " ".join(str(error).split()) or "there is no such device"
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
