"""Oversampling: epochs that draw images with replacement (Jodelet et al., Table 6)."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """Draws of an epoch, in place of every image once.

    Attributes:
      probabilities: float64 [N], of each image at every draw; they sum to 1.
      draws: images of an epoch.
    """

    probabilities: np.ndarray
    draws: int


def memory(labels: np.ndarray, num_old: int) -> Sampler:
    """Memory oversampling: a batch holds as many old as new images, in expectation.

    An epoch has twice as many draws as there are new images (LUCIR's code with
    rs_ratio 0.5 does the same).

    Args:
      labels: int [N], positions in the class order; some old, some new.
      num_old: old classes are those below it.
    """
    old = labels < num_old
    shares = np.where(old, 0.5 / old.sum(), 0.5 / (~old).sum())
    return Sampler(shares, 2 * int((~old).sum()))


def classes(labels: np.ndarray) -> Sampler:
    """Class oversampling: every class is equally likely at every draw.

    An epoch has as many draws as there would be images if every class had as many as
    the largest.

    Args:
      labels: int [N], positions in the class order.
    """
    counts = np.bincount(labels)
    present = int(np.count_nonzero(counts))
    return Sampler(1.0 / (present * counts[labels]), present * int(counts.max()))
