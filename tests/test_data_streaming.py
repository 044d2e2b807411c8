"""Streamed images: the plan's batches, whoever decodes them, and what is unreadable."""

import contextlib
import io
import logging
import multiprocessing
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from bsce_jax.compute import parallel
from bsce_jax.compute.state import Images
from bsce_jax.data import batches, decode, source, streaming
from bsce_jax.errors import UserError
from bsce_jax.run import feed
from tests import datasets

SIZE, COUNT = 16, 30


def jpeg(rng: np.random.Generator, height: int, width: int) -> bytes:
    """A smooth random picture."""
    small = rng.integers(0, 256, (4, 5, 3)).astype(np.uint8)
    picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> pathlib.Path:
    """A data directory with "pictures" of many sizes, and "broken" ones."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    sizes = rng.integers(12, 60, (COUNT, 2))
    images = [jpeg(rng, *size) for size in sizes]
    labels = [i % 3 for i in range(COUNT)]
    datasets.write(folder, "pictures", {"train": (images, labels)})
    broken = list(images)
    broken[4] = images[4][: len(images[4]) // 2]
    broken[9] = b"no image at all"
    datasets.write(folder, "broken", {"train": (broken, labels)})
    return folder


def reader(folder, name="pictures", area=(0.08, 1.0), numbers=None, size=SIZE):
    records, _ = source.open_encoded(name, "train", str(folder))
    labels = source.labels(name, "train", str(folder))
    numbers = np.arange(len(labels)) if numbers is None else numbers
    return streaming.Reader(
        records, numbers, labels[numbers] + 10, (size, size, 3), 20, area
    )


def shuffled(count=COUNT, size=8, epochs=2) -> batches.Shuffled:
    return batches.Shuffled(np.arange(count), size, epochs, seed=3, step=1)


def by_hand(read, plan, batch, rows):
    """A batch from its definition: one image after another."""
    indices, valid = plan[batch]
    images = np.zeros((len(rows), *read.shape), np.uint8)
    for place, row in enumerate(rows):
        if row < plan.size and valid[row]:
            encoded, _ = read.records[int(read.numbers[indices[row]])]
            if plan.key(batch, row) is None or read.crop_area is None:
                image = decode.test_crop(encoded, SIZE, resize=20, channels=3)
            else:
                rng = np.random.default_rng(plan.key(batch, row))
                image = decode.train_crop(encoded, SIZE, rng, area=read.crop_area)
            images[place] = image
    return images


@pytest.mark.parametrize("kind", ["shuffled", "centre", "in order"])
def test_batches_are_those_of_the_plan(pictures, kind):
    """Rows in any order, some that only fill the batch; a partial last batch."""
    read = reader(pictures, area=None if kind == "centre" else (0.3, 0.9))
    plan = shuffled() if kind != "in order" else batches.InOrder(np.arange(29)[::-1], 8)
    rows = np.array([2, 3, 7, 8, 9])
    found = list(streaming.read(read, plan, rows))
    assert len(found) == len(plan)
    for number, batch in enumerate(found):
        indices, valid = plan[number]
        own = rows[rows < 8]
        np.testing.assert_array_equal(batch["valid"][:3], valid[own])
        assert not batch["valid"][3:].any() and not batch["images"][3:].any()
        kept = batch["valid"] > 0
        np.testing.assert_array_equal(
            batch["indices"][:3][kept[:3]], indices[own][kept[:3]]
        )
        expected = read.labels[batch["indices"]]
        np.testing.assert_array_equal(batch["labels"][kept], expected[kept])
        np.testing.assert_array_equal(
            batch["images"], by_hand(read, plan, number, rows)
        )
        assert batch["images"].dtype == np.uint8


def test_it_does_not_matter_who_decodes_nor_where_it_starts(pictures, monkeypatch):
    """Threads and two real processes, from the first batch and from the fourth."""
    monkeypatch.setattr(streaming, "MANY", 0)
    read, plan, rows = reader(pictures), shuffled(), np.arange(8)
    expected = list(streaming.read(read, plan, rows, workers=0))
    for workers, start in ((0, 3), (2, 0), (2, 3)):
        found = list(streaming.read(read, plan, rows, start, workers=workers))
        assert len(found) == len(plan) - start
        for a, b in zip(found, expected[start:], strict=True):
            for name in b:
                np.testing.assert_array_equal(a[name], b[name])


def test_a_decoding_process_outlives_signals_but_its_death_is_told(
    pictures, monkeypatch
):
    monkeypatch.setattr(streaming, "MANY", 0)
    plan = shuffled(epochs=500)
    batches_read = streaming.read(reader(pictures), plan, np.arange(8), workers=1)
    next(batches_read)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM):  # as a scheduler sends them to all
        os.kill(worker.pid, number)
    for _ in range(20):
        next(batches_read)
    worker.kill()
    with pytest.raises(UserError, match="a decoding process is gone.*data.workers"):
        for _ in range(1000):
            next(batches_read)


STARTING = """
import pickle, sys
import numpy as np
from bsce_jax.data import streaming

