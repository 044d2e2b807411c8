"""Companions: images that go beside each image of a batch, from the same epoch."""

import dataclasses

import numpy as np

from bsce_jax.data import batches


@dataclasses.dataclass(frozen=True, eq=False)
class Companions:
    """Images that go with each image of the batches of an epoch, K with each.

    A companion is the image in another place of the same epoch, augmented as it is
    there. Place p is row p mod B of the epoch's update number p div B.

    Attributes:
      plan: of the phase.
      epoch: of it, counted from 0; batches are those of the plan up to its end, of
        which only its own may be asked for.
      table: int32 [places of the epoch, K]: the places that go with each; -1 = none.
    """

    plan: batches.Shuffled
    epoch: int
    table: np.ndarray

    @property
    def each(self) -> int:
        """K, companions of a row."""
        return self.table.shape[1]

    @property
    def size(self) -> int:
        """Images of every batch; the K of a row stand together."""
        return self.plan.size * self.each

    def __len__(self) -> int:
        """Batches of the plan, to the end of the epoch."""
        return (self.epoch + 1) * self.plan.per_epoch

    def places(self, batch: int) -> np.ndarray:
        """The places of a batch's images in the epoch, [B * K] int32; -1 = none."""
        first = (batch - self.epoch * self.plan.per_epoch) * self.plan.size
        found = np.full((self.plan.size, self.each), -1, np.int32)
        rows = self.table[first : first + self.plan.size]
        found[: len(rows)] = rows
        return found.ravel()

    def __getitem__(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """The companions of one update's images."""
        places = self.places(batch)
        images = epoch_images(self.plan, self.epoch)
        valid = places >= 0
        return np.where(valid, images[places], 0), valid.astype(np.float32)

    def key(self, batch: int, row: int) -> tuple[int, ...]:
        """That of the image in its own place."""
        update, row = divmod(int(self.places(batch)[row]), self.plan.size)
        return self.plan.key(self.epoch * self.plan.per_epoch + update, row)


def epoch_images(plan: batches.Shuffled, epoch: int) -> np.ndarray:
    """The images of an epoch of a plan, int32, by their place in it."""
    order = batches.epoch_order(
        plan.seed,
        plan.step,
        plan.first_epoch + epoch,
        len(plan.indices),
        plan.sampler,
    )
    return plan.indices[order].astype(np.int32)
