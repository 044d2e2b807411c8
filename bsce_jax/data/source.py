"""Data sets as random-access tfds sources: found on disk, never in a network.

A source is a sequence of records in the order in which they lie on disk; a training
set or a memory is an array of indices into it. Folders must be in array_record
format. TensorFlow is not imported.
"""

import hashlib
import os
import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from bsce_jax.data import metadata, records
from bsce_jax.data.builders import digits
from bsce_jax.data.records import CHUNK as CHUNK
from bsce_jax.data.records import Encoded as Encoded
from bsce_jax.data.records import feature_names as feature_names
from bsce_jax.errors import UserError

VERSION = re.compile(r"\d+\.\d+\.\d+")
LARGEST_SCAN = 1e9  # bytes of records that are read for their labels without an index


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
        ~/tensorflow_datasets. A bucket, gs://BUCKET/..., is read where gcsfs is
        installed.

    Returns:
      the source, a dict of decoded feature values per record, and its metadata.

    Raises:
      UserError: no such data set, split or format on disk, which says how to prepare
        it; or a shard that is missing or cut short, which names it.
    """
    builder = _builder(name, data_dir)
    _check_split(builder.info, name, split)
    records.check_shards(builder.info, split)
    source = builder.as_data_source(split, file_format="array_record")
    return source, builder.info


def open_encoded(
    name: str, split: str, data_dir: str = ""
) -> tuple[Encoded, tfds.core.DatasetInfo]:
    """Opens one split as pairs of an encoded image and a label; see `open_split`."""
    info = _builder(name, data_dir).info
    _check_split(info, name, split)
    records.check_shards(info, split)
    return records.open_encoded(info, split), info


def split_error(name: str, split: str, data_dir: str = "") -> str:
    """What is expected in the place of a split; "" where it exists.

    Raises:
      UserError: no such data set.
    """
    return _split_error(_builder(name, data_dir).info, name, split)


def shared_images(name: str, one: str, other: str, data_dir: str = "") -> int:
    """The number of images that are in both of two splits, or parts of them.

    Raises:
      UserError: no such data set or split.
    """
    info = _builder(name, data_dir).info
    for split in (one, other):
        _check_split(info, name, split)
    return records.shared_images(info, one, other)


def _split_error(info: tfds.core.DatasetInfo, name: str, split: str) -> str:
    try:
        images = info.splits[split].num_examples
    except (KeyError, ValueError, AssertionError, TypeError):
        return f"a split of {name}, or a part of one: {', '.join(info.splits)}"
    return "" if images > 0 else f"a split of {name} with images"


def _check_split(info: tfds.core.DatasetInfo, name: str, split: str) -> None:
    if wrong := _split_error(info, name, split):
        raise UserError(f"split {split!r}: expected {wrong}")


def class_names(name: str, data_dir: str = "") -> tuple[str, ...]:
    """Returns the name of each class, "0", "1", ... where the data set has none."""
    info = _builder(name, data_dir).info
    return tuple(info.features[feature_names(info)[1]].names)


def channels(name: str, data_dir: str = "") -> int:
    """Returns the channels of the images as the metadata has them; reads none."""
    info = _builder(name, data_dir).info
    found = info.features[feature_names(info)[0]].shape[-1]
    if found is None:
        raise UserError(f"metadata in {info.data_dir} are damaged: no channels")
    return int(found)


def labels(name: str, split: str, data_dir: str = "") -> np.ndarray:
    """Returns the labels, int32 [N], in the order of the source; decodes no image.

    They come from the label index, or from the records of a small split without one.

    Raises:
      UserError: as for `open_split`; a large split has no label index, which says how
        to write it; images without a label.
    """
    info = _builder(name, data_dir).info
    _check_split(info, name, split)
    found = records.indexed_labels(info, split)
    if found is None:
        size = records.size(info, split)
        if size >= LARGEST_SCAN:
            raise UserError(
                f"{name} has no label index in {info.data_dir}, and {size / 1e9:.0f} "
                f"GB of images are too many to look for the labels of {split!r}; to "
                f"write it once: {_command(['index', name], data_dir)}"
            )
        pairs, _ = open_encoded(name, split, data_dir)
        found = records.scan_labels(pairs, f"{name} labels")
    if len(found) and found.min() < 0:
        raise UserError(f"split {split!r} of {name} has images without a label")
    return found


def digest(name: str, split: str, data_dir: str, labels: np.ndarray) -> str:
    """Identifies a split without reading its images, hexadecimal.

    By its labels in the order on disk, and by what its metadata says of the number and
    the bytes of all records of the data set.

    Args:
      name, split, data_dir: as in `open_split`.
      labels: of the split, see `labels`.
    """
    info = _builder(name, data_dir).info
    sizes = [
        (whole, info.splits[whole].num_examples, info.splits[whole].num_bytes)
        for whole in sorted(info.splits)
    ]
    found = hashlib.sha256(repr((split, sizes)).encode())
    found.update(np.ascontiguousarray(labels, "<i4").tobytes())
    return found.hexdigest()


def write_indexes(name: str, data_dir: str = "") -> str:
    """Writes the label index of every split of a prepared data set; reads all of it.

    Returns:
      the folder of the data set's version.

    Raises:
      UserError: as for `open_split`; an index cannot be written.
    """
    info = _builder(name, data_dir).info
    for split in info.splits:
        records.check_shards(info, split)
    try:
        records.write_indexes(info)
    except OSError as error:
        raise UserError(f"label index of {name} cannot be written: {error}") from error
    return os.fspath(info.data_dir)


def root(data_dir: str = "") -> pathlib.Path:
    """Returns the tfds data directory that "" stands for, or the one given.

    Raises:
      UserError: it is a bucket, into which nothing is prepared.
    """
    chosen = _data_dir(data_dir)
    if "://" in chosen:
        raise UserError(
            f"data_dir={chosen!r}: data sets are read from there but not prepared; "
            "prepare in a local folder and copy it"
        )
    return pathlib.Path(chosen).expanduser()


def _data_dir(data_dir: str) -> str:
    return data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"


def _builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Opens the folder of a data set, whatever code has prepared it."""
    dataset, _, version = name.partition(":")
    local = "://" not in _data_dir(data_dir)
    folder = epath.Path(root(data_dir) if local else _data_dir(data_dir)) / dataset
    if local and dataset == "digits" and version in ("", str(digits.Digits.VERSION)):
        version_folder = epath.Path(digits.prepare(root(data_dir)))
    else:
        found = _versions(folder)
        if not found or (version and version not in found):
            missing = f"version {version}" if found else "prepared version"
            where = folder.absolute() if local else folder
            raise UserError(
                f"data set {name!r} is not on this machine: no {missing} in {where}; "
                f"to prepare it: {_how_to_prepare(name, data_dir)}"
            )
        version_folder = folder / (version or found[-1])
    builder = metadata.open_version(version_folder)
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
    if builder.info.file_format.value != "array_record":
        return metadata.open_version(version_folder, "array_record")
    return builder


