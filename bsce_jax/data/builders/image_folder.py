"""Folders of class folders, such as ImageNet's, as a tfds data set; no TensorFlow.

tfds' own builders shuffle what is larger than memory with TensorFlow, through a copy of
the data set on disk. Here the order is that of a hash of the files' names, known before
any file is read, so each is read once and written once, as it is.
"""

import collections
import functools
import hashlib
import io
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from bsce_jax.data import decode, records
from bsce_jax.data.builders import arrays
from bsce_jax.data.builders.shards import Shards
from bsce_jax.errors import UserError

VERSION = "1.0.0"
ENDINGS = (".jpeg", ".jpg", ".png")
NAME = re.compile(r"[a-z][a-z0-9_]*")
TAKEN = ("cifar100", "digits")  # the package's own data sets
LEFT_OUT = "left_out.txt"  # in the data set's folder
THREADS, AHEAD = 16, 64  # that read files, and files that may be in memory
JPEG_START, PNG_START = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
SMALL = 16  # pixels a side of what a decoded image is shrunk to
SHOWN = 3  # files or classes named in a message


class Files(NamedTuple):
    """Images of a split: names relative to the folder, labels int32 [N]."""

    folder: pathlib.Path
    names: Sequence[str]
    labels: np.ndarray

    def take(self, rows: np.ndarray) -> "Files":
        """The files at these indices, in this order."""
        return Files(self.folder, [self.names[i] for i in rows], self.labels[rows])


def prepare(
    name: str,
    root: pathlib.Path,
    train: str | pathlib.Path,
    test: str | pathlib.Path = "",
    *,
    test_name: str = "",
    test_fraction: float = 0.2,
    seed: int = 0,
    skip_corrupt: bool = False,
    skip_others: bool = False,
    decode_all: bool = False,
) -> pathlib.Path:
    """Returns the folder of the prepared data set under root; writes it at need.

    A class is a folder, its name the folder's; labels follow the sorted names. Images
    may lie in sub-folders of it. Features: image, label, file_name.

    Args:
      name: of the data set, in snake case.
      root: tfds data directory.
      train: folder of the training images' class folders.
      test: likewise, with the same classes; "" takes a share of the training images.
      test_name: of the test split; "" is "validation" for imagenet2012, as in tfds,
        and "test" for all others.
      test_fraction: that share, the same of every class, where there is no test folder.
      seed: of that share.
      skip_corrupt: leaves out files that are no whole JPEG or PNG images, and lists
        them in left_out.txt.
      skip_others: leaves out files with other endings.
      decode_all: decodes every image, instead of looking at its header and its end.

    Raises:
      UserError: a name or folder is not as described, files are no images, or the
        data set cannot be written.
    """
    if not NAME.fullmatch(name) or name in TAKEN:
        raise UserError(
            f"--name={name!r}: expected lower-case letters, digits and _, and none of "
            f"{', '.join(TAKEN)}"
        )
    test_name = test_name or ("validation" if name == "imagenet2012" else "test")
    if not NAME.fullmatch(test_name) or test_name in ("train", "all"):
        raise UserError(f"--test_name={test_name!r}: expected a name such as test")

    def write(scratch: pathlib.Path) -> pathlib.Path:
        classes, splits = _splits(
            train, test, test_name, test_fraction, seed, skip_others
        )
        folder = scratch / VERSION
        folder.mkdir()
        read = functools.partial(_read, whole=decode_all)
        _write(folder, name, classes, splits, read, skip_corrupt)
        return folder

    return arrays.publish(name, VERSION, root, write)


