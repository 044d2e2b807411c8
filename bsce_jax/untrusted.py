"""Files of a folder that somebody else may have filled.

What is written follows no link out of the folder; what is read may be anything.
"""

import contextlib
import json
import os
import stat
from typing import Any, BinaryIO, TextIO

from etils import epath

from bsce_jax.errors import UserError, one_line


def create(path: epath.PathLike) -> BinaryIO:
    """Opens a new local file for writing; whatever had its name is removed first.

    A link of that name is not followed: it may lead out of the folder.

    Raises:
      OSError: it cannot be made, or a folder has its name.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return open(path, "xb")


def replace(target: epath.Path, data: bytes, own: str = "") -> None:
    """Replaces a file at once; after a crash it is the old one or the new one.

    Args:
      target: the file; its name may be a link's, which then is replaced.
      data: all of its content.
      own: part of a temporary file's name, where several processes may write at once;
        without it, what a killed one left behind is removed by the next.

    Raises:
      OSError: it cannot be written; object stores raise others, too.
    """
    if "://" in os.fspath(target):
        target.write_bytes(data)  # object stores replace a whole object at once
        return
    temporary = target.with_name(f".{target.name}.{own}tmp")
    try:
        with create(temporary) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, survives a loss of power
    finally:
        os.close(folder)


def open_own(path: epath.PathLike) -> TextIO:
    """Opens a local text file for reading and appending; makes it where there is none.

    Raises:
      UserError: it cannot be opened, or is a link, a folder or whatever else.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        file = open(
            path,
            "a+",
            encoding="utf-8",
            errors="replace",
            opener=lambda name, _: os.open(name, flags, 0o666),
        )
    except OSError as error:
        reason = "it is a link" if os.path.islink(path) else error.strerror
        raise UserError(f"{path} cannot be opened: {reason}") from None
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        file.close()
        raise UserError(f"{path} is no ordinary file with one name: remove it")
    return file


def read_json(path: epath.PathLike, expected: str) -> Any:
    """Reads a JSON file, strictly: NaN and Infinity are no numbers.

    Args:
      path: of the file.
      expected: what should be there, for the message where there is nothing.

    Raises:
      UserError: there is none, it cannot be read, or it is not JSON.
    """
    path = epath.Path(path)
    try:
        # A pipe would be waited for, which epath takes for a file.
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path} is not a file: expected {expected}")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist: expected {expected}") from None
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"{path} cannot be read: {reason}") from error
    except RecursionError:
        raise UserError(
            f"{path} is not valid: its values are nested too deep"
        ) from None
    except ValueError as error:  # neither UTF-8 nor JSON
        raise UserError(f"{path} is not JSON: {error}") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")
