"""Records in several files: their labels' index, their names, and their faults."""

import http.server
import importlib.util
import json
import multiprocessing
import os
import pathlib
import pickle
import resource
import shlex
import shutil
import threading
import urllib.parse
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from bsce_jax.data import prepare, records, source
from bsce_jax.data.builders import arrays, image_folder, shards
from bsce_jax.errors import UserError

SHARDS, IMAGES = 5, 40


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A data directory with "many": 40 training images of 4 classes in 5 shards."""
    root = tmp_path_factory.mktemp("sharded")
    for split, count in (("train", IMAGES), ("test", 8)):
        for i in range(count):
            noise = np.random.default_rng(i).integers(0, 256, (80, 90, 3), np.uint8)
            path = root / split / "abcd"[i % 4] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(arrays.png(noise).getvalue())
    size = (root / "train" / "a" / "0.png").stat().st_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 8.5 * size)  # 9 images
        image_folder.prepare("many", root / "tfds", root / "train", root / "test")
    shards_found = list((root / "tfds").rglob("many-train*"))
    assert len(shards_found) == SHARDS
    return root / "tfds"


@pytest.fixture
def many(sharded: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy to be damaged."""
    return pathlib.Path(shutil.copytree(sharded, tmp_path / "tfds"))


def version(root: pathlib.Path) -> pathlib.Path:
    return root / "many" / "1.0.0"


def shard(root: pathlib.Path, number: int) -> pathlib.Path:
    return version(root) / f"many-train.array_record-{number:05d}-of-{SHARDS:05d}"


@pytest.mark.parametrize(
    "split", ["train", "test", "train[13:30]", "train[:10%]+test[50%:]"]
)
def test_the_index_says_what_the_records_say(many: pathlib.Path, split: str) -> None:
    pairs, info = source.open_encoded("many", split, str(many))
    expected = [label for _, label in pairs]
    for file in version(many).glob("*array_record*"):
        file.unlink()  # nothing but metadata is left
    found = source.labels("many", split, str(many))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)
    assert info.splits[split].num_examples == len(found)
    assert source.class_names("many", str(many)) == tuple("abcd")
    assert source.channels("many", str(many)) == 3


def test_a_large_data_set_without_an_index_says_how_to_write_it(
    many: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = source.labels("many", "train", str(many))
    for file in version(many).glob("*.npy"):
        file.unlink()
    with pytest.MonkeyPatch.context() as patch:  # small: read as they are
        patch.setattr(records, "write_index", None)
        found = source.labels("many", "train", str(many))
    np.testing.assert_array_equal(found, expected)
    monkeypatch.setattr(source, "LARGEST_SCAN", 1000)
    with pytest.raises(UserError, match="has no label index.* 'train'; ") as caught:
        source.labels("many", "train", str(many))
    command = str(caught.value).partition("to write it once: ")[2]
    words = shlex.split(command)
    assert (
        words[:3] == ["python", "-m", "bsce_jax.data.prepare"] and "\n" not in command
    )
    assert prepare.main(words[3:]) == 0
    assert str(version(many)) in capsys.readouterr().out
    np.testing.assert_array_equal(source.labels("many", "train", str(many)), expected)
    assert len(source.labels("many", "test", str(many))) == 8
    assert not list(version(many).glob(".*"))


def _header(shape: str) -> bytes:
    """The beginning of an index that says what it holds."""
    text = f"{{'descr': '<i4', 'fortran_order': False, {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        np.zeros(IMAGES - 1, np.int32),
        np.zeros((IMAGES, 1), np.int32),
        np.zeros(IMAGES, np.int64),
        np.full(IMAGES, 4, np.int32),
        np.full(IMAGES, -2, np.int32),
        np.array([None] * IMAGES),
        b"",
        b"not an array",
        _header("'shape': (100000000000000,)"),
        _header("'shape': (1000000, 1000000)"),
        _header("'shape': " + "(" * 5000),
        _header("'shape': (40,)"),  # and no labels
    ],
    ids=[
        *("short", "shape", "type", "class", "below", "object", "empty", "text"),
        *("huge", "square", "deep", "cut"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    many: pathlib.Path, content: np.ndarray | bytes
) -> None:
    path = version(many) / "labels-train.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(
        UserError, match=f"label index {path} does not fit .* 40 images"
    ):
        source.labels("many", "train[:5]", str(many))
    assert len(source.labels("many", "test", str(many))) == 8


def test_images_without_a_label_are_refused(many: pathlib.Path) -> None:
    path = version(many) / "labels-train.npy"
    np.save(path, np.load(path) - 1)
    with pytest.raises(UserError, match="'train' of many has images without a label"):
        source.labels("many", "train", str(many))


