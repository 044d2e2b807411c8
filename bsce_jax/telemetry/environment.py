"""Versions, devices and source of a process, for its results."""

import importlib.metadata
import logging
import os
import pathlib
import platform
import re
import subprocess
from typing import Any

import jax

from bsce_jax.errors import UserError

logger = logging.getLogger("bsce_jax")


COMMIT = "BSCE_JAX_COMMIT"  # names the commit of a source tree without its .git
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
      processes; cpus: those this process may use; commit: see `commit`, or
        `told_commit` where there is none; xla_flags: the environment variable's.
    """
    allowed = getattr(os, "sched_getaffinity", None)  # absent on macOS
    return {
        "versions": versions(),
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpus": len(allowed(0)) if allowed else os.cpu_count(),
        "commit": commit(pathlib.Path(__file__)) or told_commit(),
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


def told_commit() -> str | None:
    """The commit that the environment variable names; None where it is not set.

    Raises:
      UserError: it is none.
    """
    told = os.environ.get(COMMIT, "")
    if told and not re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", told):
        allowed = "a commit, 7 to 40 hexadecimal digits, maybe with -dirty after them"
        raise UserError(f"{COMMIT}={told!r}: expected {allowed}")
    return told or None
