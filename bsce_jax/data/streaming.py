"""Images decoded as they are needed: Grain over tfds records, in the plan's order.

An image is a pure function of its record and of its place in the plan, so that batches
do not depend on the number of processes and threads that decode them, and a run that is
resumed at any batch sees those it would have seen. Nothing here knows devices.
"""

import dataclasses
import functools
import logging
import os
import time
from collections.abc import Generator
from typing import Any

import grain
import numpy as np
from absl import flags

from bsce_jax.data import batches, decode, source
from bsce_jax.errors import UserError

_log = logging.getLogger(__name__)

MANY = 4096  # images worth starting processes for
SLOW = 30.0  # seconds after which a read of one record is reported
_NOTE = 200  # bytes of what went wrong with an image, kept in its batch


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

    def read(self, index: int, key: tuple[int, ...] | None) -> np.ndarray:
        """One image, uint8 [H, W, channels].

        Args:
          index: of the image.
          key: numbers that the random crop depends on; None for the centre crop.

        Raises:
          decode.DecodeError: it is no image.
          UserError: its record cannot be read.
        """
        started = time.monotonic()
        encoded, _ = self.records[int(self.numbers[index])]
        seconds = time.monotonic() - started
        if seconds > SLOW:
            _log.warning("reading from %s took %.0f s", self.shard(index), seconds)
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
class _Places:
    """The rows of batches from `start` on, flat: (index, valid, key) of each."""

    plan: batches.Batches
    rows: np.ndarray
    start: int

    def __len__(self) -> int:
        return (len(self.plan) - self.start) * len(self.rows)

    def __getitem__(self, place: int) -> tuple[int, float, tuple[int, ...] | None]:
        batch, row = divmod(place, len(self.rows))
        number, batch = int(self.rows[row]), batch + self.start
        if number >= self.plan.size:  # fills the batch up to the devices
            return 0, 0.0, None
        indices, valid = _batch(self.plan, batch)  # type: ignore[arg-type]
        key = self.plan.key(batch)
        key = key if key is None else (*key, number)
        return int(indices[number]), float(valid[number]), key


@functools.lru_cache(maxsize=16)  # threads work on a few batches at a time
def _batch(plan: Any, batch: int) -> tuple[np.ndarray, np.ndarray]:
    return plan[batch]


@dataclasses.dataclass(frozen=True, eq=False)
class _Load:
    """Turns a place into an example; what is wrong with it goes into its note."""

    reader: Reader

    def __call__(
        self, place: tuple[int, float, tuple[int, ...] | None]
    ) -> dict[str, Any]:
        index, valid, key = place
        image, note, refused = None, b"", False
        if valid:
            try:
                image = self.reader.read(index, key)
            except decode.DecodeError as error:
                note = f"{self.reader.name(index)}: {error}".encode()
            except UserError as error:
                note, refused = str(error).encode(), True
        missing = image is None
        return {
            "images": np.zeros(self.reader.shape, np.uint8) if missing else image,
            "labels": np.int32(self.reader.labels[index]),
            "indices": np.int32(index),
            "valid": np.float32(0.0 if missing else 1.0),
            "note": np.frombuffer(note[:_NOTE].ljust(_NOTE, b"\0"), np.uint8),
            "refused": np.bool_(refused),
        }


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
      workers: processes; 0 = threads of this one, -1 = `default_workers`. Few images
        are always read by threads.
      skip: whether an image that cannot be decoded counts as absent.

    Yields:
      "images" uint8 [n, H, W, channels], "labels" int32 [n] (positions), "indices"
      int32 [n] and "valid" float32 [n].

    Raises:
      UserError: an image that cannot be decoded (named), unless `skip`; a shard that
        cannot be read.
    """
    places = _Places(plan, np.asarray(rows), start)
    items = grain.MapDataset.source(places).map(_Load(reader))
    count = default_workers() if workers < 0 else workers
    if count == 0 or len(places) < MANY:
        threads = available_cores()
        options = grain.ReadOptions(threads, max(2 * len(rows), 2 * threads))
        found = items.to_iter_dataset(options).batch(len(rows))
    else:
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        found = items.batch(len(rows)).to_iter_dataset(options)
        if not flags.FLAGS.is_parsed():  # Grain reads its own
            flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(count, per_worker_buffer_size=2)
        found = found.mp_prefetch(processes)
    reported: set[int] = set()
    iterator = iter(found)
    try:
        for batch in iterator:
            _check(batch, skip, reported)
            yield {name: batch[name] for name in ("images", "labels", "indices")} | {
                "valid": batch["valid"]
            }
    finally:
        iterator.close()


def _check(batch: dict[str, np.ndarray], skip: bool, reported: set[int]) -> None:
    """Refuses or reports the images of a batch that could not be read."""
    for row in np.flatnonzero(batch["note"].any(axis=1)):
        note = batch["note"][row].tobytes().decode(errors="replace").rstrip("\0")
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
