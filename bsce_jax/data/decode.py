"""Encoded images to uint8 crops of one size: what the decoding processes run.

Only what a crop needs of a JPEG is decoded: at 1/2, 1/4 or 1/8 of its size where the
crop stays as large as it is wanted (libjpeg's scaled inverse DCT), and no rows below
the crop. All else (PNG, WebP, ...) is decoded whole with Pillow. Pixels are as they
are stored: EXIF orientation and colour profiles are ignored, as PyTorch and tfds do,
and transparency is dropped.

A resize is antialiased where it shrinks, bilinear where it enlarges, within about one
grey level of Pillow's bilinear resize of the whole image.
"""

import io
import math
import threading
import warnings
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image

# A pool of threads in every decoding process would only compete with the others, and
# OpenCV's does not survive a fork.
cv2.setNumThreads(1)

ASPECT = (3 / 4, 4 / 3)  # width over height of a training crop
TRIES = 10
MAX_PIXELS = 2**28 * 2 // 3  # a larger image is refused; about Pillow's limit
FORMATS = ("BMP", "GIF", "PNG", "PPM", "TIFF", "WEBP")  # beside JPEG
# Rows decoded below the crop, so that its last ones have their neighbours' colours.
MARGIN = 16
# Complaint of libjpeg, once all is decoded, where rows were cut off, and of files with
# bytes of no meaning before their end.
LEFT_OVER = "extraneous bytes before marker 0xd9"
# Complaints about segments that pixels do not depend on; nothing is decoded then.
ODD_HEADERS = "unknown JFIF revision", "Unknown Adobe color", "bad ICC marker"
_WARNINGS = threading.Lock()  # `warnings.catch_warnings` is not safe among threads


class DecodeError(ValueError):
    """The bytes are not a whole image; the message is a short reason."""


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class _Plan(NamedTuple):
    """What is made of an image: a box of it is resized and a square is cut out.

    `box` counts pixels of the image decoded at 1/scale of its size; it is resized to
    (height, width) `shape`, and the square begins there at (top, left) `corner`.
    """

    scale: int
    box: Box
    shape: tuple[int, int]
    corner: tuple[int, int]


class _Frame(NamedTuple):
    """What the header of a JPEG says."""

    at: int  # offset of the height in the file
    height: int
    width: int
    components: int
    # All rows follow one another, without restart markers: the last can be cut off.
    one_scan: bool