def test_records_have_names_and_files(many: pathlib.Path) -> None:
    pairs, _ = source.open_encoded("many", "train[3:]", str(many))
    whole, _ = source.open_encoded("many", "train", str(many))
    names = [whole.name(row) for row in range(IMAGES)]
    labels = source.labels("many", "train", str(many))
    assert sorted(names) == sorted(f"{'abcd'[i % 4]}/{i}.png" for i in range(IMAGES))
    assert [name[0] for name in names] == ["abcd"[label] for label in labels]
    assert [pairs.name(row) for row in range(len(pairs))] == names[3:]
    assert whole.name(-1) == names[-1]
    starts = np.cumsum([0, *_lengths(whole)])
    for row in range(len(pairs)):
        number = int(np.searchsorted(starts, row + 3, side="right")) - 1
        assert pairs.shard(row) == str(shard(many, number))
    nameless = records.Encoded(
        source.open_encoded("many", "train[3:]", str(many))[1]
        .splits["train[3:]"]
        .file_instructions,
        "image",
        "label",
    )
    assert nameless.name(0) == f"record 3 of {shard(many, 0)}"
    second = int(starts[1]) - 3
    assert nameless.name(second) == f"record 0 of {shard(many, 1)}"


def _lengths(pairs: source.Encoded) -> list[int]:
    files = [pairs.shard(row) for row in range(len(pairs))]
    return [files.count(file) for file in sorted(set(files))]


def test_positions_are_those_of_a_sequence(sharded: pathlib.Path) -> None:
    pairs, _ = source.open_encoded("many", "train", str(sharded))
    assert pairs[-1] == pairs[IMAGES - 1] and pairs[np.int64(2)] == pairs[2]
    for beyond in (IMAGES, -IMAGES - 1):
        with pytest.raises(IndexError):
            pairs[beyond]
    assert len(list(pairs)) == IMAGES
    assert pairs.__getitems__([]) == []
    rows = [39, 0, 17, 0]
    assert pairs.__getitems__(rows) == [pairs[row] for row in rows]
    with pytest.raises(UserError, match="expected a split of many with images"):
        source.open_encoded("many", "train[8:8]", str(sharded))


def _read_all(pairs: source.Encoded) -> tuple[int, list[tuple[bytes, int]]]:
    return os.getpid(), list(pairs)


def test_other_processes_open_the_files_themselves(sharded: pathlib.Path) -> None:
    pairs, _ = source.open_encoded("many", "train", str(sharded))
    size = len(pickle.dumps(pairs))
    expected = list(pairs)  # opens readers here, which do not travel
    assert len(pickle.dumps(pairs)) == size < 4000 < sum(len(p[0]) for p in expected)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        answers = pool.map(_read_all, [pairs] * 4, chunksize=1)
    assert all(found == expected for _, found in answers)
    assert os.getpid() not in {process for process, _ in answers}


def test_a_missing_shard_is_named_at_the_start(many: pathlib.Path) -> None:
    shard(many, 3).unlink()
    for opened in (source.open_split, source.open_encoded):
        with pytest.raises(UserError, match=f"^shard {shard(many, 3)} is missing"):
            opened("many", "train", str(many))
    source.open_encoded("many", "train[:8]", str(many))  # needs the first only


@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.5, 0.9999])
def test_a_shard_cut_short_is_named_at_the_start(
    many: pathlib.Path, kept: float
) -> None:
    path = shard(many, 2)
    os.truncate(path, int(kept * path.stat().st_size))
    with pytest.raises(UserError, match=f"^shard {path} is damaged or cut") as caught:
        source.open_encoded("many", "train", str(many))
    assert "\n" not in str(caught.value)


def test_a_shard_of_another_preparation_is_named(many: pathlib.Path) -> None:
    test = next(version(many).glob("many-test*"))
    shutil.copy(shard(many, 0), test)
    with pytest.raises(UserError, match=f"shard {test} has 9 records, 8 are expected"):
        source.open_encoded("many", "test", str(many))


