"""A split's images on their way to the devices: resident there, or streamed to them.

Both feeds give the same batches of the same plan; compiled functions take the feed's
`resident` images, or None where the rows bring their own.
"""

import dataclasses
import queue
import threading
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bsce_jax.compute import parallel
from bsce_jax.compute.state import Images, PyTree, Rows
from bsce_jax.data import batches, source
from bsce_jax.data.companions import Companions
from bsce_jax.errors import UserError
from bsce_jax.run import dataset

if TYPE_CHECKING:
    from bsce_jax.data import streaming

AHEAD = 2  # groups of batches on the devices before they are asked for


@dataclasses.dataclass(frozen=True)
class Resident:
    """Images that are on the devices.

    Attributes:
      devices: where.
      resident: all of the split's images and labels.
    """

    devices: parallel.Parallel
    resident: Images

    def groups(
        self, plan: batches.Batches, start: int = 0, width: int = 1
    ) -> Generator[Rows]:
        """Yields rows of batches `start` to `start + width`, and so on to the end.

        The last group is filled up with batches without a valid row.
        """
        for first in range(start, len(plan), width):
            indices, valid = batches.group(plan, first, width)
            updates, numbers = _keys(plan, first, width, np.arange(plan.size))
            rows = Rows(indices, valid, numbers, updates)
            yield parallel.shard(self.devices, _by_row(plan, rows))


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Images that are read and decoded when a batch needs them.

    Attributes:
      devices: where they go.
      reader: of the images.
      workers, skip: see `streaming.read`.
      timeout: seconds to wait for a batch; 0 = for ever.
    """

    devices: parallel.Parallel
    reader: "streaming.Reader"
    workers: int
    skip: bool
    timeout: float

    @property
    def resident(self) -> None:
        """There are none."""

    def groups(
        self, plan: batches.Batches, start: int = 0, width: int = 1
    ) -> Generator[Rows]:
        """As `Resident.groups`; reads ahead, and puts `AHEAD` groups on the devices.

        Raises:
          UserError: an image or a shard cannot be read, or not within the timeout.
        """
        ready: queue.Queue[Any] = queue.Queue(AHEAD)
        closed = threading.Event()

        def put(item: Any) -> bool:
            while not closed.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def fill() -> None:
            source = self._groups(plan, start, width)
            try:
                for rows in source:
                    if not put(parallel.shard_own(self.devices, rows)):
                        break
                put(None)
            except BaseException as error:  # raised where the batch is awaited
                put(error)
            finally:
                source.close()

        thread = threading.Thread(target=fill, name="input", daemon=True)
        thread.start()
        try:
            for first in range(start, len(plan), width):
                found = self._wait(ready, plan, first)
                if isinstance(found, BaseException):
                    raise found
                yield found
        finally:
            closed.set()
            thread.join(timeout=2)  # it may hang in a read

    def _groups(self, plan: batches.Batches, start: int, width: int) -> Generator[Rows]:
        """This process's rows of every group, on the host."""
        from bsce_jax.data import streaming  # Grain takes a second to load

        streaming.shield_from_signals()  # in the thread of `groups`
        own = _local_images(self.devices, plan)
        # B_t of Meta has few images: processes of its own would only take memory.
        held_out = isinstance(plan, batches.Cycled) and plan.stream == batches.CYCLED
        workers = 0 if held_out else self.workers
        source = streaming.read(
            self.reader, plan, own, start, workers=workers, skip=self.skip
        )
        try:
            for first in range(start, len(plan), width):
                count = min(width, len(plan) - first)
                found = [next(source) for _ in range(count)]
                updates, numbers = _keys(plan, first, width, own)
                yield _by_row(plan, _stack(found, updates, numbers, width))
        finally:
            source.close()

    def _wait(self, ready: queue.Queue, plan: batches.Batches, batch: int) -> Any:
        """The next group or error."""
        try:
            return ready.get(timeout=self.timeout or None)
        except queue.Empty:
            indices, valid = plan[batch]
            own = _local_images(self.devices, plan)
            wanted = indices[own[own < plan.size]][valid[own[own < plan.size]] > 0]
            names = sorted({self.reader.shard(int(index)) for index in wanted})
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"no images for {self.timeout:g} s (config.data.timeout): a batch "
                f"waits for {', '.join(names[:3])}{more}"
            ) from None


Feed = Resident | Streamed


def create(
    config: ConfigDict,
    devices: parallel.Parallel,
    split: dataset.Split,
    shape: tuple[int, int, int],
) -> Feed:
    """The feed of a split; places its images where they are resident.

    Args:
      config: resolved configuration.
      devices: where the images go.
      split: which images.
      shape: height, width and channels that the network sees.
    """
    if split.images is not None:
        images = Images(split.images, split.labels.astype(np.int32))
        return Resident(devices, parallel.replicate(devices, images))
    from bsce_jax.data import streaming

    data = config.data
    records, _ = source.open_encoded(data.name, split.name, data.data_dir)
    reader = streaming.Reader(
        records,
        split.records,
        split.labels,
        shape,
        data.resize,
        tuple(data.crop_area) if data.random_resized_crop else None,
    )
    return Streamed(devices, reader, data.workers, data.corrupt == "skip", data.timeout)


def _local_images(devices: parallel.Parallel, plan: batches.Batches) -> np.ndarray:
    """The images of a batch that are this process's: companions go with their row."""
    if not isinstance(plan, Companions):
        return parallel.local_rows(devices, plan.size)
    rows = parallel.local_rows(devices, plan.plan.size)
    return (rows[:, None] * plan.each + np.arange(plan.each)).ravel()


def _keys(
    plan: batches.Batches, first: int, width: int, own: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray]:
    """What the random keys of a group's images depend on: see `Rows`.

    Returns:
      updates, int32 [width, len(own)] or None where they are those of the batches, and
      numbers, int32 of that shape.
    """
    shape = width, len(own)
    if not isinstance(plan, Companions):
        return None, np.broadcast_to(own.astype(np.int32), shape)
    places = np.zeros(shape, np.int32)
    inside = own < plan.size
    for i in range(min(width, len(plan) - first)):
        places[i, inside] = np.maximum(plan.places(first + i)[own[inside]], 0)
    updates, numbers = np.divmod(places, np.int32(plan.plan.size))
    return updates, numbers


def _by_row(plan: batches.Batches, rows: Rows) -> Rows:
    """Companions as [U, B, K, ...]; other rows as they are."""
    if not isinstance(plan, Companions):
        return rows
    return jax.tree.map(
        lambda leaf: leaf.reshape(leaf.shape[0], -1, plan.each, *leaf.shape[2:]), rows
    )


def _stack(
    found: list[dict[str, np.ndarray]],
    updates: np.ndarray | None,
    numbers: np.ndarray,
    width: int,
) -> Rows:
    """Batches of this process's images as one group of `width`."""

    def stacked(name: str) -> np.ndarray:
        whole = np.zeros((width, *found[0][name].shape), found[0][name].dtype)
        for i, batch in enumerate(found):
            whole[i] = batch[name]
        return whole

    if width == 1:
        values: PyTree = {name: leaf[None] for name, leaf in found[0].items()}
    else:
        values = {name: stacked(name) for name in found[0]}
    return Rows(
        indices=values["indices"],
        valid=values["valid"],
        numbers=numbers,
        updates=updates,
        images=values["images"],
        labels=values["labels"],
    )
