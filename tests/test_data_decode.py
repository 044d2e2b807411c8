"""Crops of encoded images against Pillow, box statistics, odd and damaged files."""

import io
import math
import pathlib
import pickle
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bsce_jax.data import decode, formats

SIZE = 48
SHRINK = (400 / 150, 0, 0, 0, 400 / 150, 0)  # bilinear, of the two nearest pixels
AFFINE = Image.Transform.AFFINE, SHRINK, Image.Resampling.BILINEAR
BILINEAR = Image.Resampling.BILINEAR


def scene(height: int, width: int, seed: int = 0, grain: int = 24) -> np.ndarray:
    """A smooth coloured image with edges, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(2, height // grain), max(2, width // grain), 3))
    image = Image.fromarray(small.astype(np.uint8)).resize((width, height), BILINEAR)
    pixels = np.array(image)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 20, 120)
    return pixels


def encode(pixels: np.ndarray, kind: str = "JPEG", mode: str = "", **options) -> bytes:
    image = Image.fromarray(pixels)
    if mode:
        image = image.convert(mode, dither=Image.Dither.NONE)
    if kind == "JPEG":
        options = {"quality": 95} | options
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def oracle_train(encoded: bytes, size: int, rng: np.random.Generator) -> np.ndarray:
    """Pillow: the whole image, the sampled box, an antialiased bilinear resize.

    The edges of the box of a JPEG are rounded to the pixels of the scaled image.
    """
    image = Image.open(io.BytesIO(encoded))
    box = decode.sample_box(image.height, image.width, rng)
    shrink = min(box.height, box.width) // size if image.format == "JPEG" else 1
    scale = max(d for d in (1, 2, 4, 8) if d <= max(shrink, 1))
    ends = box.left, box.top, box.left + box.width, box.top + box.height
    corners = [round(end / scale) * scale for end in ends]
    corners = np.minimum(corners, image.size * 2).tolist()
    image = image.convert("RGB")
    return np.asarray(image.crop(corners).resize((size, size), BILINEAR))


def oracle_test(encoded: bytes, size: int, resize: int) -> np.ndarray:
    """torchvision's Resize(resize) and CenterCrop(size), with Pillow."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    width, height = image.size
    if width <= height:
        shape = resize, int(resize * height / width)
    else:
        shape = int(resize * width / height), resize
    image = image.resize(shape, BILINEAR)
    left, top = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference in grey levels."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def oracle_box(height: int, width: int, rng: np.random.Generator, area) -> tuple:
    """The same draws with arrays, float64, and torchvision's fall-back."""
    for _ in range(10):
        share, log_ratio = rng.random(), rng.random()
        share = np.float64(area[0]) + np.float64(area[1] - area[0]) * share
        ratio = (3 / 4) ** (1 - log_ratio) * (4 / 3) ** log_ratio
        w = int(np.rint(np.sqrt(height * width * share * ratio)))
        h = int(np.rint(np.sqrt(height * width * share / ratio)))
        if 0 < w <= width and 0 < h <= height:
            top = rng.integers(0, height - h + 1)
            return int(top), int(rng.integers(0, width - w + 1)), h, w
    if width / height < 3 / 4:
        h, w = round(width / (3 / 4)), width
    elif width / height > 4 / 3:
        h, w = height, round(height * (4 / 3))
    else:
        h, w = height, width
    return (height - h) // 2, (width - w) // 2, h, w


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(0, 2**32),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted).map(tuple),
)
def test_box_equals_the_oracle(height, width, seed, area):
    box = decode.sample_box(height, width, np.random.default_rng(seed), area)
    assert box == oracle_box(height, width, np.random.default_rng(seed), area)
    assert box.height >= 1 and 0 <= box.top <= height - box.height
    assert box.width >= 1 and 0 <= box.left <= width - box.width


def test_box_distribution():
    """Shares and log-ratios are uniform, positions too, where nothing is refused."""
    rng, side = np.random.default_rng(0), 1000
    boxes = [decode.sample_box(side, side, rng, (0.1, 0.5)) for _ in range(4000)]
    top, left, height, width = np.array(boxes).T
    shares = (height * width / side**2 - 0.1) / 0.4
    ratios = np.log(width / height) / math.log(4 / 3) / 2 + 0.5
    for values in (
        shares,
        ratios,
        (top + rng.random(4000)) / (side - height + 1),
        (left + rng.random(4000)) / (side - width + 1),
    ):
        # Kolmogorov-Smirnov: 1.95 / sqrt(N) is exceeded once in 1,000 times.
        values = np.sort(values)
        gap = np.abs(values - (np.arange(4000) + 0.5) / 4000).max()
        assert gap < 1.95 / math.sqrt(4000)
    assert abs(np.corrcoef(shares, ratios)[0, 1]) < 0.06


