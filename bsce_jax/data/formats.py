"""Pixels of encoded images: the one place that reads JPEG, PNG and the other formats.

Only what is asked for of a JPEG is decoded: at 1/2, 1/4 or 1/8 of its size (libjpeg's
scaled inverse DCT), and no rows below a box. All else (PNG, WebP, ...) is decoded whole
with Pillow. Pixels are as they are stored: EXIF orientation and colour profiles are
ignored, as PyTorch and tfds do.
"""

import contextlib
import io
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image

# A pool of threads in every decoding process would only compete with the others, and
# OpenCV's does not survive a fork.
cv2.setNumThreads(1)

MAX_PIXELS = 2**28 * 2 // 3  # a larger image is refused; about Pillow's limit
FORMATS = ("BMP", "GIF", "PNG", "PPM", "TIFF", "WEBP")  # beside JPEG
JPEG = b"\xff\xd8"  # its first bytes
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


class Plan(NamedTuple):
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


Choice = Callable[[int, int, int], Plan]  # of a height, a width and the largest scale


def read(encoded: bytes, choose: Choice, channels: int) -> tuple[np.ndarray, Plan]:
    """Decodes the box of an image that choose(height, width, largest scale) says.

    Args:
      encoded: a JPEG, or one of `FORMATS`.
      choose: makes the plan.
      channels: 1, 3 or 4 (with transparency), of which no more are decoded than needed.

    Returns:
      uint8 [h, w, Ch] of the plan's box, and the plan. Ch may be 1 of a gray image and
      3 of a JPEG in colours, whatever is wanted.

    Raises:
      DecodeError: the bytes are truncated, damaged, or no image.
    """
    decode = _jpeg if encoded.startswith(JPEG) else _other
    return decode(encoded, choose, channels)


def check_header(encoded: bytes) -> None:
    """Reads no pixels.

    Raises:
      DecodeError: `read` would refuse the image for what stands before its pixels.
    """
    if encoded.startswith(JPEG):
        _frame(encoded)
    else:
        _opened(encoded)


def _jpeg(encoded: bytes, choose: Choice, channels: int) -> tuple[np.ndarray, Plan]:
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
    pixels = inside(pixels, box)
    return (_rgb_of_cmyk(pixels) if pixels.shape[2] == 4 else pixels), plan


def _jpeg_with_odd_header(encoded: bytes, scale: int, gray: bool) -> np.ndarray:
    """Decodes with Pillow what simplejpeg refuses, and shrinks; uint8 [h, w, Ch]."""
    image = _loaded(_opened(encoded, ("JPEG",))).convert("L" if gray else "RGB")
    shape = -(-image.width // scale), -(-image.height // scale)
    pixels = cv2.resize(np.asarray(image), shape, interpolation=cv2.INTER_AREA)
    return pixels[..., None] if gray else pixels


def inside(pixels: np.ndarray, box: Box) -> np.ndarray:
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


def _other(encoded: bytes, choose: Choice, channels: int) -> tuple[np.ndarray, Plan]:
    """Decodes the box that is chosen of another image; uint8 [h, w, 1, 3 or 4]."""
    image = _loaded(_opened(encoded))
    plan = choose(image.height, image.width, 1)
    if image.mode.startswith("I;16"):
        pixels = (inside(np.asarray(image), plan.box) >> 8).astype(np.uint8)
        return pixels[..., None], plan
    if channels == 4:
        mode = "RGBA"
    else:
        image.info.pop("transparency", None)  # Pillow would warn that it is dropped
        gray = channels == 1 or image.mode in ("1", "L", "LA", "La")
        mode = "L" if gray else "RGB"
    pixels = inside(np.array(image.convert(mode)), plan.box)
    return (pixels[..., None] if mode == "L" else pixels), plan


def _opened(encoded: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Reads the header of an image with Pillow."""
    try:
        with _no_warnings():
            image = Image.open(io.BytesIO(encoded), formats=formats)
    except Image.UnidentifiedImageError as error:
        raise DecodeError("not an image of a known format") from error
    except Image.DecompressionBombError as error:
        raise DecodeError(f"too large: {error}") from error
    # Whatever a damaged file leads the readers of Pillow to.
    except Exception as error:
        raise DecodeError(f"damaged image: {error}") from error
    if image.mode in ("I", "F"):
        raise DecodeError("its pixels have 32 bits: 8 or 16 are needed")
    return image


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Drops Python's warnings, for one thread at a time."""
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _loaded(image: Image.Image) -> Image.Image:
    """Reads the pixels of an image and all that stands behind them."""
    # Only the reader of TIFF warns here; the others decode in several threads at once.
    quiet = _no_warnings() if image.format == "TIFF" else contextlib.nullcontext()
    try:
        with quiet:
            image.load()
    except Exception as error:  # as above
        raise DecodeError(f"damaged image: {error}") from error
    return image
