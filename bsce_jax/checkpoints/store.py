"""Numbered checkpoints, with a checksum of every array.

``DIRECTORY/NUMBER`` is one checkpoint. Orbax writes it under a temporary name and
renames it (on an object store, which cannot rename, it writes one last file), so a
process killed at any instant leaves whole checkpoints only. Orbax does not notice a
flipped bit; here every array is hashed when it is saved and again when it is read, and
:func:`latest` falls back to the newest checkpoint that is intact.

A checkpoint holds two items: ``arrays``, an Orbax tree with one entry per leaf, named
by its path, and ``manifest``, JSON with the caller's ``meta`` and the shape, dtype and
SHA-256 of every array, itself hashed.

With several processes the folder is one that all of them see, and the arrays are
replicated: process 0 writes, and each process reads for itself. Neither waits for the
other processes, but for the agreement at the end of :func:`latest`. See
`checkpoints.writer` for saving in the background.
"""

import errno
import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from bsce_jax.checkpoints import manifest, orbax_files
from bsce_jax.checkpoints.manifest import CheckpointError as CheckpointError
from bsce_jax.checkpoints.manifest import DamagedError as DamagedError

FOLDER = "checkpoints"  # of a run's, in its workdir
_log = logging.getLogger(__name__)

_Specs = Mapping[str, Mapping[str, Any]]  # shape, dtype and sha256 by name of array
_NONE = -1  # stands for "no checkpoint"
_NUMBER = re.compile(r"0|[1-9]\d*")
# Names of folders that were being written or deleted when a process died.
_LEFTOVER = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|deleted)")


class Restored(NamedTuple):
    """A verified checkpoint: ``arrays`` is the target's tree of NumPy arrays."""

    number: int
    arrays: Any
    meta: dict[str, Any]


def save(
    directory: epath.PathLike,
    number: int,
    arrays: Any,
    meta: Mapping[str, Any],
    *,
    keep: int = 2,
) -> None:
    """Writes one checkpoint, synchronously and atomically, and prunes older ones.

    Checkpoints with ``meta["permanent"]`` true are never pruned; of the others, those
    remain that are among the newest ``keep`` of all. Damaged checkpoints with this or a
    higher number (a run that fell back saves their numbers again) are renamed to
    ``NUMBER.damaged``; what an interrupted save left behind is removed. May be called
    in any thread, by one at a time. In every process but the first it does nothing.

    Args:
      directory: the folder of all checkpoints, which exists.
      number: >= 0, higher than that of every readable checkpoint there.
      arrays: any tree of JAX or NumPy arrays, scalars as arrays of shape [].
      meta: JSON-able mapping; comes back as JSON gives it (tuples as lists).
      keep: >= 1.

    Raises:
      CheckpointError: the number is taken or not the highest, or the files cannot be
        written (disk full, read-only, quota); earlier checkpoints stay as they were.
      TypeError: a leaf is no array, or ``meta`` is not JSON-able.
    """
    if number < 0 or keep < 1:
        raise CheckpointError(f"checkpoint {number}, keep {keep}: need >= 0 and >= 1")
    if jax.process_index() != 0:
        return
    directory = _absolute(directory)
    path = directory / str(number)
    leaves = _named_leaves(jax.device_get(arrays))
    sealed = manifest.seal(number, leaves, meta)

    def write() -> None:
        # Never made here: one that is removed has taken earlier checkpoints with it.
        if not (_is_remote(directory) or directory.is_dir()):
            raise FileNotFoundError(errno.ENOENT, "the folder of checkpoints is gone")
        _remove_leftovers(directory)
        _make_room(directory, number)
        orbax_files.write(path, _stored(leaves), sealed)

    def failure(reason: str) -> CheckpointError:
        _remove_leftovers(directory)
        return CheckpointError(f"cannot save checkpoint {path}: {reason}")

    orbax_files.attempt(write, failure)
    _prune(directory, keep)


def host_copy(arrays: Any) -> Any:
    """The same tree of NumPy arrays that share no memory with any device.

    All copies from the devices are under way at once.

    Raises:
      TypeError: a leaf is no array.
    """
    for leaf in _named_leaves(arrays).values():
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    # np.array copies: on CPU device_get shares memory that the next update reuses.
    return jax.tree.map(np.array, arrays)