def test_box_may_be_the_whole_image():
    rng = np.random.default_rng(0)
    boxes = {decode.sample_box(300, 300, rng, (1.0, 1.0)) for _ in range(20)}
    assert boxes == {decode.Box(0, 0, 300, 300)}


def test_box_falls_back_to_the_centre():
    rng = np.random.default_rng(0)
    assert decode.sample_box(1000, 30, rng, (0.9, 1.0)) == (480, 0, 40, 30)
    assert decode.sample_box(30, 1000, rng, (0.9, 1.0)) == (0, 480, 30, 40)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("shape", [(211, 307), (97, 64), (60, 500), (48, 48), (40, 30)])
def test_crops_are_pillows(shape, subsampling):
    encoded = encode(scene(*shape), subsampling=subsampling)
    distances = []
    for seed in range(20):
        ours = decode.train_crop(encoded, SIZE, np.random.default_rng(seed))
        theirs = oracle_train(encoded, SIZE, np.random.default_rng(seed))
        distances.append(distance(ours, theirs))
    assert np.mean(distances) < 1.5 and max(distances) < 4
    for resize in (48, 55, 64):
        ours = decode.test_crop(encoded, SIZE, resize=resize)
        assert distance(ours, oracle_test(encoded, SIZE, resize)) < 3


@pytest.mark.parametrize("shape", [(210, 230), (420, 420), (1700, 1600)])
def test_scaled_decoding_keeps_the_crop_large_enough(shape, monkeypatch):
    """Decoded at 1/4 or 1/8, the least libjpeg has, and never below the target."""
    encoded, plans = encode(scene(*shape, grain=120)), []
    inside = formats.inside
    monkeypatch.setattr(
        formats, "inside", lambda *args: plans.append(args) or inside(*args)
    )
    pixels = decode.test_crop(encoded, SIZE, resize=50)
    ((decoded, box),) = plans
    scale = {210: 4, 420: 8, 1700: 8}[shape[0]]
    assert decoded.shape[1] == math.ceil(shape[1] / scale)
    assert min(box.height, box.width) >= SIZE
    assert distance(pixels, oracle_test(encoded, SIZE, 50)) < 2


def test_rows_below_the_crop_are_left_out():
    """Bit for bit what decoding all rows gives, with every kind of chroma."""
    pixels = scene(400, 100)
    for subsampling in (0, 1, 2):
        encoded = encode(pixels, subsampling=subsampling)
        whole = np.asarray(Image.open(io.BytesIO(encoded)))
        for seed in range(30):
            box = decode.sample_box(400, 100, np.random.default_rng(seed), (0.1, 0.3))
            plan = formats.Plan(1, box, (box.height, box.width), (0, 0))
            ours, _ = formats._jpeg(encoded, lambda *_, plan=plan: plan, 3)
            np.testing.assert_array_equal(ours, formats.inside(whole, box))


def test_pixels_of_the_right_size_are_unchanged():
    pixels = scene(SIZE, SIZE)
    for kind in ("PNG", "JPEG"):
        encoded = encode(pixels, kind)
        stored = np.asarray(Image.open(io.BytesIO(encoded)))
        for resize in (0, SIZE):
            ours = decode.test_crop(encoded, SIZE, resize=resize)
            np.testing.assert_array_equal(ours, stored)
            assert ours.flags.c_contiguous and ours.flags.writeable
    wide = scene(SIZE, SIZE + 7)
    ours = decode.test_crop(encode(wide, "PNG"), SIZE)
    np.testing.assert_array_equal(ours, wide[:, 4 : 4 + SIZE])


def test_train_crop_of_the_whole_image_and_determinism():
    encoded = encode(scene(SIZE, SIZE), "PNG")
    whole = decode.train_crop(encoded, SIZE, np.random.default_rng(0), area=(1, 1))
    np.testing.assert_array_equal(whole, scene(SIZE, SIZE))
    encoded = encode(scene(200, 300))
    one, two = (
        decode.train_crop(encoded, SIZE, np.random.default_rng(3)) for _ in range(2)
    )
    np.testing.assert_array_equal(one, two)
    other = decode.train_crop(encoded, SIZE, np.random.default_rng(4))
    assert not np.array_equal(one, other)


