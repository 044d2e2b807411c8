"""A small data set (CIFAR-100, digits) whole in memory, and choices of its images."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from bsce_jax import terminal
from bsce_jax.data import decode, pieces, source
from bsce_jax.errors import UserError, field_error

# Pillow decodes without the interpreter lock, but around a very small image threads
# only fight for it: measured, two are slower than one for 32x32 PNG (2 kB), as fast
# for 64x64 JPEG (3 kB) and faster for all that is larger.
BYTES_WORTH_A_THREAD = 4096
CHUNKS_WORTH_A_PROCESS = 4  # which takes half a second to start


class Arrays(NamedTuple):
    """One split: images uint8 [N, H, W, Ch], labels int32 [N], in the disk's order.

    `digest` is that of the encoded images and labels in this order, hexadecimal.
    """

    images: np.ndarray
    labels: np.ndarray
    digest: str


def load(
    name: str, split: str, data_dir: str = "", image_size: int = 0, processes: int = 1
) -> Arrays:
    """Reads and decodes a whole split.

    Args:
      name, split, data_dir: as in `source.open_split`.
      image_size: height and width that the images are averaged down to (Pillow's
        box filter); 0 keeps them as they are.
      processes: that decode very small images, where there are many; see
        `pieces.decoder`.

    Raises:
      UserError: the split is not there, is empty or unlabelled, its images are not
        uint8 or differ in size, or image_size is negative or larger than they are.
    """
    if image_size < 0:
        raise field_error("data.image_size", image_size, "0 or more")
    pairs, info = source.open_encoded(name, split, data_dir)
    if not pairs:
        raise UserError(f"split {split!r} of {name} is empty")
    channels = _channels(info)
    encoded, _ = pairs[0]
    first = _checked(pairs, 0, name, pieces.decoded(encoded, channels, image_size))
    images = np.empty((len(pairs), *first.shape), np.uint8)
    labels = np.empty(len(pairs), np.int32)
    digests: dict[int, bytes] = {}  # of each piece, by its first row

    def read(rows: range, decode: pieces.Decoder) -> int:
        read_bytes, found = hashlib.sha256(), pairs.__getitems__(rows)
        for row, (encoded, label) in zip(rows, found, strict=True):
            read_bytes.update(b"%d %d " % (label, len(encoded)))
            read_bytes.update(encoded)
            labels[row] = label
        parts = decode([encoded for encoded, _ in found], channels, image_size)
        for row, part in zip(rows, parts, strict=True):
            images[row] = _checked(pairs, row, name, part, first.shape)
        digests[rows.start] = read_bytes.digest()
        return len(rows)

    threads, chunks = os.cpu_count() or 1, _chunks(len(pairs))
    if len(encoded) < BYTES_WORTH_A_THREAD:
        threads = processes = min(processes, len(chunks) // CHUNKS_WORTH_A_PROCESS or 1)
    else:
        processes = 1
    with pieces.decoder(processes) as decode:
        _run(lambda rows: read(rows, decode), chunks, threads, f"{name} {split}")
    if labels.min() < 0:
        raise UserError(f"split {split!r} of {name} has images without a label")
    whole = hashlib.sha256(b"".join(digests[first] for first in sorted(digests)))
    return Arrays(images, labels, whole.hexdigest())


def _checked(
    pairs: Any,
    row: int,
    name: str,
    image: np.ndarray | str,
    shape: tuple[int, ...] = (),
) -> np.ndarray:
    """The image of a row, of a shape, if one is given.

    Raises:
      UserError: it is none, but a reason, or of another shape.
    """
    if isinstance(image, str):
        raise UserError(f"image {pairs.name(row)} of {name} cannot be decoded: {image}")
    if shape and image.shape != shape:
        raise UserError(
            f"images of {name} differ in size ({shape[:2]} and {image.shape[:2]}): "
            "set config.data.image_size"
        )
    return image


def _channels(info: Any) -> int:
    """Returns the number of channels of a data set's images."""
    feature = info.features[source.feature_names(info)[0]]
    channels = feature.shape[-1]
    if feature.np_dtype != np.uint8 or channels not in decode.MODES:
        raise UserError(
            f"images of {info.name} are {np.dtype(feature.np_dtype)} with {channels} "
            "channels: uint8 with 1, 3 or 4 is needed"
        )
    return channels


def _chunks(count: int) -> list[range]:
    """Cuts range(count) into pieces of `source.CHUNK`."""
    starts = range(0, count, source.CHUNK)
    return [range(i, min(i + source.CHUNK, count)) for i in starts]


def _run(
    read: Callable[[range], int], chunks: Sequence[range], threads: int, title: str
) -> None:
    """Calls read, which returns a number of images, on every chunk, in threads."""
    total = chunks[-1].stop
    shown = terminal.shows_bars()
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=total, desc=title, unit=" images", disable=not shown) as bar,
    ):
        try:
            for count in pool.map(read, chunks):
                bar.update(count)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # do not read on after an error
            raise


def subset(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Returns the indices of the first images of each class, ascending, int64.

    Args:
      labels: [N] int.
      per_class: images to keep of each class, all of a class that has fewer; 0 keeps
        every image.

    Raises:
      UserError: per_class is negative.
    """
    if per_class < 0:
        raise UserError(f"per_class: {per_class} is not allowed, 0 (all) or more is")
    if per_class == 0:
        return np.arange(len(labels))
    rows = _rows_by_class(labels)
    return np.sort(np.concatenate([own[:per_class] for own in rows.values()]))


def hold_out(
    labels: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits images in two, the same fraction of every class, at random.

    A class's share depends on the seed, the class and its size, on nothing else.

    Args:
      labels: [N] int, none negative.
      fraction: share held out, at least 0 and less than 1; rounded per class, but
        never to none or all of a class's images unless it is 0.
      seed: not negative.

    Returns:
      (training, validation): ascending int64 indices.

    Raises:
      UserError: fraction is out of range, or a class is too small to be split.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"validation_fraction: {fraction} is not allowed, [0, 1) is")
    held = np.zeros(len(labels), bool)
    if fraction:
        for label, rows in _rows_by_class(labels).items():
            if len(rows) < 2:
                raise UserError(
                    f"validation_fraction: class {label} has a single image and "
                    "cannot be split"
                )
            count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
            order = np.random.default_rng([seed, label]).permutation(len(rows))
            held[rows[order[:count]]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _rows_by_class(labels: np.ndarray) -> dict[int, np.ndarray]:
    """Returns class -> ascending indices of its images."""
    order = np.argsort(labels, kind="stable")
    values, starts = np.unique(labels[order], return_index=True)
    return {
        int(value): rows
        for value, rows in zip(values, np.split(order, starts[1:]), strict=True)
    }
