"""Class folders and the images in them: what is listed, and in which split it goes."""

import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from bsce_jax import terminal
from bsce_jax.errors import UserError

ENDINGS = (".jpeg", ".jpg", ".png")
SHOWN = 3  # files or classes named in a message


class Files(NamedTuple):
    """Images of a split: names relative to the folder, labels int32 [N]."""

    folder: pathlib.Path
    names: Sequence[str]
    labels: np.ndarray

    def take(self, rows: np.ndarray) -> "Files":
        """The files at these indices, in this order."""
        return Files(self.folder, [self.names[i] for i in rows], self.labels[rows])


def splits(
    train: str | pathlib.Path,
    test: str | pathlib.Path,
    test_name: str,
    fraction: float,
    seed: int,
    skip_others: bool,
) -> tuple[list[str], dict[str, Files]]:
    """Class names, and the files of each split in the order on disk.

    Args:
      train, test, test_name: as in `image_folder.prepare`.
      fraction, seed: `test_fraction` there, and its seed.
      skip_others: see `list_files`.

    Raises:
      UserError: as in `list_files`; the two folders have other classes, or a class has
        a single image and no test folder.
    """
    classes, files = list_files(train, "--train", skip_others)
    keys = _keys(files.names, seed)
    in_order = np.argsort(keys, kind="stable")
    if not test:
        lone = np.flatnonzero(np.bincount(files.labels) < 2)
        if len(lone):
            raise UserError(
                f"--test_fraction: {some([classes[int(i)] for i in lone], 'class')} "
                "with a single image; give --test"
            )
        held = hold_out(files.labels, keys, fraction)[in_order]
        kept, rest = files.take(in_order[~held]), files.take(in_order[held])
        return classes, {"train": kept, test_name: rest}
    found, others = list_files(test, "--test", skip_others)
    given = f"--test={test}"
    if extra := sorted(set(found) - set(classes)):
        raise UserError(f"{given}: {some(extra, 'class')} not in --train")
    if extra := sorted(set(classes) - set(found)):
        raise UserError(f"{given}: {some(extra, 'class')} missing")
    rest = others.take(np.argsort(_keys(others.names, seed), kind="stable"))
    return classes, {"train": files.take(in_order), test_name: rest}


def list_files(
    folder: str | pathlib.Path, argument: str, skip_others: bool = False
) -> tuple[list[str], Files]:
    """Lists the class folders of a folder and the images in them; reads none.

    Hidden files and folders do not count. Links to folders are followed, once.

    Args:
      folder: of class folders.
      argument: what messages call it.
      skip_others: whether to pass over files without an image's ending, and pipes,
        sockets and devices.

    Returns:
      sorted class names, and the images sorted by class and name.

    Raises:
      UserError: a folder that cannot be read, no class folders, one without images,
        images outside of them, files that are no images, or a link by which images
        would be of two classes.
    """
    root = pathlib.Path(folder).expanduser()
    given = f"{argument}={folder}"
    names: list[str] = []
    counts, others, special, empty = [], [], [], []
    try:
        classes = _class_folders(root, given)
        seen = _folders_above(root)
        for name in tqdm(
            classes, desc=f"{argument[2:]} classes", disable=not terminal.shows_bars()
        ):
            found, odd = _walk(root, name, seen, given)
            images = [file for file in sorted(found) if _is_image(file)]
            others += [file for file in sorted(found) if not _is_image(file)]
            special += sorted(odd)
            empty += [] if images else [name]
            names += images
            counts.append(len(images))
    except OSError as error:
        raise UserError(f"{given}: {error.filename}: {error.strerror}") from error
    for wrong, what in (
        (others, f"not ending in {', '.join(ENDINGS)}; convert or remove,"),
        (special, "being a pipe, socket or device; remove,"),
    ):
        if wrong and not skip_others:
            raise UserError(
                f"{given}: {some(wrong, 'file')} {what} or leave out with "
                "--other_files skip"
            )
    if empty:
        raise UserError(f"{given}: {some(empty, 'class')} without images")
    return classes, Files(root, names, np.repeat(np.arange(len(counts)), counts))


