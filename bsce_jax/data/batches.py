"""The batch plan: which image is in which row of which update.

Everything is a pure function of (seed, step, update), never of what was asked for
before: a run that is resumed at any update sees the batches it would have seen.
`step` is the number of the incremental step, 0 for the base step. Indices are
positions in a random-access source or in resident images.
"""

import dataclasses
import functools
from typing import Protocol

import numpy as np

from bsce_jax.data.sampling import Sampler

TRAINING, CYCLED, BESIDE = 0, 1, 2  # separate random streams


def epoch_order(
    seed: int, step: int, epoch: int, n: int, sampler: Sampler | None = None
) -> np.ndarray:
    """Returns the order of n images in one epoch: read-only, [n] int32.

    A permutation, equal to np.random.default_rng([seed, step, epoch]).permutation(n),
    on any machine; with a sampler its draws, [sampler.draws].
    """
    return _order(seed, step, epoch, n, TRAINING, sampler)


# A host prefetches across the border of two epochs and, with Meta, draws held-out
# batches in between; four orders of 1.3 million images are 20 MB.
@functools.lru_cache(maxsize=4)
def _order(
    seed: int,
    step: int,
    epoch: int,
    n: int,
    stream: int,
    sampler: Sampler | None = None,
) -> np.ndarray:
    """One permutation; stream 0 is that of default_rng([seed, step, epoch])."""
    rng = np.random.default_rng([seed, step, epoch, stream])
    if sampler is None:
        order = rng.permutation(n)
    else:
        order = rng.choice(n, sampler.draws, p=sampler.probabilities)
    order = order.astype(np.int32)
    order.setflags(write=False)  # the cache hands out the same array again
    return order


