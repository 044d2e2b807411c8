"""The folder of a run: its name, whether it can be written, its lock."""

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator

import jax
from etils import epath
from ml_collections import ConfigDict

from bsce_jax import untrusted
from bsce_jax.config.hashes import config_hash
from bsce_jax.errors import UserError

logger = logging.getLogger("bsce_jax")
_LOCK = ".lock"
_OWNER = 200  # characters shown of it


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
        if "://" in os.fspath(path):
            path.write_bytes(b"probe")
        else:
            with untrusted.create(path) as file:
                file.write(b"probe")
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(workdir: epath.Path) -> Iterator[None]:
    """Keeps other runs out of a workdir until this process ends, however it ends.

    Two runs in one workdir would spoil each other's checkpoints. Object stores have no
    such locks; where a file system has none, a log line says so.

    Raises:
      UserError: another run has it, or its file cannot be one.
    """
    if "://" in os.fspath(workdir):
        yield
        return
    with untrusted.open_own(workdir / _LOCK) as file:
        try:
            _acquire(file.fileno())
        except BlockingIOError:
            file.seek(0)
            owner = " ".join(file.read(_OWNER).split())
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


@contextlib.contextmanager
def kept(workdir: epath.Path, file: str, folder: str) -> Iterator[Callable[[], None]]:
    """Looks at the places of what a run will write, and then that they stay.

    Args:
      workdir: of the run; it exists.
      file: name of a file that will be replaced.
      folder: name of a folder, which is made here if need be and never again: made
        anew, it would lack what the run has written before.

    Yields:
      a function that raises a UserError once the folder is gone. In other processes
      than the first, which writes alone, and on object stores it does nothing.

    Raises:
      UserError: something else is in one of the places, or it cannot be written.
    """
    if "://" in os.fspath(workdir) or jax.process_index() != 0:
        yield lambda: None
        return
    for name in (file, f".{file}.tmp"):
        if (workdir / name).is_dir() and not os.path.islink(workdir / name):
            raise UserError(f"{workdir / name} is a folder, expected a file: remove it")
    path = workdir / folder
    try:
        path.mkdir(exist_ok=True)
        _write_and_remove(path / f".probe-{os.getpid()}")
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        link = f", not a link to {os.readlink(path)!r}" if os.path.islink(path) else ""
        raise UserError(
            f"{path} cannot be written: {error.strerror} (expected a folder{link})"
        ) from None

    def still_there() -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            # Its number is nobody else's as long as it is open.
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return
        raise UserError(
            f"--workdir={os.fspath(workdir)!r} is gone: it was removed, or another put "
            "in its place, while the run went on"
        )

    try:
        yield still_there
    finally:
        os.close(descriptor)


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
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.open(os.path.join(workdir, _LOCK), flags)
    except OSError:  # no such file, or a link
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks there
        return False
    finally:
        os.close(file)
    return False