def test_shrinking_is_antialiased():
    """Stripes finer than the result become grey; bilinear alone would keep them."""
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[:, ::2] = 255
    for kind in ("PNG", "JPEG"):
        pixels = decode.test_crop(encode(stripes, kind), 150)
        assert abs(pixels.mean() - 127.5) < 3 and pixels.std() < 30
    alone = Image.fromarray(stripes).transform((150, 150), *AFFINE)
    assert np.asarray(alone).std() > 60


ODD = {
    "gray": lambda p: encode(p, mode="L"),
    "cmyk": lambda p: encode(p, mode="CMYK"),
    "progressive": lambda p: encode(p, progressive=True),
    "restarts": lambda p: encode(p, restart_marker_rows=1),
    "exif": lambda p: encode(p, exif=rotated()),
    "comment": lambda p: encode(p, comment=b"\xff\xd9 not the end"),
    "png": lambda p: encode(p, "PNG"),
    "png palette": lambda p: encode(p, "PNG", mode="P"),
    "png palette and alpha": lambda p: encode(
        p, "PNG", mode="P", transparency=b"\x00\x80"
    ),
    "png rgba": lambda p: encode(p, "PNG", mode="RGBA"),
    "png la": lambda p: encode(p, "PNG", mode="LA"),
    "png 1 bit": lambda p: encode(p, "PNG", mode="1"),
    "png rgb and transparency": lambda p: encode(p, "PNG", transparency=(1, 2, 3)),
    "png gray and transparency": lambda p: encode(p, "PNG", mode="L", transparency=3),
    "webp": lambda p: encode(p, "WEBP", lossless=True),
    "gif": lambda p: encode(p, "GIF"),
    "bmp": lambda p: encode(p, "BMP"),
}


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize("kind", ODD)
def test_odd_files(kind):
    """Each kind decodes to Pillow's RGB (which ignores orientation), without warning.

    Warnings are errors in the tests.
    """
    encoded = ODD[kind](scene(120, 90))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, for what the oracle does
        theirs = oracle_test(encoded, SIZE, 56)
        crop = oracle_train(encoded, SIZE, np.random.default_rng(1))
    assert distance(decode.test_crop(encoded, SIZE, resize=56), theirs) < 1.5
    ours = decode.train_crop(encoded, SIZE, np.random.default_rng(1))
    assert distance(ours, crop) < 1.5
    gray = decode.test_crop(encoded, SIZE, resize=56, channels=1)
    assert gray.shape == (SIZE, SIZE, 1) and gray.flags.c_contiguous
    weighed = np.asarray(Image.fromarray(theirs).convert("L"))[..., None]
    assert distance(gray, weighed) < 2


def test_gray_is_repeated():
    for kind in ("JPEG", "PNG"):
        pixels = decode.test_crop(encode(scene(90, 90), kind, mode="L"), SIZE)
        assert (pixels == pixels[..., :1]).all() and pixels.std() > 10


@pytest.mark.parametrize("transform", [0, 2])
def test_cmyk_of_adobe(transform):
    """Inverted inks (APP14, transform 0) and YCCK (2)."""
    encoded = encode(scene(96, 80), mode="CMYK")
    at = encoded.index(b"Adobe") + 11
    assert encoded[at] == 0
    encoded = encoded[:at] + bytes([transform]) + encoded[at + 1 :]
    ours = decode.test_crop(encoded, SIZE)
    assert distance(ours, oracle_test(encoded, SIZE, SIZE)) < 1.5


def test_sixteen_bits():
    """The high byte of each value, as TensorFlow's and OpenCV's readers take."""
    values = np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
    expected = (values >> 8).astype(np.uint8)
    pixels = decode.test_crop(encode(values, "PNG"), SIZE)
    np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, 2))
    gray = decode.test_crop(encode(values, "PNG"), SIZE, channels=1)
    np.testing.assert_array_equal(gray[..., 0], expected)
    colour = np.repeat(values[..., None], 3, 2)
    pixels = decode.test_crop(png(colour, bits=16, colour_type=2), SIZE)
    np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, 2))