def updates_per_epoch(n: int, batch_size: int) -> int:
    """Returns the number of batches in an epoch; the last may be partial."""
    return -(-n // batch_size)


def rows(
    indices: np.ndarray,
    batch_size: int,
    update: int,
    *,
    seed: int,
    step: int,
    first_epoch: int = 0,
    sampler: Sampler | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the batch of one update.

    Args:
      indices: [N] int, N > 0: the images of this incremental step.
      batch_size: B, rows of the batch.
      update: number of the update in this step, counted from 0 over all epochs.
      seed: of the run.
      step: number of the incremental step.
      first_epoch: of the update 0, where another phase of the step came before.
      sampler: draws with replacement in place of every image once an epoch.

    Returns:
      source indices [B] int32, and valid [B] float32: 1, or 0 in the padding rows
      (index 0) that complete the last batch of an epoch.
    """
    size = sampler.draws if sampler else len(indices)
    epoch, batch = divmod(update, updates_per_epoch(size, batch_size))
    order = epoch_order(seed, step, first_epoch + epoch, len(indices), sampler)
    chosen = indices[order[batch * batch_size : (batch + 1) * batch_size]]
    found = np.zeros(batch_size, np.int32)
    valid = np.zeros(batch_size, np.float32)
    found[: len(chosen)] = chosen
    valid[: len(chosen)] = 1
    return found, valid


def cycled_rows(
    indices: np.ndarray,
    batch_size: int,
    draw: int,
    *,
    seed: int,
    step: int,
    stream: int = CYCLED,
) -> np.ndarray:
    """Returns draw number `draw` of batches that are always full, [B] int32.

    For the balanced held-out images B_t (Jodelet et al., Algorithm 1): reshuffled
    passes over the images follow one another and draw d is positions d B to
    (d + 1) B - 1 of that sequence, so that a pass that ends inside a batch is
    completed from the next one. B may be larger than the number of images. Streams of
    other numbers are shuffled in other ways.
    """
    n = len(indices)
    parts = []
    position, stop = draw * batch_size, (draw + 1) * batch_size
    while position < stop:
        number, offset = divmod(position, n)
        taken = min(n - offset, stop - position)
        order = _order(seed, step, number, n, stream)
        parts.append(indices[order[offset : offset + taken]])
        position += taken
    return np.concatenate(parts).astype(np.int32)


class Batches(Protocol):
    """A sequence of batches of one size; picklable, for processes that read ahead."""

    @property
    def size(self) -> int:
        """B, rows of every batch."""

    def __len__(self) -> int:
        """Number of batches."""

    def __getitem__(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices [B] int32 and valid [B] float32, as `rows` returns them."""

    def key(self, batch: int, row: int) -> tuple[int, ...] | None:
        """What the random crop of an image depends on; None where nothing is random."""


@dataclasses.dataclass(frozen=True, eq=False)
class Shuffled:
    """The batches of a phase of a step, epoch after epoch; see `rows`.

    Attributes:
      indices, size, seed, step, first_epoch, sampler: as in `rows`.
      epochs: of the phase.
    """

    indices: np.ndarray
    size: int
    epochs: int
    seed: int
    step: int
    first_epoch: int = 0
    sampler: Sampler | None = None

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch, the last partial one included."""
        images = self.sampler.draws if self.sampler else len(self.indices)
        return updates_per_epoch(images, self.size)

    def __len__(self) -> int:
        """Batches of all epochs."""
        return self.epochs * self.per_epoch

    def __getitem__(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """The batch of one update."""
        return rows(
            self.indices,
            self.size,
            batch,
            seed=self.seed,
            step=self.step,
            first_epoch=self.first_epoch,
            sampler=self.sampler,
        )

    def key(self, batch: int, row: int) -> tuple[int, ...]:
        """Seed, step, epoch, update in it, stream and row."""
        epoch, update = divmod(batch, self.per_epoch)
        return self.seed, self.step, self.first_epoch + epoch, update, TRAINING, row


@dataclasses.dataclass(frozen=True, eq=False)
class Cycled:
    """Draws of Meta's held-out images, or of others; `length` of them.

    See `cycled_rows`, also for the `stream`.
    """

    indices: np.ndarray
    size: int
    length: int
    seed: int
    step: int
    stream: int = CYCLED

    def __len__(self) -> int:
        """Number of draws."""
        return self.length

    def __getitem__(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """One draw; every row is valid."""
        found = cycled_rows(
            self.indices,
            self.size,
            batch,
            seed=self.seed,
            step=self.step,
            stream=self.stream,
        )
        return found, np.ones(self.size, np.float32)

    def key(self, batch: int, row: int) -> tuple[int, ...]:
        """Seed, step, draw, stream and row."""
        return self.seed, self.step, batch, 0, self.stream, row


@dataclasses.dataclass(frozen=True, eq=False)
class Replayed:
    """New images, and beside them in every batch a fixed number of exemplars (SS-IL).

    An epoch is a pass over the new images, without a last batch that is not full. The
    exemplars come in reshuffled passes of their own, without end (`cycled_rows`).

    Attributes:
      indices: int [N], the new images.
      exemplars: int [M], M > 0.
      new, old: how many of each a batch has; the new ones come first.
      epochs, seed, step, first_epoch: as in `Shuffled`.
    """

    indices: np.ndarray
    exemplars: np.ndarray
    new: int
    old: int
    epochs: int
    seed: int
    step: int
    first_epoch: int = 0

    @property
    def size(self) -> int:
        """Rows of every batch."""
        return self.new + self.old

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch; one, not full, where there are too few new images."""
        return max(1, len(self.indices) // self.new)

    def __len__(self) -> int:
        """Batches of all epochs."""
        return self.epochs * self.per_epoch

    def __getitem__(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """The batch of one update."""
        epoch, first = divmod(batch, self.per_epoch)
        order = epoch_order(
            self.seed, self.step, self.first_epoch + epoch, len(self.indices)
        )
        chosen = self.indices[order[first * self.new : (first + 1) * self.new]]
        found = np.zeros(self.size, np.int32)
        valid = np.ones(self.size, np.float32)
        found[: len(chosen)] = chosen
        valid[len(chosen) : self.new] = 0
        found[self.new :] = cycled_rows(
            self.exemplars, self.old, batch, seed=self.seed, step=self.step
        )
        return found, valid

    def key(self, batch: int, row: int) -> tuple[int, ...]:
        """Seed, step, epoch, update in it, stream and row."""
        epoch, update = divmod(batch, self.per_epoch)
        return self.seed, self.step, self.first_epoch + epoch, update, TRAINING, row


@dataclasses.dataclass(frozen=True, eq=False)
class InOrder:
    """Images one after another, for evaluation and features."""

    indices: np.ndarray
    size: int

    def __len__(self) -> int:
        """Batches, the last partial one included."""
        return updates_per_epoch(len(self.indices), self.size)

    def __getitem__(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """The next images."""
        chosen = self.indices[batch * self.size : (batch + 1) * self.size]
        found = np.zeros(self.size, np.int32)
        found[: len(chosen)] = chosen
        return found, (np.arange(self.size) < len(chosen)).astype(np.float32)

    def key(self, batch: int, row: int) -> None:
        """Nothing is random."""


@dataclasses.dataclass(frozen=True, eq=False)
class Leading:
    """The first batches of a plan, `length` of them."""

    plan: Batches
    length: int

    @property
    def size(self) -> int:
        """Rows of every batch."""
        return self.plan.size

    def __len__(self) -> int:
        """Number of batches."""
        return self.length

    def __getitem__(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """The batch of the whole plan."""
        return self.plan[batch]

    def key(self, batch: int, row: int) -> tuple[int, ...] | None:
        """As in the whole plan."""
        return self.plan.key(batch, row)


def group(batches: Batches, start: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Consecutive batches, stacked for a compiled loop.

    Args:
      batches: the sequence.
      start: first batch.
      width: U, the fixed length of a group.

    Returns:
      indices [U, B] int32 and valid [U, B] float32; batches after the last are all
      padding.
    """
    indices = np.zeros((width, batches.size), np.int32)
    valid = np.zeros((width, batches.size), np.float32)
    for i in range(min(width, len(batches) - start)):
        indices[i], valid[i] = batches[start + i]
    return indices, valid