def _splits(
    train: str | pathlib.Path,
    test: str | pathlib.Path,
    test_name: str,
    fraction: float,
    seed: int,
    skip_others: bool,
) -> tuple[list[str], dict[str, Files]]:
    """Class names, and the files of each split in the order on disk."""
    classes, files = list_files(train, "--train", skip_others)
    keys = _keys(files.names, seed)
    in_order = np.argsort(keys, kind="stable")
    if not test:
        held = hold_out(files.labels, keys, fraction)[in_order]
        kept, rest = files.take(in_order[~held]), files.take(in_order[held])
        return classes, {"train": kept, test_name: rest}
    found, others = list_files(test, "--test", skip_others)
    if extra := sorted(set(found) - set(classes)):
        raise UserError(f"--test={test}: {_some(extra, 'class')} not in --train")
    if extra := sorted(set(classes) - set(found)):
        raise UserError(f"--test={test}: {_some(extra, 'class')} missing")
    rest = others.take(np.argsort(_keys(others.names, seed), kind="stable"))
    return classes, {"train": files.take(in_order), test_name: rest}


def list_files(
    folder: str | pathlib.Path, argument: str, skip_others: bool = False
) -> tuple[list[str], Files]:
    """Lists the class folders of a folder and the images in them; reads none.

    Hidden files and folders do not count; links to folders are followed.

    Args:
      folder: of class folders.
      argument: what messages call it.
      skip_others: whether files without an image's ending are passed over.

    Returns:
      sorted class names, and the images sorted by class and name.

    Raises:
      UserError: a folder that cannot be read, no class folders, one without images,
        images outside of them, or files that are no images.
    """
    root = pathlib.Path(folder).expanduser()
    names: list[str] = []
    counts, others, empty = [], [], []
    try:
        classes = _class_folders(root, f"{argument}={folder}")
        for name in tqdm(classes, desc=f"{argument[2:]} classes", disable=None):
            found = sorted(_walk(root, name))
            images = [file for file in found if _is_image(file)]
            others += [file for file in found if not _is_image(file)]
            empty += [] if images else [name]
            names += images
            counts.append(len(images))
    except OSError as error:
        raise UserError(
            f"{argument}={folder}: {error.filename}: {error.strerror}"
        ) from error
    if others and not skip_others:
        raise UserError(
            f"{argument}={folder}: {_some(others, 'file')} not ending in "
            f"{', '.join(ENDINGS)}; convert or remove, or leave out with "
            "--other_files skip"
        )
    if empty:
        raise UserError(f"{argument}={folder}: {_some(empty, 'class')} without images")
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
        shown = _some(sorted(loose), "image")
        raise UserError(f"{given}: {shown} outside of the class folders")
    return classes


