"""Everything that a run writes, on a real gs:// path: an emulator on this machine."""

import contextlib
import json
import pathlib
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from bsce_jax.checkpoints import store
from bsce_jax.checkpoints.writer import Writer
from bsce_jax.errors import UserError
from bsce_jax.hosts.workdir import open_workdir
from bsce_jax.report import plots, results
from bsce_jax.telemetry.events import Timeline
from tests import runs
from tests.example_page import make_run

# TensorStore needs a header that Google's servers send, and the emulator does not.
SERVER = """
from gcp_storage_emulator import __main__
from gcp_storage_emulator.handlers import objects

download = objects.download

def with_generation(request, response, storage):
    download(request, response, storage)
    if response.status.value < 300:
        name = request.params["bucket_name"], request.params["object_id"]
        response["x-goog-generation"] = storage.get_file_obj(*name)["generation"]

objects.download = with_generation
__main__.main()
"""


class Bucket:
    """The emulator's one bucket, seen past the libraries under test."""

    def __init__(self, url: str) -> None:
        self.url = f"{url}/storage/v1/b/bucket/o"

    def names(self, prefix: str) -> list[str]:
        """Objects below a folder, by the rest of their names."""
        with urllib.request.urlopen(f"{self.url}?prefix={prefix}/") as answer:
            objects = json.load(answer).get("items", [])
        return sorted(entry["name"][len(prefix) + 1 :] for entry in objects)


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    settings = {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
    }
    flags = ["--host=127.0.0.1", f"--port={port}", "--in-memory"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, "start", *flags, "--default-bucket=bucket"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            for _ in range(100):
                try:
                    urllib.request.urlopen(f"{url}/storage/v1/b/bucket").close()
                    break
                except OSError:
                    assert server.poll() is None, "pip install gcp-storage-emulator"
                    time.sleep(0.1)
            yield Bucket(url)
        finally:
            server.kill()
            server.wait()


def tree(number: int) -> dict[str, np.ndarray]:
    return {"w": np.full(5000, number, np.float32), "n": np.int32(number).reshape(())}


def check(restored: store.Restored | None, number: int) -> None:
    """It is the whole of this number."""
    assert restored is not None and restored.number == number
    for leaf in restored.arrays.values():
        assert (leaf == number).all()


# --- Checkpoints


def test_checkpoints(bucket: Bucket) -> None:
    folder = epath.Path("gs://bucket/checkpoints")
    assert store.numbers(folder) == [] and store.latest(folder, {}) is None
    written: list[int] = []
    with Writer() as writer:
        for number in range(6):
            meta = {"number": number, "permanent": number == 1}
            writer.save(
                folder,
                number,
                tree(number),
                meta,
                then=lambda meta: written.append(meta["number"]),
            )
    assert written == [0, 1, 2, 3, 4, 5]
    assert store.numbers(folder) == [1, 4, 5]
    assert {name.split("/")[0] for name in bucket.names("checkpoints")} == set("145")
    check(store.latest(folder, tree(0)), 5)
    check(store.restore(folder, 1, tree(0)), 1)
    assert store.read_meta(folder, 4) == {"number": 4, "permanent": False}
    with pytest.raises(store.CheckpointError, match="5 exists"):
        store.save(folder, 5, tree(5), {})


def test_a_write_or_deletion_cut_short(bucket: Bucket) -> None:
    """Without its last object a folder is no checkpoint, and goes with the next."""
    folder = epath.Path("gs://bucket/short")
    for number in (0, 1):
        store.save(folder, number, tree(number), {})
    (folder / "1/commit_success.txt").unlink()
    stale = set(bucket.names("short/1"))
    assert store.numbers(folder) == [0]
    check(store.latest(folder, tree(0)), 0)
    store.save(folder, 2, tree(2), {})
    assert store.numbers(folder) == [0, 2]
    assert stale and bucket.names("short/1") == []


def test_a_damaged_checkpoint(bucket: Bucket, caplog: Any) -> None:
    folder = epath.Path("gs://bucket/damaged")
    for number in (0, 1):
        store.save(folder, number, tree(number), {})
    manifest = json.loads((folder / "1/manifest/data.json").read_text())
    manifest["meta"]["x"] = 1
    (folder / "1/manifest/data.json").write_text(json.dumps(manifest))
    check(store.latest(folder, tree(0)), 0)
    assert "1 is damaged: checksum of its JSON" in caplog.text
    store.save(folder, 1, tree(1), {})
    check(store.latest(folder, tree(0)), 1)
    first = {name.split("/")[0] for name in bucket.names("damaged")}
    assert first == {"0", "1", "1.damaged"}


# --- Other files


def test_results_and_pictures(bucket: Bucket) -> None:
    folder = epath.Path("gs://bucket/files")
    for prior in ("balanced", "meta"):
        run = make_run(prior)
        results.write(folder, run)
        assert results.read(folder) == run
    plots.accuracy_curves([run], folder / "curves.png")
    plots.confusion_matrices([run], folder / "confusion.png")
    plots.alpha_curve([run], folder / "alpha.png")
    names = ["alpha.png", "confusion.png", "curves.png", "results.json"]
    assert bucket.names("files") == names
    for name in names[:3]:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="gs://bucket/none/results.json does not exist"):
        results.read("gs://bucket/none")


