"""What the builders share: PNG records of arrays, and writing all or nothing."""

import contextlib
import io
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from bsce_jax import terminal
from bsce_jax.data import metadata, records
from bsce_jax.errors import UserError


def png(image: np.ndarray) -> io.BytesIO:
    """Encodes a uint8 [H, W, Ch] image (1, 3 or 4 channels) as an open PNG file.

    tfds encodes arrays with TensorFlow, but stores the bytes of an open file as
    they are: this is what makes a builder run without TensorFlow.
    """
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    file.seek(0)
    return file


def examples(
    split: str, images: np.ndarray, labels: Mapping[str, np.ndarray]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (key, example) of uint8 [N, H, W, Ch] images and their [N] labels.

    The keys 0 to N-1 and the ids "train_00000" to ... are those of the stock CIFAR
    builders: tfds orders the records on disk by a hash of the key. Shows a progress
    bar when stderr is a terminal.
    """
    shown = terminal.shows_bars()
    numbers = tqdm(range(len(images)), desc=split, unit=" images", disable=not shown)
    for i in numbers:
        values = {name: int(column[i]) for name, column in labels.items()}
        yield i, {"id": f"{split}_{i:05d}", "image": png(images[i]), **values}


def prepare(
    name: str, version: str, root: pathlib.Path, make_builder: Callable[..., Any]
) -> pathlib.Path:
    """Writes ROOT/NAME/VERSION with a tfds builder and returns that folder.

    With the records comes their label index; see `publish` for the rest.

    Args:
      name: the data set's name, the builder's `name`.
      version: the builder's version.
      root: tfds data directory; made if it is missing.
      make_builder: called with `data_dir` and `file_format`.

    Raises:
      UserError: the folder cannot be written, or the images have no classes.
    """

    def write(scratch: pathlib.Path) -> pathlib.Path:
        tfds.disable_progress_bar()  # `examples` shows its own, on terminals only
        builder = make_builder(data_dir=scratch, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # tfds prints banners
            builder.download_and_prepare()
        records.write_indexes(builder.info)
        return pathlib.Path(builder.data_dir)

    return publish(name, version, root, write)


def publish(
    name: str,
    version: str,
    root: pathlib.Path,
    write: Callable[[pathlib.Path], pathlib.Path],
) -> pathlib.Path:
    """Writes ROOT/NAME/VERSION and returns that folder.

    The folder appears complete or not at all. Of several processes that prepare the
    same data set at once the first wins and the others use its folder. Does nothing
    where the folder exists.

    Args:
      name, version: of the data set.
      root: tfds data directory; made if it is missing.
      write: called with a new folder under root; returns the folder to be published
        in it.

    Raises:
      UserError: the folder cannot be written, or is there and no data set.
    """
    folder = root / name / version
    if metadata.is_prepared(folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as scratch:
            written = write(pathlib.Path(scratch))
            folder.parent.mkdir(exist_ok=True)
            os.rename(written, folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster
            raise UserError(f"cannot write {name} to {folder}: {error}") from error
    return folder
