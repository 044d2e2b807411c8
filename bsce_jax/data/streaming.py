"""Images decoded as they are needed: Grain over tfds records, in the plan's order.

An image is a pure function of its record and of its place in the plan, so that batches
do not depend on the number of processes and threads that decode them, and a run that is
resumed at any batch sees those it would have seen. Nothing here knows devices.
"""

import dataclasses
import functools
import logging
import multiprocessing.resource_tracker
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from bsce_jax.data import batches, decode, source
from bsce_jax.errors import UserError, one_line

_log = logging.getLogger(__name__)

MANY = 4096  # images worth starting processes for
PIECE = 8  # images that a thread decodes in one go: Grain costs 0.3 ms an item
SLOW = 30.0  # seconds after which a read is reported
_NOTE = 300  # bytes of what went wrong with an image, kept in its batch


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """Reads and crops images; sent to every process that decodes.

    Attributes:
      records: (encoded image, label) pairs.
      numbers: int [N], the record of each image.
      labels: int32 [N], positions in the class order.
      shape: height, width (equal) and channels of the crops.
      resize: shorter side before the centre crop; 0 = none.
      crop_area: (low, high) share of a random-resized crop; None for centre crops only.
    """

    records: source.Encoded
    numbers: np.ndarray
    labels: np.ndarray
    shape: tuple[int, int, int]
    resize: int
    crop_area: tuple[float, float] | None

    def read(self, indices: list[int]) -> list[bytes]:
        """The encoded images.

        Raises:
          UserError: a record cannot be read.
        """
        started = time.monotonic()
        found = self.records.__getitems__([int(self.numbers[i]) for i in indices])
        seconds = time.monotonic() - started
        if seconds > SLOW:
            shards = sorted({self.shard(index) for index in indices})
            _log.warning("reading from %s took %.0f s", ", ".join(shards[:3]), seconds)
        return [encoded for encoded, _ in found]

    def crop(self, encoded: bytes, key: tuple[int, ...] | None) -> np.ndarray:
        """One image, uint8 [H, W, channels].

        Args:
          encoded: its file.
          key: numbers that the random crop depends on; None for the centre crop.

        Raises:
          decode.DecodeError: it is no image.
        """
        size, _, channels = self.shape
        if key is None or self.crop_area is None:
            return decode.test_crop(
                encoded, size, resize=self.resize, channels=channels
            )
        rng = np.random.default_rng(key)
        return decode.train_crop(
            encoded, size, rng, area=self.crop_area, channels=channels
        )

    def name(self, index: int) -> str:
        """What messages call an image."""
        return self.records.name(int(self.numbers[index]))

    def shard(self, index: int) -> str:
        """The file that an image's record is in."""
        return self.records.shard(int(self.numbers[index]))


@dataclasses.dataclass(frozen=True, eq=False)
class _Pieces:
    """The rows of batches from `start` on, cut into pieces: (batch, rows) of each."""

    batches: int
    rows: np.ndarray
    start: int
    count: int  # pieces of a batch

    def __len__(self) -> int:
        return (self.batches - self.start) * self.count

    def __getitem__(self, piece: int) -> tuple[int, np.ndarray]:
        batch, part = divmod(piece, self.count)
        return self.start + batch, np.array_split(self.rows, self.count)[part]


@dataclasses.dataclass(frozen=True, eq=False)
class _Load:
    """Turns a piece into arrays; what is wrong with an image goes into its note."""

    reader: Reader
    plan: batches.Batches

    def __call__(self, piece: tuple[int, np.ndarray]) -> dict[str, np.ndarray]:
        batch, rows = piece
        indices = np.zeros(len(rows), np.int32)
        valid = np.zeros(len(rows), np.float32)
        inside = rows < self.plan.size  # the others fill the batch up to the devices
        chosen, chosen_valid = _batch(self.plan, batch)  # type: ignore[arg-type]
        indices[inside], valid[inside] = (
            chosen[rows[inside]],
            chosen_valid[rows[inside]],
        )
        found: dict[str, Any] = {
            "images": np.zeros((len(rows), *self.reader.shape), np.uint8),
            "labels": self.reader.labels[indices].astype(np.int32),
            "indices": indices,
            "valid": valid,
            "notes": np.zeros(len(rows), f"S{_NOTE}"),
            "refused": np.zeros(len(rows), np.bool_),
        }
        wanted = np.flatnonzero(valid)
        try:
            files = self.reader.read(indices[wanted].tolist())
        except UserError as error:
            found["notes"][:] = str(error).encode()
            found["refused"][:] = True
            return found
        for i, file in zip(wanted.tolist(), files, strict=True):
            try:
                key = self.plan.key(batch, int(rows[i]))
                found["images"][i] = self.reader.crop(file, key)
            except decode.DecodeError as error:
                name = self.reader.name(int(indices[i]))
                found["notes"][i] = f"{name}: {error}".encode()
                valid[i] = 0
        return found


