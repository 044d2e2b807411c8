"""CIFAR-100 for tfds from the official binary archive, without TensorFlow."""

import functools
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.image_classification import cifar

from bsce_jax.data.builders import arrays
from bsce_jax.errors import UserError

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
FOLDER = "cifar-100-binary/"
PIXELS = 3 * 32 * 32
LABELS = ("coarse_label", "label")  # one byte each, ahead of an image's pixels
NAMES = {"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"}
FILES = ("train.bin", "test.bin", *NAMES.values())
LARGEST = 50_000 * (len(LABELS) + PIXELS)  # bytes of train.bin


class Images(NamedTuple):
    """One split: images uint8 [N, 32, 32, 3], labels name -> uint8 [N]."""

    images: np.ndarray
    labels: dict[str, np.ndarray]


class Archive(NamedTuple):
    """What the archive holds: splits by name, class names by label feature."""

    splits: dict[str, Images]
    names: dict[str, list[str]]


class Cifar100(cifar.Cifar100, skip_registration=True):  # type: ignore[call-arg]
    """The stock builder of tfds, with another reader of the same archive.

    Name, version, features, ids and keys are the stock ones, so a folder that either
    has prepared serves both. The archive is read as raw bytes: the pickled "python"
    edition of CIFAR-100 would run code on loading.
    """

    name = "cifar100"

    def __init__(self, *, archive: str | pathlib.Path, **options: Any) -> None:
        """Takes the path of the archive and the options of any tfds builder."""
        self._archive = pathlib.Path(archive)
        super().__init__(**options)

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # the archive is here already
        content = read_archive(self._archive)
        for label, names in content.names.items():
            self.info.features[label].names = names
        return {
            split: self._generate_examples(split, data)
            for split, data in content.splits.items()
        }

    def _generate_examples(  # type: ignore[override]
        self, split: str, data: Images
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        return arrays.examples(split, data.images, data.labels)


def read_archive(path: pathlib.Path) -> Archive:
    """Reads the four files that matter, in memory; nothing is unpacked to disk.

    Raises:
      UserError: the archive cannot be read, or a file is missing or malformed.
    """
    content: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = member.name.removeprefix(FOLDER)
                if name in FILES and member.isfile() and member.size <= LARGEST:
                    file = archive.extractfile(member)
                    content[name] = file.read() if file else b""
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"archive {path} cannot be read: {error}") from error
    missing = [name for name in FILES if not content.get(name)]
    if missing:
        raise UserError(
            f"archive {path} has no usable {FOLDER}{missing[0]}: "
            "cifar-100-binary.tar.gz is needed"
        )
    names = {
        label: [line for line in content[file].decode().splitlines() if line]
        for label, file in NAMES.items()
    }
    splits = {s: _parse(content[f"{s}.bin"], path) for s in ("train", "test")}
    return Archive(splits, names)


def _parse(data: bytes, path: pathlib.Path) -> Images:
    """Splits records of two label bytes and 3072 pixels, channel by channel."""
    size = len(LABELS) + PIXELS
    if len(data) % size:
        raise UserError(f"archive {path} is damaged: a record is not {size} bytes long")
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    images = records[:, len(LABELS) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Images(
        np.ascontiguousarray(images),
        {label: records[:, i] for i, label in enumerate(LABELS)},
    )


def official() -> tuple[int, str]:
    """Returns the official archive's size in bytes and SHA-256, as tfds lists them."""
    entry = cifar.Cifar100.url_infos[URL]
    return int(entry.size), str(entry.checksum)


def prepare(root: pathlib.Path, archive: str | pathlib.Path) -> pathlib.Path:
    """Returns the folder of the prepared data set under root; writes it at need."""
    make_builder = functools.partial(Cifar100, archive=archive)
    return arrays.prepare("cifar100", str(Cifar100.VERSION), root, make_builder)
