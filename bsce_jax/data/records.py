"""The records of a prepared data set, in the order on disk, and an index of labels.

Records are tfds examples in array_record files ("shards"). A label index is a file
`labels-<split>.npy` beside them, int32 [N] in record order: with it nobody reads a
terabyte of images to learn their classes.
"""

import io
import os
import resource
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from bsce_jax import terminal, untrusted
from bsce_jax.errors import UserError

CHUNK = 512  # records read in one call, several times faster than one by one
IDENTITIES = ("file_name", "filename", "image/filename", "id")  # what names an image
OPENING_THREADS = 16


class Encoded(Sequence[tuple[bytes, int]]):
    """Random access to (encoded image, label) pairs; decodes no image.

    Takes the two features straight out of a record, which is twice as fast as tfds
    with its decoders. Pickled, it is a list of files: another process opens them
    anew, when it first reads from them.
    """

    def __init__(
        self, files: Sequence[Any], image: str, label: str, identity: str = ""
    ) -> None:
        """Takes which records to read; opens no file.

        Args:
          files: `file_instructions` of a tfds split.
          image, label: names of the two features.
          identity: name of the feature that names an image; "" where there is none.
        """
        self._image, self._label, self._identity = image, label, identity
        self._files = [os.fspath(file.filename) for file in files]
        self._skips = [int(file.skip) for file in files]
        self._ends = np.cumsum([0, *(file.take for file in files)])[1:]
        self._records = ArrayRecordDataSource(list(files)) if files else []

    def __len__(self) -> int:
        """Returns the number of records."""
        return len(self._records)

    def __getitem__(self, row: Any) -> Any:
        """Returns one pair.

        Raises:
          UserError: its shard is missing, damaged or cut short.
        """
        features = self._features(row)
        return self._pair(row, features)

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[bytes, int]]:
        """Returns several pairs, read in one call; raises as for one."""
        try:
            records = self._records.__getitems__(list(rows))  # type: ignore[union-attr]
        except (RuntimeError, ValueError):
            return [self[row] for row in rows]  # finds the one that cannot be read
        return [
            self._pair(row, self._parse(row, record))
            for row, record in zip(rows, records, strict=True)
        ]

    def name(self, row: int) -> str:
        """What messages call a record: its image's name or id, or else its place."""
        try:
            value = self._features(row)[self._identity].bytes_list.value
            return value[0].decode(errors="replace")
        except (UserError, IndexError):  # unreadable or nameless
            return self._place(row)

    def shard(self, row: int) -> str:
        """The file that holds a record."""
        return self._files[self._file(row)]

    def _file(self, row: int) -> int:
        return int(np.searchsorted(self._ends, row, side="right"))

    def _place(self, row: int) -> str:
        file = self._file(row)
        first = self._ends[file - 1] if file else 0
        return f"record {row - first + self._skips[file]} of {self._files[file]}"

    def _features(self, row: int) -> Any:
        row = range(len(self))[row]  # from the end, too, and an IndexError beyond it
        try:
            record = self._records[row]
        except (RuntimeError, ValueError) as error:
            raise _unreadable(self.shard(row), error) from error
        return self._parse(row, record)

    def _parse(self, row: int, record: bytes) -> Any:
        # array_record reads nothing, without an error, beyond the end of a file that
        # was cut after it had been opened.
        if not record:
            raise UserError(f"{self._place(row)} is empty: the file was cut short")
        try:
            return tf_example_pb2.Example.FromString(record).features.feature
        except DecodeError as error:
            raise UserError(f"{self._place(row)} is no tfds example") from error

    def _pair(self, row: int, features: Any) -> tuple[bytes, int]:
        image = features[self._image].bytes_list.value
        label = features[self._label].int64_list.value
        if not image or not label:
            raise UserError(f"{self._place(row)} has no {self._image}, {self._label}")
        return image[0], label[0]


def _unreadable(path: str, error: Exception) -> UserError:
    """Translates what array_record says about a file."""
    if not epath.Path(path).exists():
        return UserError(f"shard {path} is missing: copy it again or prepare it anew")
    reason = str(error).partition(";")[0] or "it does not end as it must"
    closed = "open() failed" in reason or "://" in path
    what = "cannot be read" if closed else "is damaged or cut short"
    return UserError(f"shard {path} {what}: {reason}")


def feature_names(info: tfds.core.DatasetInfo) -> tuple[str, str]:
    """Returns the names of the image and of the label feature.

    Raises:
      UserError: the data set is not one of images with one class each.
    """
    image, label = info.supervised_keys or ("image", "label")
    features = dict(info.features)
    if not (
        isinstance(features.get(image), tfds.features.Image)
        and isinstance(features.get(label), tfds.features.ClassLabel)
    ):
        raise UserError(
            f"data set {info.name} is not one of images with a class each: "
            f"its features are {list(features)}"
        )
    return image, label


def open_encoded(info: tfds.core.DatasetInfo, split: str) -> Encoded:
    """Opens a split, or a part of one, of a data set stored as array_record."""
    identity = [name for name in IDENTITIES if name in dict(info.features)][:1]
    files = info.splits[split].file_instructions
    return Encoded(files, *feature_names(info), *identity)