def latest(directory: epath.PathLike, target: Any) -> Restored | None:
    """Reads the newest checkpoint that is intact; None if there is no checkpoint.

    Damaged ones are reported by a warning with path and reason. The target is a tree of
    arrays or `jax.ShapeDtypeStruct` with the expected structure.

    Raises:
      CheckpointError: there are checkpoints but all are damaged, or the newest intact
        one does not have the target's structure, shapes and dtypes.
    """
    found = numbers(directory)
    for number in reversed(found):
        try:
            restored = restore(directory, number, target)
        except DamagedError as error:
            _log.warning("%s; trying the one before", error)
            continue
        _agree(directory, number)
        return restored
    if found:
        raise CheckpointError(f"none of the checkpoints in {directory} is readable")
    _agree(directory, _NONE)
    return None


def _agree(directory: epath.PathLike, number: int) -> None:
    """Raises an error in every process if they have read other checkpoints."""
    if jax.process_count() == 1:
        return
    theirs = multihost_utils.process_allgather(np.int32(number)).tolist()
    if len(set(theirs)) > 1:
        shown = ", ".join("none" if n == _NONE else str(n) for n in theirs)
        raise CheckpointError(
            f"processes 0 to {len(theirs) - 1} read other checkpoints in {directory}: "
            f"{shown}; is it a folder that all hosts see?"
        )


def restore(
    directory: epath.PathLike, number: int, target: Any, *, partial: bool = False
) -> Restored:
    """Reads and verifies the checkpoint ``number``; ``target`` as for :func:`latest`.

    With ``partial`` the target may lack leaves of the checkpoint; they are not read.

    Raises:
      DamagedError: it is not there, incomplete, or a checksum does not match.
      CheckpointError: it does not have the target's structure.
    """
    path = _absolute(directory) / str(number)
    found = manifest.read(path)
    leaves = _named_leaves(target).items()
    expected = {name: manifest.spec_of(leaf) for name, leaf in leaves}
    specs = found["arrays"]
    if partial:
        specs = {name: spec for name, spec in specs.items() if name in expected}
    _check_fit(path, specs, expected)
    arrays = _read_arrays(path, specs)
    ordered = [arrays[name] for name in expected]
    tree = jax.tree.unflatten(jax.tree.structure(target), ordered)
    return Restored(number, tree, found["meta"])


def read_meta(directory: epath.PathLike, number: int) -> dict[str, Any]:
    """Reads and verifies the ``meta`` of a checkpoint, without its arrays.

    Raises:
      DamagedError: it is not there, or the JSON is missing, unreadable or does not
        match its checksum.
    """
    return manifest.read(_absolute(directory) / str(number))["meta"]


def numbers(directory: epath.PathLike) -> list[int]:
    """Numbers of the checkpoints in a folder, damaged ones too, in rising order."""
    directory = _absolute(directory)
    try:
        paths = [path for path in _entries(directory) if _is_checkpoint(path)]
    except Exception as error:  # object stores raise others than OSError, too
        raise CheckpointError(
            f"cannot list {directory}: {orbax_files.reason(error)}"
        ) from error
    return sorted(int(path.name) for path in paths)


def _entries(directory: epath.Path) -> list[epath.Path]:
    """What is in a folder; an object store has no empty ones."""
    return list(directory.iterdir()) if directory.exists() else []


def _absolute(directory: epath.PathLike) -> epath.Path:
    """Orbax takes absolute paths only; those of object stores are."""
    path = epath.Path(directory)
    return path if _is_remote(path) else path.resolve()


def _is_remote(path: epath.Path) -> bool:
    """Whether it is on an object store, where nothing can be renamed at once."""
    return "://" in os.fspath(path)


def _is_checkpoint(path: epath.Path) -> bool:
    """Whether a folder's writing came to its end."""
    if not _NUMBER.fullmatch(path.name):
        return False
    return not _is_remote(path) or (path / orbax_files.COMMITTED).exists()