def _class_folders(root: pathlib.Path, given: str) -> list[str]:
    """Sorted names of the class folders; `given` is what messages call root."""
    if not root.is_dir():
        raise UserError(f"{given}: no such folder")
    entries = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise UserError(f"{given}: no class folders in it")
    loose = [e.name for e in entries if _is_image(e.name) and not e.is_dir()]
    if loose:
        named = some(sorted(loose), "image")
        raise UserError(f"{given}: {named} outside of the class folders")
    return classes


def _is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def _folders_above(root: pathlib.Path) -> dict[tuple[int, int], str]:
    """Device and inode -> path of a folder and of all folders that it lies in."""
    real = root.resolve()
    found = {}
    for folder in (real, *real.parents):
        status = os.stat(folder)
        found[status.st_dev, status.st_ino] = str(folder)
    return found


def _walk(
    root: pathlib.Path, name: str, seen: dict[tuple[int, int], str], given: str
) -> tuple[list[str], list[str]]:
    """Lists the files under a class folder, relative to root, and what is no file.

    Args:
      root, name: of the folders.
      seen: device and inode -> path of the folders that no other class may have;
        those of this class are added.
      given: what messages call root.
    """
    files: list[str] = []
    special: list[str] = []
    waiting = [name]
    while waiting:
        below = waiting.pop()
        status = os.stat(root / below)
        first = seen.setdefault((status.st_dev, status.st_ino), below)
        if first.partition("/")[0] != name:
            raise UserError(
                f"{given}: {below} is the folder {first}, too, and its "
                "images would be of two classes; remove the link"
            )
        if first != below:  # a link to a folder of the same class
            continue
        with os.scandir(root / below) as entries:
            # Sorted: which of two links counts must not depend on the disk.
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = f"{below}/{entry.name}"
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    waiting.append(path)
                else:
                    (special if _is_special(entry) else files).append(path)
    return files, special


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that cannot be followed: its reader says why
        return False


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Whether it is no file, nor a link to one: who reads a pipe waits for ever."""
    regular = entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path)
    return not regular and os.path.exists(entry.path)


def _keys(names: Sequence[str], seed: int) -> np.ndarray:
    """Hashes of the files' names, uint64 [N]: they decide order and split."""
    keys = np.empty(len(names), np.uint64)
    for i, name in enumerate(names):
        digest = hashlib.blake2b(os.fsencode(f"{seed}/{name}"), digest_size=8).digest()
        keys[i] = int.from_bytes(digest, "big")
    return keys


def hold_out(labels: np.ndarray, keys: np.ndarray, fraction: float) -> np.ndarray:
    """Marks the test images: of every class the share with the lowest keys.

    Args:
      labels: int [N], each class from 0 to the largest at least twice.
      keys: uint64 [N].
      fraction: above 0 and below 1; rounded per class, but never to none or all.

    Returns:
      bool [N].

    Raises:
      UserError: fraction is out of range.
    """
    if not 0 < fraction < 1:
        raise UserError(f"--test_fraction={fraction}: expected between 0 and 1")
    counts = np.bincount(labels)
    held = np.zeros(len(labels), bool)
    rows = np.lexsort((keys, labels))
    for own in np.split(rows, np.cumsum(counts)[:-1]):
        held[own[: min(max(1, round(fraction * len(own))), len(own) - 1)]] = True
    return held


def some(names: Sequence[str], kind: str) -> str:
    """Names the first few of many: "4 files (a, b, c, ...)"."""
    first = ", ".join(names[:SHOWN])
    more = ", ..." if len(names) > SHOWN else ""
    plural = "" if len(names) == 1 else "es" if kind.endswith("s") else "s"
    return f"{len(names):,} {kind}{plural} ({first}{more})"
