"""Data sets as random-access tfds sources: read from disk, never from a network.

A source is a sequence of records in the order in which they lie on disk; a training
set or a memory is an array of indices into it. Folders must be in array_record
format. TensorFlow is not imported.
"""

import os
import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from bsce_jax.data.builders import digits
from bsce_jax.errors import UserError

VERSION = re.compile(r"\d+\.\d+\.\d+")
CHUNK = 512  # records read in one call, several times faster than one by one


class Encoded(Sequence[tuple[bytes, int]]):
    """Random access to (encoded image, label) pairs; decodes no image.

    Takes the two features straight out of a record, which is twice as fast as tfds
    with its decoders.
    """

    def __init__(self, records: Sequence[bytes], image: str, label: str) -> None:
        """Takes a source of serialised examples and the names of two features."""
        self._records = records
        self._image = image
        self._label = label

    def __len__(self) -> int:
        """Returns the number of records."""
        return len(self._records)

    def __getitem__(self, row: Any) -> Any:
        """Returns one pair."""
        return self._pair(self._records[row])

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[bytes, int]]:
        """Returns several pairs, read in one call."""
        records = self._records.__getitems__(list(rows))  # type: ignore[attr-defined]
        return [self._pair(record) for record in records]

    def _pair(self, record: bytes) -> tuple[bytes, int]:
        features = tf_example_pb2.Example.FromString(record).features.feature
        image = features[self._image].bytes_list.value[0]
        return image, features[self._label].int64_list.value[0]


def open_split(
    name: str, split: str, data_dir: str = ""
) -> tuple[Sequence[Any], tfds.core.DatasetInfo]:
    """Opens one split of a prepared data set.

    Args:
      name: a tfds name, "cifar100", or "name/config", or either with ":1.2.3" for
        one version; without it the newest prepared version is read. "digits" is
        the package's own and prepares itself on first use.
      split: "train", "test", "train[:10%]", ...
      data_dir: tfds data directory; "" means $TFDS_DATA_DIR, or else
        ~/tensorflow_datasets.

    Returns:
      the source, a dict of decoded feature values per record, and its metadata.

    Raises:
      UserError: no such data set, split or format on disk; says how to prepare it.
    """
    return _open(name, split, data_dir)


def open_encoded(
    name: str, split: str, data_dir: str = ""
) -> tuple[Encoded, tfds.core.DatasetInfo]:
    """Opens one split as pairs of an encoded image and a label; see `open_split`."""
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    records, info = _open(name, split, data_dir, deserialize_method=raw)
    return Encoded(records, *feature_names(info)), info


def _open(
    name: str, split: str, data_dir: str, **options: Any
) -> tuple[Sequence[Any], tfds.core.DatasetInfo]:
    builder = _builder(name, data_dir)
    try:
        builder.info.splits[split]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"split {split!r} of {name} does not exist: it has "
            f"{', '.join(builder.info.splits)}"
        ) from error
    source = builder.as_data_source(split, file_format="array_record", **options)
    return source, builder.info


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


def class_names(name: str, data_dir: str = "") -> tuple[str, ...]:
    """Returns the name of each class, "0", "1", ... where the data set has none."""
    info = _builder(name, data_dir).info
    return tuple(info.features[feature_names(info)[1]].names)


def labels(name: str, split: str, data_dir: str = "") -> np.ndarray:
    """Returns the labels, int32 [N], in the order of the source; decodes no image."""
    pairs, _ = open_encoded(name, split, data_dir)
    found = np.empty(len(pairs), np.int32)
    with tqdm(total=len(found), desc=f"{name} labels", disable=None) as bar:
        for start in range(0, len(found), CHUNK):
            rows = range(start, min(start + CHUNK, len(found)))
            found[start : rows.stop] = [label for _, label in pairs.__getitems__(rows)]
            bar.update(len(rows))
    return found


def root(data_dir: str = "") -> pathlib.Path:
    """Returns the tfds data directory that "" stands for, or the one given."""
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(chosen).expanduser()


def _builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Opens the folder of a data set, whatever code has prepared it."""
    dataset, _, version = name.partition(":")
    folder = root(data_dir) / dataset
    if dataset == "digits" and version in ("", str(digits.Digits.VERSION)):
        version_folder = digits.prepare(root(data_dir))
    else:
        found = _versions(folder)
        if not found or (version and version not in found):
            missing = f"version {version}" if found else "prepared version"
            raise UserError(
                f"data set {name!r} is not on this machine: no {missing} in "
                f"{folder.absolute()}; to prepare it: {_how_to_prepare(name, data_dir)}"
            )
        version_folder = folder / (version or found[-1])
    builder = tfds.builder_from_directory(version_folder)
    formats = {
        file_format.value for file_format in builder.info.available_file_formats()
    }
    if "array_record" not in formats:
        raise UserError(
            f"data set {name!r} in {version_folder.absolute()} is stored as "
            f"{', '.join(sorted(formats))}, which has no random access; remove it or "
            "choose another data_dir, and prepare it as array_record: "
            f"{_how_to_prepare(name, data_dir)}"
        )
    return builder


def _versions(folder: pathlib.Path) -> list[str]:
    """Lists the complete versions in a data set's folder, the newest last."""
    if not folder.is_dir():
        return []
    found = [
        child.name
        for child in folder.iterdir()
        if VERSION.fullmatch(child.name) and (child / "dataset_info.json").is_file()
    ]
    return sorted(found, key=lambda version: [int(part) for part in version.split(".")])


def _how_to_prepare(name: str, data_dir: str) -> str:
    """Returns the command that prepares a data set in this data directory."""
    folder = str(root(data_dir).absolute())
    if name == "cifar100":
        return (
            f"python -m bsce_jax.data.prepare cifar100 --data_dir {shlex.quote(folder)}"
        )
    code = (
        "import tensorflow_datasets as tfds; "
        f"tfds.builder({name!r}, data_dir={folder!r}, file_format='array_record')"
        ".download_and_prepare()"
    )
    return f"pip install 'bsce_jax[prepare]' && python -c {shlex.quote(code)}"