Choice = Callable[[int, int, int], _Plan]  # of a height, a width and the largest scale


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
      encoded: a JPEG, or one of `FORMATS`.
      size: height and width of the result.
      rng: decides the rectangle, see `sample_box`.
      area: least and largest share of the image's area.
      channels: 3, RGB (a gray-scale image is repeated), or 1, gray.

    Returns:
      uint8 [size, size, channels].

    Raises:
      DecodeError: the bytes are truncated, damaged, or no image.
    """

    def choose(height: int, width: int, largest: int) -> _Plan:
        box = sample_box(height, width, rng, area)
        scale = _scale(min(box.height, box.width), size, largest)
        top, bottom = round(box.top / scale), round((box.top + box.height) / scale)
        left, right = round(box.left / scale), round((box.left + box.width) / scale)
        box = Box(top, left, bottom - top, right - left)
        return _Plan(scale, box, (size, size), (0, 0))

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

    def choose(height: int, width: int, largest: int) -> _Plan:
        scale = _scale(min(height, width), max(shorter, size), largest)
        if resize == -1:
            return _Plan(scale, Box(0, 0, height, width), (size, size), (0, 0))
        sides = []
        for side in (height, width):
            resized = shorter * side // min(height, width)
            start = round((resized - size) / 2)
            sides.append(_aligned(side / scale, resized, start, start + size))
        (top, rows, height, y), (left, columns, width, x) = sides
        return _Plan(scale, Box(top, left, rows, columns), (height, width), (y, x))

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


def _crop(encoded: bytes, choose: Choice, size: int, channels: int) -> np.ndarray:
    """Decodes, resizes and cuts out what choose(height, width, largest scale) says."""
    if channels not in (1, 3):
        raise ValueError(f"channels: {channels} is not allowed, 1 and 3 are")
    decode = _jpeg if encoded.startswith(b"\xff\xd8") else _other
    pixels, plan = decode(encoded, choose, channels)
    pixels = _resize(pixels, *plan.shape)
    top, left = plan.corner
    return _channels(pixels[top : top + size, left : left + size], channels)


def _jpeg(encoded: bytes, choose: Choice, channels: int) -> tuple[np.ndarray, _Plan]:
    """Decodes the box that is chosen of a JPEG; uint8 [h, w, 1 or 3]."""
    frame = _frame(encoded)
    # The decoder would not miss it where it needs only the first rows.
    if encoded.rfind(b"\xff\xd9", frame.at) < 0:
        raise DecodeError("truncated JPEG: it has no end marker")
    plan = choose(frame.height, frame.width, 8)
    box, scale = plan.box, plan.scale
    rows = min(frame.height, (box.top + box.height) * scale + MARGIN)
    if rows < frame.height and frame.one_scan:
        at = frame.at
        cut = b"".join((encoded[:at], rows.to_bytes(2, "big"), encoded[at + 2 :]))
    else:
        cut, rows = encoded, frame.height
    space, depth = "RGB", 3
    if frame.components == 4:
        space, depth = "CMYK", 4
    elif frame.components == 1 or channels == 1:
        space, depth = "GRAY", 1
    pixels = np.empty((-(-rows // scale), -(-frame.width // scale), depth), np.uint8)
    try:
        simplejpeg.decode_jpeg(
            cut,
            space,
            min_height=pixels.shape[0],
            min_width=pixels.shape[1],
            min_factor=scale,
            buffer=pixels,
        )
    except ValueError as error:
        reason = str(error)  # libjpeg's first complaint
        if any(odd in reason for odd in ODD_HEADERS):
            pixels = _jpeg_with_odd_header(encoded, scale, gray=depth == 1)
        elif LEFT_OVER not in reason:
            raise DecodeError(f"damaged JPEG: {reason}") from error
    pixels = _inside(pixels, box)
    return (_rgb_of_cmyk(pixels) if pixels.shape[2] == 4 else pixels), plan


def _jpeg_with_odd_header(encoded: bytes, scale: int, gray: bool) -> np.ndarray:
    """Decodes with Pillow what simplejpeg refuses, and shrinks; uint8 [h, w, Ch]."""
    image = _opened(encoded, ("JPEG",)).convert("L" if gray else "RGB")
    shape = -(-image.width // scale), -(-image.height // scale)
    pixels = cv2.resize(np.asarray(image), shape, interpolation=cv2.INTER_AREA)
    return pixels[..., None] if gray else pixels


def _inside(pixels: np.ndarray, box: Box) -> np.ndarray:
    """Returns the box of [h, w, ...]."""
    rows = slice(box.top, box.top + box.height)
    return pixels[rows, box.left : box.left + box.width]


def _frame(encoded: bytes) -> _Frame:
    """Reads the segments of a JPEG up to its first scan."""
    at, frame, restarts = 2, None, False
    try:
        while True:
            if encoded[at] != 0xFF:
                raise DecodeError("damaged JPEG: no marker where one must be")
            marker = encoded[at + 1]
            if marker == 0xFF:  # padding
                at += 1
                continue
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                height, width = _uint16(encoded, at + 5), _uint16(encoded, at + 7)
                sequential = marker in (0xC0, 0xC1)
                frame = _Frame(at + 5, height, width, encoded[at + 9], sequential)
            elif marker == 0xDD:
                restarts = _uint16(encoded, at + 4) > 0
            elif marker == 0xDA:
                break
            at += 2 + _uint16(encoded, at + 2)
        scanned = encoded[at + 4]
    except IndexError as error:
        raise DecodeError("truncated JPEG: its header is not whole") from error
    if frame is None or 0 in frame[1:4] or frame.components not in (1, 3, 4):
        raise DecodeError("damaged JPEG: its header has no size or number of colours")
    if frame.height * frame.width > MAX_PIXELS:
        raise DecodeError(f"too large: {frame.height}x{frame.width} pixels")
    one_scan = frame.one_scan and not restarts and scanned == frame.components
    return frame._replace(one_scan=one_scan)


def _uint16(encoded: bytes, at: int) -> int:
    return encoded[at] << 8 | encoded[at + 1]


def _rgb_of_cmyk(pixels: np.ndarray) -> np.ndarray:
    """Converts [h, w, 4], stored inverted as all programs store it, to [h, w, 3]."""
    colours, black = pixels[..., :3].astype(np.uint16), pixels[..., 3:]
    return ((colours * black + 127) // 255).astype(np.uint8)


def _other(encoded: bytes, choose: Choice, channels: int) -> tuple[np.ndarray, _Plan]:
    """Decodes the box that is chosen of another image; uint8 [h, w, 1 or 3]."""
    image = _opened(encoded)
    plan = choose(image.height, image.width, 1)
    if image.mode.startswith("I;16"):
        pixels = (_inside(np.asarray(image), plan.box) >> 8).astype(np.uint8)
        return pixels[..., None], plan
    if image.mode in ("I", "F"):
        raise DecodeError("its pixels have 32 bits: 8 or 16 are needed")
    image.info.pop("transparency", None)  # Pillow would warn that it is dropped
    gray = channels == 1 or image.mode in ("1", "L", "LA", "La")
    pixels = _inside(np.array(image.convert("L" if gray else "RGB")), plan.box)
    return (pixels[..., None] if gray else pixels), plan


def _opened(encoded: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Reads a whole image with Pillow."""
    try:
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(encoded), formats=formats)
        image.load()
    except Image.UnidentifiedImageError as error:
        raise DecodeError("not an image of a known format") from error
    # Whatever a damaged file leads the readers of Pillow to.
    except Exception as error:
        raise DecodeError(f"damaged image: {error}") from error
    return image


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