def _is_leftover(path: epath.Path) -> bool:
    """Whether a process died while it wrote or deleted this folder."""
    if _is_remote(path) and _NUMBER.fullmatch(path.name):
        return not _is_checkpoint(path)
    return bool(_LEFTOVER.fullmatch(path.name))


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path, as in ``params/conv1/kernel``, in the order of the tree."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "array"
        dtype = getattr(leaf, "dtype", None)
        if not isinstance(dtype, np.dtype):
            raise TypeError(f"checkpoint leaf {name} is no array: {dtype or leaf!r}")
        if name in named:
            raise TypeError(f"two checkpoint leaves have the same path, {name}")
        named[name] = leaf
    return named


def _stored(leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What Orbax is given: it refuses arrays without elements and empty trees."""
    stored = {name: np.asarray(leaf) for name, leaf in leaves.items() if leaf.size}
    return stored or {"nothing": np.zeros((), np.bool_)}


def _read_arrays(path: epath.Path, specs: _Specs) -> dict[str, np.ndarray]:
    """Arrays by name, each compared with its checksum."""
    try:
        blank = {name: np.zeros(s["shape"], s["dtype"]) for name, s in specs.items()}
    except (TypeError, ValueError, MemoryError) as error:
        raise manifest.damaged(path, f"an array cannot be: {error}") from error
    leaves = blank | orbax_files.attempt(
        lambda: orbax_files.read(path, _stored(blank)),
        lambda reason: manifest.damaged(path, reason),
    )
    for name, spec in specs.items():
        if manifest.array_hash(leaves[name]) != spec["sha256"]:
            raise manifest.damaged(path, f"checksum of {name} does not match")
    return leaves


def _check_fit(path: epath.Path, specs: _Specs, expected: _Specs) -> None:
    where = f"checkpoint {path} does not fit"
    for name in sorted(specs.keys() ^ expected.keys()):
        problem = "is missing" if name in expected else "is not expected"
        raise CheckpointError(f"{where}: {name} {problem}")
    for name in expected:
        have, want = ("{dtype}{shape}".format(**s[name]) for s in (specs, expected))
        if have != want:
            raise CheckpointError(f"{where}: {name} is {have}, expected {want}")


def _make_room(directory: epath.Path, number: int) -> None:
    """Moves damaged checkpoints from ``number`` on aside; refuses intact ones."""
    damaged = [other for other in numbers(directory) if other >= number]
    for other in damaged:
        try:
            path = directory / str(other)
            _read_arrays(path, manifest.read(path)["arrays"])
        except DamagedError as error:
            _log.warning("%s; renamed to %d.damaged", error, other)
        else:
            raise CheckpointError(f"cannot save checkpoint {number}: {path} exists")
    for other in damaged:
        _set_aside(directory / str(other))


def _set_aside(path: epath.Path) -> None:
    """Renames a checkpoint to ``NUMBER.damaged``, in place of an earlier one."""
    aside = path.with_name(f"{path.name}.damaged")
    if os.path.lexists(aside) and not aside.is_dir():
        aside.unlink()
    elif aside.exists():
        aside.rmtree()
    if not _is_remote(path):
        path.rename(aside)
        return
    for file in _files(path):
        file.copy(aside / os.fspath(file.relative_to(path)))
    _delete(path)


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        yield from _files(path) if path.is_dir() else [path]


def _prune(directory: epath.Path, keep: int) -> None:
    """Deletes all but the newest ``keep`` and the permanent checkpoints."""
    for number in numbers(directory)[:-keep]:
        try:
            if read_meta(directory, number).get("permanent") is True:
                continue
            _delete(directory / str(number))
        except CheckpointError:
            continue  # Unreadable: it may have been a permanent one, worth a rescue.
        except Exception as error:
            _log.warning(
                "cannot delete %s/%d: %s", directory, number, orbax_files.reason(error)
            )


def _delete(path: epath.Path) -> None:
    """Deletes a checkpoint; cut short, it does not look like one any more."""
    doomed = path
    if _is_remote(path):
        (path / orbax_files.COMMITTED).unlink(missing_ok=True)
    else:
        doomed = path.rename(path.with_name(f"{path.name}.deleted"))
    doomed.rmtree()


def _remove_leftovers(directory: epath.Path) -> None:
    """Removes folders whose writing or deletion was cut short, as far as possible."""
    try:
        for path in _entries(directory):
            if _is_leftover(path):
                path.rmtree()
    except Exception as error:
        _log.warning("cannot clean up %s: %s", directory, orbax_files.reason(error))
