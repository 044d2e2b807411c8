"""A file is the same image, or none, whatever reads it.

Resident and streamed data, the check of files that are prepared, and prediction.
"""

import io
import itertools
import pathlib
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bsce_jax import predict
from bsce_jax.data import batches, decode, resident, source, streaming
from bsce_jax.data.builders import image_folder
from bsce_jax.errors import UserError
from tests import datasets

SIDE = 24
PIXELS = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
DEEP = np.linspace(0, 65535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)


def encode(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + check


def with_chunk(png: bytes, chunk: bytes, after: bool) -> bytes:
    """Puts a chunk of a PNG before its pixels or behind them."""
    at = len(png) - 12 if after else 33
    return png[:at] + chunk + png[at:]


def bomb(png: bytes) -> bytes:
    """A PNG whose header claims 60,000 x 60,000 pixels."""
    header = chunk(b"IHDR", struct.pack(">II", 60000, 60000) + png[24:29])
    return png[:8] + header + png[33:]


JPEG, PNG = encode(PIXELS, "JPEG"), encode(PIXELS, "PNG")
LONG_TEXT = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 21)))
DAMAGED = {
    "half a JPEG": JPEG[: len(JPEG) // 2],
    "half a JPEG and an end marker": JPEG[: len(JPEG) // 2] + b"\xff\xd9",
    "no end marker": JPEG[:-2],
    "half a PNG and its end": PNG[: len(PNG) // 2] + PNG[-12:],
    "text before pixels": with_chunk(PNG, LONG_TEXT, after=False),
    "text behind pixels": with_chunk(PNG, LONG_TEXT, after=True),
    "a method that PNG has not": with_chunk(
        PNG, chunk(b"zTXt", b"Comment\0\7x"), after=True
    ),
    "a bomb": bomb(PNG),
    "a large header": bomb(PNG).replace(b"\0\0\xea\x60" * 2, b"\0\0\x27\x10" * 2),
    "words": b"<html>404</html>",
    "nothing": b"",
}
SOUND = {
    "JPEG": JPEG,
    "PNG": PNG,
    "gray JPEG": encode(PIXELS[..., 0], "JPEG"),
    "gray PNG": encode(PIXELS[..., 0], "PNG"),
    "16 bits": encode(DEEP, "PNG"),
    "palette": encode(Image.fromarray(PIXELS).quantize(60), "PNG"),
    "short text": with_chunk(PNG, chunk(b"tEXt", b"Comment\0x"), after=True),
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, int]]:
    """A data set of all these files: its folder, and the row of each on disk."""
    folder = str(tmp_path_factory.mktemp("mixed"))
    files = [*SOUND.values(), *DAMAGED.values()]
    datasets.write(folder, "mixed", {"train": (files, [0] * len(files))})
    pairs, _ = source.open_encoded("mixed", "train", folder)
    numbers = [int(pairs.name(row).rpartition("_")[2]) for row in range(len(pairs))]
    names = [*SOUND, *DAMAGED]
    return folder, {names[number]: row for row, number in enumerate(numbers)}


def resident_image(folder: str, row: int) -> np.ndarray:
    arrays = resident.load("mixed", f"train[{row}:{row + 1}]", folder)
    return arrays.images[0]


@pytest.fixture(scope="module")
def streamed(mixed: tuple[str, dict[str, int]]) -> dict[str, np.ndarray]:
    """The images that streaming does not take for missing."""
    folder, rows = mixed
    pairs, _ = source.open_encoded("mixed", "train", folder)
    every, zeros = np.arange(len(pairs)), np.zeros(len(pairs), np.int32)
    reader = streaming.Reader(pairs, every, zeros, (SIDE, SIDE, 3), 0, None)
    plan = batches.InOrder(every, len(pairs))
    (batch,) = streaming.read(reader, plan, every, workers=0, skip=True)
    return {name: batch["images"][i] for name, i in rows.items() if batch["valid"][i]}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_file_is_one_image(mixed, streamed, tmp_path, name):
    folder, rows = mixed
    expected = streamed[name]
    np.testing.assert_array_equal(resident_image(folder, rows[name]), expected)
    path = tmp_path / "image"
    path.write_bytes(SOUND[name])
    for resize in (-1, 0):
        found = predict.read_image(str(path), (SIDE, SIDE, 3), resize)
        np.testing.assert_array_equal(found, expected)
    for check in (False, True):
        assert image_folder.problem(SOUND[name], check) == ""


def test_sixteen_bits_are_their_high_byte(streamed):
    expected = np.repeat((DEEP >> 8).astype(np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(streamed["16 bits"], expected)
    alpha = decode.whole(SOUND["16 bits"], 4)
    np.testing.assert_array_equal(alpha[..., :3], expected)
    assert (alpha[..., 3] == 255).all()


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_none(mixed, streamed, tmp_path, name):
    """And a line that names it; no warning either, which is an error in tests."""
    folder, rows = mixed
    assert name not in streamed
    number = len(SOUND) + list(DAMAGED).index(name)
    path = tmp_path / "image"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(UserError, match=f"image train_{number:05d} of mixed ") as one:
        resident_image(folder, rows[name])
    with pytest.raises(UserError, match=f"image '{path}' cannot be read: ") as other:
        predict.read_image(str(path), (SIDE, SIDE, 3))
    assert "\n" not in f"{one.value}{other.value}"
    for check in (False, True):
        assert image_folder.problem(DAMAGED[name], check)


def test_damage_between_the_ends_of_a_jpeg_is_looked_for_on_demand():
    """The one damage that the quick check of prepared files lets pass."""
    broken = JPEG[:-300] + JPEG[-2:]
    assert image_folder.problem(broken) == ""
    assert image_folder.problem(broken, whole=True).startswith("damaged JPEG")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_ordinary_images_are_pillow_s(height, width, seed):
    """Bit for bit, in every mode and number of channels, also when averaged down."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    sources = [("JPEG", mode) for mode in ("RGB", "L")]
    sources += [("PNG", mode) for mode in ("RGB", "L", "RGBA", "LA", "P", "1")]
    for (kind, mode), channels in itertools.product(sources, (1, 3, 4)):
        encoded = encode(Image.fromarray(pixels).convert(mode), kind)
        image = Image.open(io.BytesIO(encoded)).convert(decode.MODES[channels])
        found = decode.whole(encoded, channels)
        assert found.shape == (height, width, channels)
        np.testing.assert_array_equal(found.squeeze(), np.squeeze(image))
        side = min(height, width)
        small = image.resize((side, side), Image.Resampling.BOX)
        averaged = decode.averaged(found, side, side)
        np.testing.assert_array_equal(averaged.squeeze(), np.squeeze(small))


def test_a_resize_without_bounds_is_refused():
    with pytest.raises(decode.DecodeError, match="too large: .* pixels once resized"):
        decode.test_crop(JPEG, SIDE, resize=10_000_000)


def test_metadata_that_pillow_warns_of_are_no_warning():
    exif = Image.Exif()
    exif[0x010E] = "words " * 20
    tiff = encode(PIXELS, "TIFF", exif=exif)
    at = tiff.index(struct.pack("<HH", 0x010E, 2)) + 4
    broken = tiff[:at] + struct.pack("<I", 1 << 30) + tiff[at + 4 :]
    np.testing.assert_array_equal(decode.whole(broken, 3), PIXELS)


def test_a_missing_file_is_named(tmp_path: pathlib.Path):
    with pytest.raises(UserError, match=r"image '.*/gone.png' cannot be read: .*No su"):
        predict.read_image(str(tmp_path / "gone.png"), (SIDE, SIDE, 3))