def png(pixels: np.ndarray, bits: int, colour_type: int) -> bytes:
    """A PNG written by hand, for what Pillow cannot write."""
    height, width = pixels.shape[:2]

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    rows = pixels.astype(f">u{bits // 8}").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7000), (9000, 1), (3, 40000), (2, 2)])
def test_extreme_shapes(kind, shape):
    pixels = np.full((*shape, 3), (200, 100, 50), np.uint8)
    encoded = encode(pixels, kind)
    for crop in (
        decode.train_crop(encoded, SIZE, np.random.default_rng(0)),
        decode.test_crop(encoded, SIZE),
        decode.test_crop(encoded, SIZE, resize=60),
    ):
        assert crop.shape == (SIZE, SIZE, 3)
        assert np.abs(crop.astype(int) - (200, 100, 50)).max() <= 4


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 130),
    st.integers(1, 130),
    st.integers(1, 60),
    st.integers(0, 30),
    st.sampled_from(["JPEG", "PNG"]),
)
def test_any_shape_and_size(height, width, size, extra, kind):
    encoded = encode(scene(height, width), kind)
    ours = decode.test_crop(encoded, size, resize=size + extra)
    assert ours.shape == (size, size, 3)
    if size >= 8:
        assert distance(ours, oracle_test(encoded, size, size + extra)) < 6
    crop = decode.train_crop(encoded, size, np.random.default_rng(height))
    assert crop.shape == (size, size, 3) and crop.dtype == np.uint8


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_all_of_an_image_becomes_a_square(kind):
    for height, width in ((150, 70), (70, 150), (12, 400), (9, 9)):
        encoded = encode(scene(height, width), kind)
        found = decode.test_crop(encoded, SIZE, resize=-1)
        expected = Image.open(io.BytesIO(encoded)).resize((SIZE, SIZE), BILINEAR)
        assert distance(found, np.asarray(expected)) < 3
    with pytest.raises(ValueError, match="resize: -2 is not allowed"):
        decode.test_crop(encoded, SIZE, resize=-2)


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "cmyk", "PNG"])
def test_truncated_files_are_refused(kind):
    """At any length, also below the rows that a crop needs."""
    whole = (ODD | {"JPEG": encode, "PNG": lambda p: encode(p, "PNG")})[kind](
        scene(150, 130)
    )
    # A PNG ends with what its pixels do not need: checksums and an end marker.
    end = len(whole) - (30 if kind == "PNG" else 0)
    lengths = 0, 1, 2, 3, 20, 160, 400, 625, end // 2, end - 50, end - 2, end - 1
    for length in lengths:
        for seed in range(3):
            with pytest.raises(decode.DecodeError):
                rng = np.random.default_rng(seed)
                decode.train_crop(whole[:length], SIZE, rng, area=(0.08, 0.2))
        with pytest.raises(decode.DecodeError):
            decode.test_crop(whole[:length], SIZE)


def test_rows_lost_in_the_middle_are_refused():
    """An end marker alone does not make a file whole."""
    encoded = encode(scene(150, 130))
    for share in (0.3, 0.6, 0.9):
        broken = encoded[: int(share * len(encoded))] + b"\xff\xd9"
        with pytest.raises(decode.DecodeError, match="damaged JPEG"):
            decode.test_crop(broken, 130)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"hello",
        bytes(5000),
        b"\xff\xd8",
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8" + b"\xff" * 500,
        b"\xff\xd8" + bytes(range(256)) * 20 + b"\xff\xd9",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"RIFF\x10\0\0\0WEBPVP8 ",
    ],
    ids=repr,
)
def test_garbage_is_refused(garbage):
    with pytest.raises(decode.DecodeError) as caught:
        decode.test_crop(garbage, SIZE)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert 5 < len(message) < 200 and "\n" not in message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_raise_nothing_else(data):
    """Whatever is changed in a file: an image of the right shape, or DecodeError."""
    kind = data.draw(st.sampled_from(["gray", "cmyk", "progressive", "png", "webp"]))
    encoded = bytearray(ODD[kind](scene(60, 50)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(encoded) - 1))
        encoded[at] = data.draw(st.integers(0, 255))
    try:
        crop = decode.test_crop(bytes(encoded), 32)
    except decode.DecodeError:
        return
    assert crop.shape == (32, 32, 3)