if __name__ == "__main__":
    streaming.MANY = 0
    streaming.shield_from_signals()
    read, plan = pickle.loads(sys.stdin.buffer.read())
    print("starting", flush=True)
    for batch in streaming.read(read, plan, np.arange(8), workers=2):
        pass
    print("done", flush=True)
"""


@pytest.mark.slow
def test_a_decoding_process_outlives_signals_before_it_has_begun(pictures, tmp_path):
    script = tmp_path / "reads.py"
    script.write_text(STARTING)
    workers: set[str] = set()
    with started(script, (reader(pictures), shuffled())) as run:
        assert run.stdout.readline() == b"starting\n"
        deadline = time.monotonic() + 30
        while len(workers) < 2 and time.monotonic() < deadline:
            workers |= {child for child in children(run.pid) if is_worker(child)}
        for worker in workers:
            os.kill(int(worker), signal.SIGTERM)
        assert run.stdout.read() == b"done\n"
        assert run.wait() == 0 and len(workers) == 2


def is_worker(pid):
    return b"spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()


@contextlib.contextmanager
def started(script, given):
    """A process that reads a pickle from its standard input; it is ended with it."""
    run = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=pathlib.Path(__file__).parent.parent,
        env={**os.environ, "PYTHONPATH": "."},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    run.stdin.write(pickle.dumps(given))
    run.stdin.close()
    try:
        yield run
    finally:
        run.kill()
        run.wait()
        run.stdout.close()


def children(pid):
    tasks = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    return [child for path in tasks for child in path.read_text().split()]


ORPHANS = """
import pickle, sys
import numpy as np
from bsce_jax.data import streaming

if __name__ == "__main__":
    streaming.MANY = 0
    read, plan = pickle.loads(sys.stdin.buffer.read())
    batches = streaming.read(read, plan, np.arange(8), workers=2)
    next(batches)
    print("reading", flush=True)
    import time
    time.sleep(60)
