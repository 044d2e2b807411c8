"""Folders of class folders of small images, for tests."""

import io
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image


def encode(seed: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """A small image of noise."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (9 + seed % 5, 12, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def make(folder: pathlib.Path, classes: dict[str, int], kind: str = "JPEG") -> None:
    """Writes folder/CLASS/0.jpg, ...: as many images of a class as it says."""
    for name, count in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            seed = sum(name.encode()) * 100 + i
            (folder / name / f"{i}.{kind.lower()}").write_bytes(encode(seed, kind))


def scene(*files: str) -> Callable[[pathlib.Path], None]:
    def write(folder: pathlib.Path) -> None:
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(encode(1))

    return write