@pytest.mark.parametrize("shape", [(100, 100), (333, 501)])
@pytest.mark.parametrize("odd", ["JFIF", "ICC", "Adobe"])
def test_odd_headers_are_no_errors(shape, odd):
    """An unknown JFIF revision or Adobe code, a bad ICC marker: pixels as without."""
    pixels = scene(*shape, grain=90)
    encoded = encode(pixels, icc_profile=b"profile" * 9)
    at = {"JFIF": encoded.index(b"JFIF") + 5, "ICC": encoded.index(b"ICC_P") + 12}
    if odd == "Adobe":
        changed = encoded[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\x09" + encoded[20:]
    else:
        changed = encoded[: at[odd]] + b"\x07" + encoded[at[odd] + 1 :]
    for channels in (1, 3):
        expected = decode.test_crop(encoded, SIZE, channels=channels)
        ours = decode.test_crop(changed, SIZE, channels=channels)
        assert distance(ours, expected) < 4
    for length in (len(changed) - 2, len(changed) // 2):
        with pytest.raises(decode.DecodeError):
            decode.test_crop(changed[:length], SIZE)


def test_bytes_of_no_meaning_are_no_errors():
    encoded = encode(scene(100, 100))
    expected = decode.test_crop(encoded, SIZE)
    trailing, zeros = encoded + b"trailing bytes", encoded[:-2] + bytes(9) + b"\xff\xd9"
    for other in (trailing, zeros):
        np.testing.assert_array_equal(decode.test_crop(other, SIZE), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_header_that_claims_too_much(kind):
    """Refused before any memory is asked for; above Pillow's warning, no warning."""
    if kind == "JPEG":
        encoded = bytearray(encode(scene(40, 40)))
        at = encoded.index(b"\xff\xc0") + 5
        encoded[at : at + 4] = b"\xff\x00\xff\x00"
        encoded = bytes(encoded)
    else:
        encoded = encode(scene(40, 40), "PNG")
        header = b"IHDR" + struct.pack(">II", 60000, 60000) + encoded[24:29]
        encoded = encoded[:12] + header + struct.pack(">I", zlib.crc32(header))
        encoded += bytes(50)
    with pytest.raises(decode.DecodeError):
        decode.test_crop(encoded, SIZE)
    large = encode(np.zeros((10000, 9500), np.uint8), "PNG")
    assert decode.test_crop(large, SIZE).shape == (SIZE, SIZE, 3)


def test_arguments_that_are_not_allowed():
    encoded = encode(scene(60, 60))
    with pytest.raises(ValueError, match="resize: 40 is not allowed"):
        decode.test_crop(encoded, SIZE, resize=40)
    with pytest.raises(ValueError, match="channels: 4 is not allowed"):
        decode.test_crop(encoded, SIZE, channels=4)


def test_threads_give_the_same_pixels():
    files = [kind(scene(140, 150, seed)) for seed, kind in enumerate(ODD.values())] * 3

    def crop(row: int) -> np.ndarray:
        return decode.train_crop(files[row], SIZE, np.random.default_rng(row))

    alone = [crop(row) for row in range(len(files))]
    filters = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        for one, other in zip(alone, pool.map(crop, range(len(files))), strict=True):
            np.testing.assert_array_equal(one, other)
    assert warnings.filters == filters


def test_photographs(shared: pathlib.Path):
    """Real files of ImageNet: near Pillow's crops, in the mean and at worst."""
    files = sorted((shared / "data" / "imagenet_fullres").glob("*.JPEG"))[::3]
    small = sorted((shared / "data" / "imagenet_sample").rglob("*.JPEG"))[::40]
    train, test = [], []
    for row, file in enumerate(files + small):
        encoded = file.read_bytes()
        ours = decode.train_crop(encoded, 224, np.random.default_rng(row))
        theirs = oracle_train(encoded, 224, np.random.default_rng(row))
        train.append(distance(ours, theirs))
        ours = decode.test_crop(encoded, 224, resize=256)
        test.append(distance(ours, oracle_test(encoded, 224, 256)))
    assert np.mean(train) < 1 and max(train) < 5
    assert np.mean(test) < 1 and max(test) < 5
    for file in small:
        pixels = decode.test_crop(file.read_bytes(), 224)
        stored = np.asarray(Image.open(file).convert("RGB"))
        np.testing.assert_array_equal(pixels, stored)
