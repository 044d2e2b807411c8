"""Pieces of a split as arrays, decoded in this process or in others.

Imports little: each of the other processes does so, too.
"""

import concurrent.futures
import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from bsce_jax.data import decode
from bsce_jax.errors import field_error

Decoder = Callable[[Sequence[bytes], int, int], Iterable[np.ndarray | str]]


def decoded(encoded: bytes, channels: int, image_size: int) -> np.ndarray | str:
    """An image, uint8 [H, W, channels], or why it cannot be decoded.

    Args:
      encoded, channels: see `decode.whole`.
      image_size: height and width that it is averaged down to; 0 keeps it.

    Raises:
      UserError: image_size is larger than it is.
    """
    try:
        image = decode.whole(encoded, channels)
    except decode.DecodeError as error:
        return str(error)
    height, width, _ = image.shape
    if image_size > min(height, width):
        raise field_error(
            "data.image_size",
            image_size,
            f"no more than images of {height}x{width} have, which are never enlarged",
        )
    return decode.averaged(image, image_size, image_size) if image_size else image


def _here(
    encoded: Sequence[bytes], channels: int, image_size: int
) -> Iterator[np.ndarray | str]:
    """One after another, as they are asked for: large ones are many bytes."""
    return (decoded(each, channels, image_size) for each in encoded)


def _all(
    encoded: Sequence[bytes], channels: int, image_size: int
) -> list[np.ndarray | str]:
    return list(_here(encoded, channels, image_size))


@contextlib.contextmanager
def decoder(processes: int) -> Iterator[Decoder]:
    """A function of a piece's images, by `decoded` here or in one of some processes.

    The main module of the program must bear being imported by them: it is where it is
    a package's.
    """
    if processes == 1:
        yield _here
        return
    with concurrent.futures.ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("spawn"),  # fork would copy JAX's threads' locks
        signal.signal,
        (signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is this process's
    ) as pool:
        yield lambda *arguments: pool.submit(_all, *arguments).result()