def events(data: bytes) -> list[Any]:
    """The events of a file: each behind 12 bytes, with 4 after it."""
    found = []
    while data:
        (length,) = struct.unpack("Q", data[:8])
        found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_tensorboard_events(bucket: Bucket) -> None:
    folder = epath.Path("gs://bucket/tensorboard")
    with contextlib.closing(Timeline(folder, update=3)) as timeline:
        (name,) = bucket.names("tensorboard")
        timeline.scalars(4, {"train/loss": 0.5})
        timeline.flush()
        assert len(events((folder / name).read_bytes())) == 3
        timeline.scalars(5, {"train/loss": 0.25})
    written = events((folder / name).read_bytes())
    assert [event.step for event in written] == [0, 3, 4, 5]
    assert written[-1].summary.value[0].simple_value == 0.25


def test_a_store_that_refuses(
    bucket: Bucket, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its client raises, it is one line, and events end with a warning."""

    class ClientError(Exception):
        pass

    def refuse(*arguments: Any, **options: Any) -> None:
        raise ClientError("403\nno permission")

    folder = epath.Path("gs://bucket/refused")
    timeline = Timeline(folder)
    monkeypatch.setattr(type(folder), "write_bytes", refuse)
    with pytest.raises(UserError) as caught:
        results.write(folder, make_run())
    place = folder / "results.json"
    message = f"{place} cannot be written: ClientError: 403 no permission"
    assert str(caught.value) == message
    with pytest.raises(UserError, match="curves.png cannot be written: ClientError"):
        plots.accuracy_curves([make_run()], folder / "curves.png")
    timeline.scalars(1, {"loss": 1.0})
    timeline.flush()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("no more TensorBoard events: gs://bucket/refused/")
    assert warning.endswith(": 403 no permission")
    monkeypatch.setattr(type(folder), "mkdir", refuse)
    with pytest.raises(store.CheckpointError) as caught:
        store.save(folder, 0, tree(0), {})
    assert str(caught.value).endswith("0: ClientError: 403 no permission")


# --- A whole run


@pytest.mark.slow
def test_a_whole_run(
    bucket: Bucket, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes there and nowhere else; started again it is done at once."""
    # A cache there takes what is long to compile: a network, optimised.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/compiled")
    monkeypatch.delenv("XLA_FLAGS")
    config = runs.config_file(tmp_path, classes=6, base=4, steps=1)
    workdir: Any = "gs://bucket/whole"
    runs.run(config, workdir, "--config.compile_cache=true", small=False)
    found = bucket.names("whole")
    folders = {name.split("/")[0] for name in found}
    assert {"checkpoints", "tensorboard", "results.json"} <= folders
    assert bucket.names("compiled")
    assert {"curves.png", "confusion.png"} <= folders
    first = results.read(workdir)
    assert first["status"] == "done"
    runs.run(config, workdir, "--config.compile_cache=true", small=False)
    assert results.read(workdir) == first
    assert not (runs.ROOT / "gs:").exists()


def test_a_bucket_is_written_to_before_a_run_begins(bucket: Bucket) -> None:
    open_workdir(epath.Path("gs://bucket/opened"))
    assert bucket.names("opened") in ([], [""])  # the file is removed again
    with pytest.raises(UserError, match="'gs://other/run' cannot be written: FileNot"):
        open_workdir(epath.Path("gs://other/run"))