def shared_images(info: tfds.core.DatasetInfo, one: str, other: str) -> int:
    """The number of images that are in both of two splits, or parts of them."""
    return sum(
        max(0, min(a.skip + a.take, b.skip + b.take) - max(a.skip, b.skip))
        for a in info.splits[one].file_instructions
        for b in info.splits[other].file_instructions
        if a.filename == b.filename
    )


def check_shards(info: tfds.core.DatasetInfo, split: str) -> None:
    """Opens every shard of a split once: one that was copied in part has no end.

    Raises:
      UserError: names a shard that is missing, cut short or that of another split.
    """
    files = info.splits[split].file_instructions
    _allow_open_files(len(files))

    def check(file: Any) -> None:
        path = os.fspath(file.filename)
        try:
            reader = ArrayRecordReader(path, options="readahead_buffer_size:0")
            found = reader.num_records()
            reader.close()
        except (RuntimeError, ValueError) as error:
            raise _unreadable(path, error) from error
        if found != file.examples_in_shard:
            raise UserError(
                f"shard {path} has {found} records, {file.examples_in_shard} are "
                "expected: it is not of this preparation of the data set"
            )

    with ThreadPoolExecutor(OPENING_THREADS) as pool:
        list(pool.map(check, files))


def _allow_open_files(count: int) -> None:
    """Lets this process, and those it starts, hold so many shards open at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * count + 1024  # two splits, and everything else
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def size(info: tfds.core.DatasetInfo, split: str) -> float:
    """Bytes of the records of a split or of a part of one, about."""
    whole = info.splits.total_num_examples
    return info.dataset_size * info.splits[split].num_examples / max(whole, 1)


def scan_labels(pairs: Encoded, title: str) -> np.ndarray:
    """Reads all records for their labels, int32 [N]; a progress bar on terminals."""
    found = np.empty(len(pairs), np.int32)
    shown = terminal.shows_bars()
    with tqdm(total=len(found), desc=title, unit=" images", disable=not shown) as bar:
        for start in range(0, len(found), CHUNK):
            rows = range(start, min(start + CHUNK, len(found)))
            found[start : rows.stop] = [label for _, label in pairs.__getitems__(rows)]
            bar.update(len(rows))
    return found


def index_path(folder: epath.PathLike, split: str) -> epath.Path:
    """Returns the path of a split's label index in the folder of its version."""
    return epath.Path(folder) / f"labels-{split}.npy"


def write_index(folder: epath.PathLike, split: str, labels: np.ndarray) -> None:
    """Writes the label index of a split; the file appears whole or not at all."""
    content = io.BytesIO()
    np.save(content, labels.astype(np.int32), allow_pickle=False)
    own = f"{os.getpid()}."  # two commands may prepare one data set
    untrusted.replace(index_path(folder, split), content.getvalue(), own)


def write_indexes(info: tfds.core.DatasetInfo) -> None:
    """Writes the label index of every split; reads every record.

    Raises:
      UserError: the data set has no classes, or a shard cannot be read.
      OSError: an index cannot be written.
    """
    for split in info.splits:
        labels = scan_labels(open_encoded(info, split), f"{split} labels")
        write_index(info.data_dir, split, labels)


def indexed_labels(info: tfds.core.DatasetInfo, split: str) -> np.ndarray | None:
    """Labels of a split, or of a part like "train[:10%]", from the index.

    Returns:
      int32 [N] in record order, or None where there is no index.

    Raises:
      UserError: an index does not fit the data set.
    """
    places: dict[str, tuple[str, int]] = {}  # shard -> its split, its first record
    for whole in info.splits:
        first = 0
        for file in info.splits[whole].file_instructions:
            places[os.fspath(file.filename)] = whole, first
            first += file.take
    loaded: dict[str, np.ndarray | None] = {}
    parts = [np.zeros(0, np.int32)]
    for file in info.splits[split].file_instructions:
        whole, first = places[os.fspath(file.filename)]
        if whole not in loaded:
            loaded[whole] = _load_index(info, whole)
        labels = loaded[whole]
        if labels is None:
            return None
        parts.append(labels[first + file.skip : first + file.skip + file.take])
    return np.concatenate(parts)


def _read_index(file: BinaryIO, images: int) -> np.ndarray:
    """Labels of a file of `write_index`, int32 [N]; reads no more than `images`.

    Raises:
      ValueError: it says of itself that it holds something else.
    """
    version = np.lib.format.read_magic(file)
    found = np.lib.format.read_array_header_1_0(file)
    if version != (1, 0) or found != ((images,), False, np.dtype(np.int32)):
        raise ValueError(f"expected int32[{images}]")
    return np.frombuffer(file.read(4 * images), np.int32)


def _load_index(info: tfds.core.DatasetInfo, split: str) -> np.ndarray | None:
    path = index_path(info.data_dir, split)
    if not path.exists():
        return None
    images = info.splits[split].num_examples
    classes = info.features[feature_names(info)[1]].num_classes
    try:
        with path.open("rb") as file:
            labels = _read_index(file, images)
        fits = len(labels) == images
    except Exception:  # whatever the text of a header leads Python's parser to
        fits = False
    # tfds gives images of unknown class the label -1.
    if not fits or (images and not -1 <= labels.min() <= labels.max() < classes):
        raise UserError(
            f"label index {path} does not fit the data set, which has {images} images "
            f"in {classes} classes there: remove it, or write it again with python -m "
            "bsce_jax.data.prepare index"
        )
    return labels
