"""Folders of class folders, such as ImageNet's, as a tfds data set; no TensorFlow.

tfds' own builders shuffle what is larger than memory with TensorFlow, through a copy of
the data set on disk. Here the order is that of a hash of the files' names, known before
any file is read, so each is read once and written once, as it is.
"""

import collections
import functools
import io
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from bsce_jax import terminal
from bsce_jax.data import decode, records
from bsce_jax.data.builders import arrays, class_folders
from bsce_jax.data.builders.class_folders import Files, some
from bsce_jax.data.builders.shards import Shards
from bsce_jax.errors import UserError, printable

VERSION = "1.0.0"
# Short enough to be part of the names of folders and files.
NAME = re.compile(r"[a-z][a-z0-9_]{0,99}")
TAKEN = ("cifar100", "digits")  # the package's own data sets
LEFT_OUT = "left_out.txt"  # in the data set's folder
THREADS, AHEAD = 16, 64  # that read files, and files that may be in memory
JPEG_START, PNG_START = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
SMALL = 16  # pixels a side of what a decoded image is shrunk to


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
    check_name(name)
    test_name = test_name or ("validation" if name == "imagenet2012" else "test")
    if not NAME.fullmatch(test_name) or test_name in ("train", "all"):
        raise UserError(
            f"--test_name={_start(test_name)}: expected a name such as test"
        )

    def write(scratch: pathlib.Path) -> pathlib.Path:
        classes, splits = class_folders.splits(
            train, test, test_name, test_fraction, seed, skip_others
        )
        folder = scratch / VERSION
        folder.mkdir()
        check_class_names(classes, folder, f"--train={train}")
        read = functools.partial(_read, whole=decode_all)
        _write(folder, name, classes, splits, read, skip_corrupt)
        return folder

    return arrays.publish(name, VERSION, root, write)


def check_name(name: str) -> None:
    """Makes sure that a data set may have this name.

    Raises:
      UserError: it may not.
    """
    if not NAME.fullmatch(name) or name in TAKEN:
        raise UserError(
            f"--name={_start(name)}: expected lower-case letters, digits and _, "
            f"100 at most, and none of {', '.join(TAKEN)}"
        )


def _start(name: str) -> str:
    return repr(name) if len(name) <= 100 else f"{name[:100]!r}..."


def check_class_names(classes: Sequence[str], folder: pathlib.Path, given: str) -> None:
    """Makes sure that tfds reads the names of classes as it writes them.

    Args:
      classes: the names.
      folder: in which they are written.
      given: what messages call the folder of class folders.

    Raises:
      UserError: names the folders whose names do not come back.
    """
    if not _come_back(classes, folder):
        lost = [repr(name) for name in classes if not _come_back([name], folder)]
        raise UserError(
            f"{given}: {some(lost, 'class')} whose name the file of names would "
            "not give back; rename: UTF-8, no line break, no blank at an end"
        )


def _come_back(classes: Sequence[str], folder: pathlib.Path) -> bool:
    written, read = tfds.features.ClassLabel(names=classes), tfds.features.ClassLabel()
    try:
        written.save_metadata(folder, "label")
        read.load_metadata(folder, "label")
    except ValueError:  # cannot be encoded, or one name twice
        return False
    return read.names == list(classes)


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
            named = some([classes[int(i)] for i in empty], "class")
            raise UserError(f"{named} without a whole image in {split}")
        records.write_index(folder, split, labels)
    if bad and not skip_corrupt:
        raise UserError(
            f"no whole JPEG or PNG image: {some(bad, 'file')}; repair or remove, or "
            "leave out with --corrupt skip"
        )
    if bad:
        (folder / LEFT_OUT).write_text("".join(f"{line}\n" for line in bad), "utf-8")
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
    shown = terminal.shows_bars()
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(
            total=len(files.names), desc=split, unit=" images", disable=not shown
        ) as bar,
    ):
        paths = (files.folder / name for name in files.names)
        for i, (data, problem) in enumerate(_ahead(pool, read, paths)):
            bar.update()
            if problem:
                bad.append(f"{printable(files.names[i])} ({problem})")
                bar.set_postfix_str(f"{len(bad)} unusable")
            elif skip_corrupt or not bad:
                label = int(files.labels[i])
                file_name = os.fsencode(files.names[i]).decode(errors="replace")
                example = {"image": io.BytesIO(data), "label": label}
                example |= {"file_name": file_name}
                shards.add(features.serialize_example(example))
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