def _is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def _walk(root: pathlib.Path, name: str) -> Iterator[str]:
    """Yields the files under a class folder, relative to root."""

    def refuse(error: OSError) -> None:  # os.walk would pass over the folder
        raise error

    seen = set()
    for folder, inner, files in os.walk(root / name, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inner[:] = [entry for entry in inner if not entry.startswith(".")]
        below = os.path.relpath(folder, root)
        yield from (f"{below}/{file}" for file in files if not file.startswith("."))


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
      labels: int [N], each class from 0 to the largest at least once.
      keys: uint64 [N].
      fraction: above 0 and below 1; rounded per class, but never to none or all.

    Returns:
      bool [N].

    Raises:
      UserError: fraction is out of range, or a class has a single image.
    """
    if not 0 < fraction < 1:
        raise UserError(f"--test_fraction={fraction}: expected between 0 and 1")
    counts = np.bincount(labels)
    if counts.min() < 2:
        raise UserError("--test_fraction: a class has a single image; give --test")
    held = np.zeros(len(labels), bool)
    rows = np.lexsort((keys, labels))
    for own in np.split(rows, np.cumsum(counts)[:-1]):
        held[own[: min(max(1, round(fraction * len(own))), len(own) - 1)]] = True
    return held


def _write(
    folder: pathlib.Path,
    name: str,
    classes: Sequence[str],
    splits: dict[str, Files],
    read: Callable[[pathlib.Path], tuple[bytes, str]],
    skip_corrupt: bool,
) -> None:
    """Writes records, label indexes and metadata of all splits."""
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=list(classes)),
            "file_name": tfds.features.Text(),
        }
    )
    infos: list[tfds.core.SplitInfo] = []
    bad: list[str] = []
    for split, files in splits.items():
        info, labels = _write_split(
            folder, f"{name}-{split}", split, files, features, read, bad, skip_corrupt
        )
        infos.append(info)
        empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
        if len(empty) and (skip_corrupt or not bad):
            shown = _some([classes[int(i)] for i in empty], "class")
            raise UserError(f"{shown} without a whole image in {split}")
        records.write_index(folder, split, labels)
    if bad and not skip_corrupt:
        raise UserError(
            f"no whole JPEG or PNG image: {_some(bad, 'file')}; repair or remove, or "
            "leave out with --corrupt skip"
        )
    if bad:
        (folder / LEFT_OUT).write_text("".join(f"{line}\n" for line in bad))
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=infos,
        version=VERSION,
        supervised_keys=("image", "label"),
        description="A folder of class folders, prepared by bsce_jax.",
        check_data=False,
    )


def _write_split(
    folder: pathlib.Path,
    prefix: str,
    split: str,
    files: Files,
    features: tfds.features.FeaturesDict,
    read: Callable[[pathlib.Path], tuple[bytes, str]],
    bad: list[str],
    skip_corrupt: bool,
) -> tuple[tfds.core.SplitInfo, np.ndarray]:
    """Writes the shards of a split; appends the files that are left out to bad."""
    shards = Shards(folder, prefix)
    labels = []
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=len(files.names), desc=split, unit=" images", disable=None) as bar,
    ):
        paths = (files.folder / name for name in files.names)
        for i, (data, problem) in enumerate(_ahead(pool, read, paths)):
            bar.update()
            shown = os.fsencode(files.names[i]).decode(errors="replace")
            if problem:
                bad.append(f"{shown} ({problem})")
                bar.set_postfix_str(f"{len(bad)} unusable")
            elif skip_corrupt or not bad:
                label = int(files.labels[i])
                example = {"image": io.BytesIO(data), "label": label}
                shards.add(features.serialize_example(example | {"file_name": shown}))
                labels.append(label)
    lengths = shards.close()
    info = tfds.core.SplitInfo(
        name=split, shard_lengths=lengths, num_bytes=shards.num_bytes
    )
    return info, np.array(labels, np.int32)


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Iterable[Any]
) -> Iterator[Any]:
    """Yields function(item) in order, a few calls ahead in the pool's threads."""
    waiting: collections.deque[Future] = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _read(path: pathlib.Path, whole: bool) -> tuple[bytes, str]:
    """Reads a file; the second value is its `problem`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return b"", str(error.strerror)
    return data, problem(data, whole)


def problem(data: bytes, whole: bool = False) -> str:
    """Says why bytes are no JPEG or PNG image; "" where they are.

    Args:
      data: the bytes.
      whole: whether they are decoded, as training does; else only their two ends are
        looked at, and only what does not end as it must is decoded.
    """
    if not data.startswith((JPEG_START, PNG_START)):
        return "neither JPEG nor PNG"
    try:
        decode.check_header(data)
        if whole or not _ends_with_pixels(data):
            decode.test_crop(data, SMALL, resize=-1)
    except decode.DecodeError as error:
        return str(error)
    return ""


def _ends_with_pixels(data: bytes) -> bool:
    """Whether the end marker of a JPEG or PNG is its last, right behind its pixels."""
    if data.startswith(JPEG_START):
        return data.endswith(b"\xff\xd9")
    at = data.rfind(b"IDAT")  # the name of a chunk, behind its length and before a CRC
    length = int.from_bytes(data[at - 4 : at], "big")
    return data[at + 4 + length + 4 :] == PNG_END


def _some(names: Sequence[str], kind: str) -> str:
    """Names the first few of many: "4 files (a, b, c, ...)"."""
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    plural = "" if len(names) == 1 else "es" if kind.endswith("s") else "s"
    return f"{len(names):,} {kind}{plural} ({shown})"
