"""The metadata of a prepared data set: files that somebody else may have written."""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from bsce_jax import untrusted
from bsce_jax.errors import UserError

INFO = "dataset_info.json"
MOST_CLASSES = 999_999
_FEATURES = "features.json"
_CLASS = ("pythonClassName", "python_class_name", "type")  # keys; the last in old files
_COUNT = ("numClasses", "num_classes")
_TRUSTED = "tensorflow_datasets."


def open_version(
    folder: epath.Path, file_format: str | None = None
) -> tfds.core.DatasetBuilder:
    """Opens the folder of a version of a data set.

    tfds imports the modules of the features that its metadata name: only its own here.

    Raises:
      UserError: a file of metadata is missing, damaged, or names another module.
    """
    untrusted.read_json(folder / INFO, "the metadata of a data set")
    _check_features(folder / _FEATURES)
    try:
        builder = tfds.builder_from_directory(folder, file_format=file_format)
        builder.info.available_file_formats()
        for split in builder.info.splits.values():
            if split.num_examples:
                _ = split.file_instructions
    except Exception as error:  # whatever damaged metadata lead tfds to
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"metadata in {folder} are damaged: {reason}") from None
    return builder


def is_prepared(folder: pathlib.Path) -> bool:
    """Whether a local folder is a version of a data set.

    Raises:
      UserError: it is there but is none.
      OSError: no such path can be.
    """
    if (folder / INFO).is_file():
        return True
    if folder.exists():
        raise UserError(f"{folder} is there without a {INFO}: remove it")
    return False


def _check_features(path: epath.Path) -> None:
    """Refuses what tfds would import or make room for before it looks at it."""
    for part in _objects(untrusted.read_json(path, "the features of a data set")):
        for key in _CLASS:
            name = part.get(key)
            if isinstance(name, str) and not name.startswith(_TRUSTED):
                raise UserError(
                    f"{path} names {name[:200]!r}: expected a class of "
                    f"{_TRUSTED[:-1]}, no other code is imported"
                )
        for key in _COUNT:
            count = str(part.get(key, 0))
            if len(count) > len(str(MOST_CLASSES)):
                raise UserError(
                    f"{path} has {key}={count[:200]!r}: expected {MOST_CLASSES} or less"
                )


def _objects(features: Any) -> Iterator[dict[str, Any]]:
    """All objects in JSON, also in texts that are JSON themselves."""
    left = [features]
    while left:
        value = left.pop()
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            with contextlib.suppress(ValueError, RecursionError):  # nor reads tfds it
                left.append(json.loads(value))
        elif isinstance(value, list):
            left.extend(value)
        elif isinstance(value, dict):
            left.extend(value.values())
            yield value