@functools.lru_cache(maxsize=16)  # threads work on a few batches at a time
def _batch(plan: Any, batch: int) -> tuple[np.ndarray, np.ndarray]:
    return plan[batch]


def read(
    reader: Reader,
    plan: batches.Batches,
    rows: np.ndarray,
    start: int = 0,
    *,
    workers: int = -1,
    skip: bool = False,
) -> Generator[dict[str, np.ndarray]]:
    """Yields the batches of a plan from number `start` on.

    Args:
      reader: of the images.
      plan: the batches.
      rows: int [n], the rows of each batch to read: this host's. Rows from plan.size on
        are never valid.
      start: first batch.
      workers: processes, no more than batches; 0 = threads of this one, -1 =
        `default_workers`. Few images are always read by threads.
      skip: whether an image that cannot be decoded counts as absent.

    Yields:
      "images" uint8 [n, H, W, channels], "labels" int32 [n] (positions), "indices"
      int32 [n] and "valid" float32 [n].

    Raises:
      UserError: an image that cannot be decoded (named), unless `skip`; a shard that
        cannot be read.
    """
    rows = np.asarray(rows)
    count = default_workers() if workers < 0 else workers
    if (len(plan) - start) * len(rows) < MANY:
        count = 0
    count = min(count, len(plan) - start)
    threads = available_cores()
    pieces = 1 if count else min(-(-len(rows) // PIECE), 4 * threads)
    items = grain.MapDataset.source(_Pieces(len(plan), rows, start, pieces))
    items = items.map(_Load(reader, plan))
    if count:
        if not flags.FLAGS.is_parsed():  # Grain reads its own
            flags.FLAGS.mark_as_parsed()
        found = items.to_iter_dataset(grain.ReadOptions(1, 1)).mp_prefetch(
            grain.MultiprocessingOptions(count, per_worker_buffer_size=2),
            worker_init_fn=functools.partial(_belong_to_the_run, os.getpid()),
        )
    else:
        ahead = max(2 * pieces, 2 * threads)
        found = items.to_iter_dataset(grain.ReadOptions(threads, ahead))
    reported: set[int] = set()
    iterator = iter(found)
    try:
        for _ in range(start, len(plan)):
            batch = _joined([_next(iterator) for _ in range(pieces)])
            _check(batch, skip, reported)
            del batch["notes"], batch["refused"]
            yield batch
    finally:
        iterator.close()


def shield_from_signals() -> None:
    """Keeps SIGINT and SIGTERM from processes that the calling thread starts.

    Decoding processes ignore them, but only once they have begun.
    """
    # Python starts this one with the first process, and lets the signals in again.
    multiprocessing.resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


def _belong_to_the_run(run: int, worker: int, workers: int) -> None:
    """Makes a decoding process end with the run, and not before.

    A scheduler may signal all processes at once, but the run needs its input until it
    has saved; and of a run that is killed nothing may be left, even if that was before
    this process had begun: `run` is the id of the process that started it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == run:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _next(iterator: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    try:
        return next(iterator)
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        reason = one_line(error)
        raise UserError(
            f"a decoding process is gone, perhaps for want of memory: {reason}; "
            "config.data.workers says how many there are"
        ) from None


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The pieces of a batch as one, copied: a process's lie in shared memory."""
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def _check(batch: dict[str, np.ndarray], skip: bool, reported: set[int]) -> None:
    """Refuses or reports the images of a batch that could not be read."""
    for row in np.flatnonzero(batch["notes"] != b""):
        note = batch["notes"][row].decode(errors="replace")
        if batch["refused"][row]:
            raise UserError(note)
        if not skip:
            raise UserError(
                f"image {note}; repair or remove it, or set config.data.corrupt=skip"
            )
        index = int(batch["indices"][row])
        if index not in reported:
            reported.add(index)
            _log.warning("image %s; skipped", note)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def default_workers() -> int:
    """Decoding processes of a host: none on up to 4 cores, else one a core, at most 64.

    Threads share Python's lock: measured in docs/results.md.
    """
    cores = available_cores()
    return 0 if cores <= 4 else min(cores, 64)