def test_what_happens_to_a_shard_later_is_named_too(many: pathlib.Path) -> None:
    """Cut while it is open, damaged in its middle, removed before its first record."""
    pairs, _ = source.open_encoded("many", "train", str(many))
    first = np.cumsum([0, *_lengths(pairs)])
    pairs = pickle.loads(pickle.dumps(pairs))  # none is open
    whole = list(range(IMAGES))

    pairs[int(first[1])]
    os.truncate(shard(many, 1), shard(many, 1).stat().st_size // 2)
    last = int(first[2]) - 1
    for read in (lambda: pairs[last], lambda: pairs.__getitems__(whole[: last + 1])):
        with pytest.raises(UserError, match=f"{shard(many, 1)} is empty: .* cut short"):
            read()
    assert pairs.name(last) == f"record {last - first[1]} of {shard(many, 1)}"

    content = bytearray(shard(many, 2).read_bytes())
    middle = content.index(b"IDAT", len(content) // 8)
    content[middle : middle + 2000] = bytes(2000)
    shard(many, 2).write_bytes(content)
    rows = range(int(first[2]), int(first[3]))
    damaged = f"^shard {shard(many, 2)} is damaged or cut short: Corrupted"
    with pytest.raises(UserError, match=damaged):
        pairs.__getitems__(rows)
    with pytest.raises(UserError, match=damaged):
        for row in rows:
            pairs[row]

    shard(many, 3).unlink()
    with pytest.raises(UserError, match=f"^shard {shard(many, 3)} is missing"):
        pairs[int(first[3])]
    assert len(pairs.__getitems__(range(int(first[1])))) == first[1]  # the others


def test_more_shards_than_files_may_be_open(tmp_path: pathlib.Path) -> None:
    for i in range(70):
        path = tmp_path / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), i).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 1)
        image_folder.prepare("thin", tmp_path, tmp_path / "train", test_fraction=0.1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/proc/self/fd")) + 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        pairs, _ = source.open_encoded("thin", "train", str(tmp_path))
        assert len({pairs.shard(row) for row in range(len(pairs))}) > 40
        assert len(pairs.__getitems__(range(len(pairs)))) == len(pairs) > 40
        pairs = pickle.loads(pickle.dumps(pairs))  # closes them
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# A bucket, on a server of this machine that answers as Google's does.


@pytest.fixture
def bucket(sharded: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """gs://..., which is the folder `sharded`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urllib.parse.urlparse(self.path)
            query = urllib.parse.parse_qs(url.query)
            name = urllib.parse.unquote(url.path.partition("/b/bucket/o")[2])[1:]
            path = sharded / name
            if not name:
                answer = listing(query["prefix"][0] if "prefix" in query else "")
                self.answer(200, json.dumps(answer).encode())
            elif not path.is_file():
                self.answer(404, b'{"error": {"code": 404, "message": "No object"}}')
            elif query.get("alt") != ["media"]:
                self.answer(200, json.dumps(entry(name)).encode())
            else:
                content = path.read_bytes()
                start, end = 0, len(content)
                if given := self.headers.get("Range"):
                    first, last = given.removeprefix("bytes=").split("-")
                    start = int(first) if first else end - int(last)
                    end = min(end, int(last) + 1) if first and last else end
                self.answer(206 if given else 200, content[start:end], len(content))

        def answer(self, status: int, body: bytes, whole: int = 0) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.send_header("x-goog-generation", "1")
            if status == 206:
                end = f"{whole - len(body)}-{whole - 1}/{whole}"
                self.send_header("Content-Range", f"bytes {end}")
            self.end_headers()
            try:
                self.wfile.write(body)
            except OSError:
                pass  # array_record reads what it needs and hangs up

        def log_message(self, *arguments: object) -> None:
            pass

    def entry(name: str) -> dict[str, str]:
        size = str((sharded / name).stat().st_size)
        return {"kind": "storage#object", "name": name, "size": size, "bucket": "b"}

    def listing(prefix: str) -> dict[str, object]:
        found = [str(p.relative_to(sharded)) for p in sharded.rglob("*") if p.is_file()]
        below = [name for name in found if name.startswith(prefix)]
        here = [name for name in below if "/" not in name[len(prefix) :]]
        inner = {prefix + name[len(prefix) :].partition("/")[0] + "/" for name in below}
        inner -= {f"{name}/" for name in here}
        return {"items": [entry(name) for name in here], "prefixes": sorted(inner)}

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for variable in ("CLOUD_STORAGE_EMULATOR_ENDPOINT", "STORAGE_EMULATOR_HOST"):
            monkeypatch.setenv(variable, f"http://127.0.0.1:{server.server_port}")
        yield "gs://bucket"
        server.shutdown()


def test_records_in_a_bucket_are_read(bucket: str, sharded: pathlib.Path) -> None:
    local, info = source.open_encoded("many", "train", str(sharded))
    files = [
        file.replace(filename=file.filename.replace(str(sharded), bucket))
        for file in info.splits["train"].file_instructions
    ]
    remote = records.Encoded(files, "image", "label", "file_name")
    rows = [0, 13, IMAGES - 1]
    assert remote.__getitems__(rows) == local.__getitems__(rows)
    assert remote.name(13) == local.name(13)


@pytest.mark.skipif(not importlib.util.find_spec("gcsfs"), reason="gcsfs is optional")
@pytest.mark.filterwarnings("default")
def test_a_data_set_in_a_bucket_is_read(bucket: str, sharded: pathlib.Path) -> None:
    remote, _ = source.open_encoded("many", "train", bucket)
    local, _ = source.open_encoded("many", "train", str(sharded))
    assert remote[5] == local[5]
    assert source.class_names("many", bucket) == tuple("abcd")
    np.testing.assert_array_equal(
        source.labels("many", "train[3:20]", bucket),
        source.labels("many", "train[3:20]", str(sharded)),
    )
    with pytest.raises(UserError, match="prepare it in a local folder and copy that"):
        source.open_encoded("other", "train", bucket)


@pytest.mark.skipif(bool(importlib.util.find_spec("gcsfs")), reason="gcsfs is there")
def test_a_bucket_without_its_client_is_one_line() -> None:
    with pytest.raises(UserError, match="gs://bucket/many cannot be read: .*gcsfs"):
        source.class_names("many", "gs://bucket")


def test_nothing_is_prepared_in_a_bucket(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(["digits", "--data_dir", "gs://bucket/data"]) == 2
    said = capsys.readouterr().err
    assert "data_dir='gs://bucket/data': data sets are read from there but not" in said
