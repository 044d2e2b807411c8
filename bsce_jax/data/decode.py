"""Encoded images to uint8 arrays: whole, or crops of one size.

Streamed and resident images, the check of files that are prepared and the prediction of
new ones all decode here, with the readers of formats.py: a file is the same image, or
none, for all of them. Transparency is dropped unless four channels are asked for.

A crop's resize is antialiased where it shrinks, bilinear where it enlarges, within
about one grey level of Pillow's bilinear resize of the whole image; of a JPEG only what
the crop needs is decoded, at the least size that leaves the crop as large as wanted.
"""

import math

import cv2
import numpy as np
from PIL import Image

from bsce_jax.data import formats
from bsce_jax.data.formats import Box as Box
from bsce_jax.data.formats import DecodeError as DecodeError
from bsce_jax.data.formats import Plan
from bsce_jax.data.formats import check_header as check_header

ASPECT = (3 / 4, 4 / 3)  # width over height of a training crop
TRIES = 10
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name of a number of channels


def whole(encoded: bytes, channels: int) -> np.ndarray:
    """Decodes all of an image.

    Args:
      encoded: a JPEG, or one of `formats.FORMATS`.
      channels: 1, gray; 3, RGB; or 4, with transparency (255 where there is none).

    Returns:
      uint8 [H, W, channels], contiguous. 16 bits become their high byte.

    Raises:
      DecodeError: the bytes are truncated, damaged, or no image.
    """

    def choose(height: int, width: int, largest: int) -> Plan:
        return Plan(1, Box(0, 0, height, width), (height, width), (0, 0))

    # Of a JPEG in colours the decoder would give its luma, which is not quite "L".
    wanted = 3 if encoded.startswith(formats.JPEG) else channels
    pixels, _ = formats.read(encoded, choose, wanted)
    if pixels.shape[2] != channels:
        pixels = np.asarray(_pillow(pixels).convert(MODES[channels]))
    return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], channels))


def averaged(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes uint8 [h, w, Ch] to [height, width, Ch] by Pillow's box filter."""
    if pixels.shape[:2] == (height, width):
        return pixels
    image = _pillow(pixels).resize((width, height), Image.Resampling.BOX)
    return np.asarray(image).reshape(height, width, pixels.shape[2])


def _pillow(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def train_crop(
    encoded: bytes,
    size: int,
    rng: np.random.Generator,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    channels: int = 3,
) -> np.ndarray:
    """Decodes a random rectangle of an image and resizes it to a square.

    Where it is decoded at less than its size, the rectangle's edges are rounded to
    the pixels that are decoded.

    Args:
      encoded: as in `whole`.
      size: height and width of the result.
      rng: decides the rectangle, see `sample_box`.
      area: least and largest share of the image's area.
      channels: 3, RGB (a gray-scale image is repeated), or 1, gray.

    Returns:
      uint8 [size, size, channels].

    Raises:
      DecodeError: the bytes are truncated, damaged, or no image.
    """

    def choose(height: int, width: int, largest: int) -> Plan:
        box = sample_box(height, width, rng, area)
        scale = _scale(min(box.height, box.width), size, largest)
        top, bottom = round(box.top / scale), round((box.top + box.height) / scale)
        left, right = round(box.left / scale), round((box.left + box.width) / scale)
        box = Box(top, left, bottom - top, right - left)
        return Plan(scale, box, (size, size), (0, 0))

    return _crop(encoded, choose, size, channels)


def test_crop(
    encoded: bytes, size: int, *, resize: int = 0, channels: int = 3
) -> np.ndarray:
    """Decodes the centre of an image: its shorter side resized, a square cut out.

    As torchvision's Resize and CenterCrop. Where nothing needs to be resized the
    pixels are those of the file.

    Args:
      encoded, size, channels: as in `train_crop`.
      resize: length that the shorter side is resized to, at least size; 0: size. -1
        makes the square of all of the image, whatever its shape.

    Returns:
      uint8 [size, size, channels].

    Raises:
      DecodeError: as in `train_crop`.
      ValueError: resize is less than size.
    """
    shorter = resize or size
    if shorter < size and resize != -1:
        raise ValueError(f"resize: {resize} is not allowed, {size} (size) or more is")

    def choose(height: int, width: int, largest: int) -> Plan:
        scale = _scale(min(height, width), max(shorter, size), largest)
        if resize == -1:
            return Plan(scale, Box(0, 0, height, width), (size, size), (0, 0))
        sides = []
        for side in (height, width):
            resized = shorter * side // min(height, width)
            start = round((resized - size) / 2)
            sides.append(_aligned(side / scale, resized, start, start + size))
        (top, rows, height, y), (left, columns, width, x) = sides
        return Plan(scale, Box(top, left, rows, columns), (height, width), (y, x))

    return _crop(encoded, choose, size, channels)


test_crop.__test__ = False  # type: ignore[attr-defined]  # not one of pytest's


def sample_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    area: tuple[float, float] = (0.08, 1.0),
) -> Box:
    """Draws the rectangle of a training crop (Szegedy et al. 2015; as torchvision).

    The share of the image's area is uniform in `area`, the logarithm of width over
    height uniform between those of 3/4 and 4/3; if ten draws do not fit into the
    image, the largest central rectangle of an allowed aspect ratio is taken.

    Args:
      height, width: of the image, at least 1.
      rng: the only source of randomness.
      area: least and largest share, 0 < least <= largest <= 1.
    """
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    for _ in range(TRIES):
        pixels = height * width * (area[0] + (area[1] - area[0]) * rng.random())
        ratio = math.exp(low + (high - low) * rng.random())
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(height - h + 1))
            return Box(top, int(rng.integers(width - w + 1)), h, w)
    h = min(height, round(width / ASPECT[0]))
    w = min(width, round(height * ASPECT[1]))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def _scale(shorter: int, size: int, largest: int) -> int:
    """Returns the largest of 1, 2, 4, 8 that leaves the shorter side no less than size.

    It is at most `largest`.
    """
    scale = 1
    while scale < largest and shorter >= 2 * scale * size:
        scale *= 2
    return scale