"""


def test_no_decoding_process_outlives_a_killed_run(pictures, tmp_path):
    script = tmp_path / "reads.py"
    script.write_text(ORPHANS)
    with started(script, (reader(pictures), shuffled(epochs=500))) as run:
        assert run.stdout.readline() == b"reading\n"
        found = children(run.pid)
    workers = [pathlib.Path(f"/proc/{pid}/stat") for pid in found]
    assert len(workers) >= 2
    deadline = time.monotonic() + 20
    while any(path.exists() for path in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    left = [path.read_text() for path in workers if path.exists()]
    assert not [text for text in left if " Z " not in text]


def test_random_crops_differ_between_epochs_and_rows(pictures):
    read = reader(pictures)
    first, *_, last = streaming.read(read, shuffled(1, 1, epochs=5), np.arange(1))
    assert np.any(first["images"] != last["images"])
    same = batches.Shuffled(np.zeros(4, int), 4, 1, seed=3, step=1)
    (batch,) = streaming.read(read, same, np.arange(4))
    assert len({image.tobytes() for image in batch["images"]}) == 4


def test_an_image_that_is_none_is_named_and_refused(pictures):
    read = reader(pictures, "broken")
    with pytest.raises(
        UserError,
        match=r"image train_000(04|09): .*; repair or remove it, or set "
        "config.data.corrupt=skip",
    ):
        list(streaming.read(read, shuffled(), np.arange(8)))


def test_or_it_is_skipped_and_reported_once(pictures, caplog):
    read, plan = reader(pictures, "broken"), shuffled(size=4)
    good = reader(pictures)
    with caplog.at_level(logging.WARNING):
        found = list(streaming.read(read, plan, np.arange(4), skip=True))
    names = np.array([read.name(i) for i in range(COUNT)])
    bad = np.isin(names, ["train_00004", "train_00009"])
    assert bad.sum() == 2 and sorted(names) == [f"train_{i:05d}" for i in range(COUNT)]
    skipped = 0
    for number, batch in enumerate(found):
        indices, valid = plan[number]
        np.testing.assert_array_equal(batch["valid"], valid * ~bad[indices])
        skipped += int((valid - batch["valid"]).sum())
        expected = by_hand(good, plan, number, np.arange(4))
        np.testing.assert_array_equal(
            batch["images"], expected * (batch["valid"] > 0)[:, None, None, None]
        )
    assert skipped == 4  # two images in two epochs
    assert sorted(record.message.split(":")[0] for record in caplog.records) == [
        "image train_00004",
        "image train_00009",
    ]


def test_a_shard_that_is_cut_short_is_named_by_every_kind_of_reader(
    pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr(streaming, "MANY", 0)
    rng = np.random.default_rng(1)
    images = [jpeg(rng, 40, 40) for _ in range(COUNT)]
    datasets.write(tmp_path, "cut", {"train": (images, [0, 1] * (COUNT // 2))})
    read = reader(tmp_path, "cut")
    (shard,) = (tmp_path / "cut" / "1.0.0").glob("*.array_record*")
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    for workers in (0, 1):
        with pytest.raises(UserError, match=shard.name):
            list(streaming.read(read, shuffled(), np.arange(8), workers=workers))
    with pytest.raises(UserError, match=shard.name):
        source.open_encoded("cut", "train", str(tmp_path))
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        source.open_encoded("cut", "train", str(tmp_path))


def streamed(place, read, **options) -> feed.Streamed:
    return feed.Streamed(
        place, read, **{"workers": 0, "skip": False, "timeout": 60.0} | options
    )


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize(("start", "width"), [(0, 1), (2, 1), (0, 3), (3, 3)])
def test_streamed_rows_are_the_resident_ones_with_their_images(
    pictures, mode, start, width
):
    """Eight devices, batches of 11, the last one partial, groups of several."""
    place = parallel.create(mode)
    read = reader(pictures, area=None)
    whole = streaming.read(
        read, batches.InOrder(np.arange(COUNT), COUNT), np.arange(COUNT)
    )
    images = next(whole)["images"]
    data = parallel.replicate(place, Images(images, read.labels))
    plan = shuffled(size=11)
    resident = list(feed.Resident(place, data).groups(plan, start, width))
    found = list(streamed(place, read).groups(plan, start, width))
    assert len(found) == len(resident) == -(-(len(plan) - start) // width)
    for a, b in zip(found, resident, strict=True):
        valid = np.asarray(b.valid)
        np.testing.assert_array_equal(a.valid, valid)
        for name in ("numbers", "indices"):
            x, y = np.asarray(getattr(a, name)), np.asarray(getattr(b, name))
            np.testing.assert_array_equal(x[valid > 0], y[valid > 0])
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            assert getattr(a, name).sharding == getattr(b, name).sharding
        kept = np.asarray(b.indices)[valid > 0]
        np.testing.assert_array_equal(np.asarray(a.images)[valid > 0], images[kept])
        np.testing.assert_array_equal(
            np.asarray(a.labels)[valid > 0], read.labels[kept]
        )


def input_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "input"]


def test_an_unfinished_stream_leaves_nothing_running(pictures):
    place = parallel.create("jit", jax.devices()[:1])
    groups = streamed(place, reader(pictures)).groups(shuffled(size=2))
    next(groups)
    assert len(input_threads()) == 1
    groups.close()
    assert not input_threads()


def test_a_slow_shard_is_named(pictures):
    place = parallel.create("jit", jax.devices()[:1])
    read = reader(pictures)
    released = threading.Event()

    class Slow:
        def __getitems__(self, records):
            released.wait(20)
            return read.records.__getitems__(records)

        shard = staticmethod(read.records.shard)

    slow = streaming.Reader(Slow(), read.numbers, read.labels, read.shape, 0, None)
    started = time.monotonic()
    groups = streamed(place, slow, timeout=0.5).groups(shuffled())
    try:
        with pytest.raises(
            UserError, match=r"no images for 0.5 s \(config.data.timeout\).*pictures-"
        ):
            next(groups)
        assert time.monotonic() - started < 5
    finally:
        released.set()


def test_a_slow_read_is_reported(pictures, monkeypatch, caplog):
    monkeypatch.setattr(streaming, "SLOW", 0.0)
    with caplog.at_level(logging.WARNING):
        reader(pictures).read([0, 1])
    assert "took 0 s" in caplog.text and "pictures-train" in caplog.text