def _versions(folder: epath.Path) -> list[str]:
    """Lists the complete versions in a data set's folder, the newest last."""
    try:
        children = list(folder.iterdir()) if folder.is_dir() else []
        found = [
            child.name
            for child in children
            if VERSION.fullmatch(child.name) and (child / metadata.INFO).is_file()
        ]
    except ImportError as error:  # what etils says where a bucket's client is missing
        raise UserError(f"{folder} cannot be read: {error}") from error
    return sorted(found, key=lambda version: [int(part) for part in version.split(".")])


def _how_to_prepare(name: str, data_dir: str) -> str:
    """Returns the command that prepares a data set in this data directory."""
    if "://" in _data_dir(data_dir):
        return "prepare it in a local folder and copy that"
    if name == "cifar100":
        return _command(["cifar100"], data_dir)
    dataset = re.split("[/:]", name)[0]
    known = tfds.list_builders(with_community_datasets=False)
    if dataset == "imagenet2012" or dataset not in known:
        folders = ["--train", "FOLDER", "--test", "FOLDER"]
        return _command(["image_folder", "--name", dataset, *folders], data_dir)
    folder = str(root(data_dir).absolute())
    code = (
        "import tensorflow_datasets as tfds; "
        f"tfds.builder({name!r}, data_dir={folder!r}, file_format='array_record')"
        ".download_and_prepare()"
    )
    return f"pip install 'bsce_jax[prepare]' && python -c {shlex.quote(code)}"


def _command(words: Sequence[str], data_dir: str) -> str:
    """Returns a command of bsce_jax.data.prepare for this data directory."""
    chosen = _data_dir(data_dir)
    folder = chosen if "://" in chosen else str(root(data_dir).absolute())
    words = [*words, "--data_dir", folder]
    return f"python -m bsce_jax.data.prepare {shlex.join(words)}"