def _aligned(
    side: float, resized: int, start: int, stop: int
) -> tuple[int, int, int, int]:
    """Finds whole pixels to decode for the pixels [start, stop) of a resized side.

    Both ends are moved outwards, past the pixels that the resize looks at, to where
    the borders of pixels before and after it (nearly) meet: nothing is shifted, and
    little is decoded in vain.

    Args:
      side: length before the resize, in decoded pixels.
      resized: length after it.
      start, stop: 0 <= start < stop <= resized.

    Returns:
      (first pixel, pixels) before the resize; pixels after it, and start among them.
    """
    step = side / resized
    margin = math.ceil(1 / step)
    reach = 8 + margin

    def gap(at: int) -> float:
        return abs(at * step - round(at * step))

    low, high = max(start - margin, 0), min(stop + margin, resized)
    first = min(range(low, max(low - reach, 0) - 1, -1), key=gap)
    last = min(range(high, min(high + reach, resized) + 1), key=gap)
    begin, end = round(first * step), round(last * step)
    return begin, max(end - begin, 1), last - first, start - first


def _crop(
    encoded: bytes, choose: formats.Choice, size: int, channels: int
) -> np.ndarray:
    """Decodes, resizes and cuts out what choose(height, width, largest scale) says."""
    if channels not in (1, 3):
        raise ValueError(f"channels: {channels} is not allowed, 1 and 3 are")
    pixels, plan = formats.read(encoded, choose, channels)
    if math.prod(plan.shape) > formats.MAX_PIXELS:
        raise DecodeError("too large: {}x{} pixels once resized".format(*plan.shape))
    pixels = _resize(pixels, *plan.shape)
    top, left = plan.corner
    return _channels(pixels[top : top + size, left : left + size], channels)


def _resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes uint8 [h, w, Ch] to [height, width, Ch]."""
    rows, columns, depth = pixels.shape
    if (rows, columns) == (height, width):
        return pixels
    if rows > height or columns > width:
        # Means of 2x2 points, each interpolated between pixels no more than half as
        # far apart as those of the result: as smooth as a triangle filter, twice as
        # fast as OpenCV's means over areas of any size.
        if rows > 2 * height or columns > 2 * width:
            shrunk = min(columns, 2 * width), min(rows, 2 * height)
            pixels = cv2.resize(pixels, shrunk, interpolation=cv2.INTER_AREA)
        double = 2 * width, 2 * height
        pixels = cv2.resize(pixels, double, interpolation=cv2.INTER_LINEAR)
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    else:
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    return pixels.reshape(height, width, depth)  # OpenCV drops an axis of 1


def _channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Repeats gray or weighs colours if need be; contiguous [h, w, channels]."""
    if pixels.shape[2] == channels:
        return np.ascontiguousarray(pixels)
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    return cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY)[..., None]
