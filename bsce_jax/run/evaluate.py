"""Predictions, features and exemplar selection over whole sets of images."""

import collections
import contextlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bsce_jax import memory
from bsce_jax.compute import parallel
from bsce_jax.compute.state import PyTree
from bsce_jax.data import batches
from bsce_jax.run.feed import Feed
from bsce_jax.run.programs import Programs
from bsce_jax.telemetry import bar

IN_FLIGHT = 4  # batches whose outputs are not fetched yet


class Predictions(NamedTuple):
    """What `predict` finds for N images.

    Attributes:
      valid: bool [N]; False for images that are skipped, for which the rest has no
        meaning.
      classes: int32 [N], predicted positions in the class order.
      top5: bool [N], whether the label is among the five highest logits.
      features: float32 [N, D].
    """

    valid: np.ndarray
    classes: np.ndarray
    top5: np.ndarray
    features: np.ndarray


def predict(
    programs: Programs,
    params: PyTree,
    batch_stats: PyTree,
    seen: np.ndarray,
    feed: Feed,
    indices: np.ndarray,
    batch_size: int,
) -> Predictions:
    """Classifies images by the highest logit among the seen classes.

    Args:
      programs: compiled functions.
      params: of the network, on the devices.
      batch_stats: of the network, on the devices.
      seen: [C] bool, on the devices.
      feed: of the images.
      indices: int [N], images to classify.
      batch_size: images a call.
    """
    arguments = (params, batch_stats, seen, feed.resident)
    valid, *rest = _over_batches(
        programs.evaluate, arguments, feed, indices, batch_size, "evaluation"
    )
    return Predictions(valid > 0, *rest)


def features(
    programs: Programs,
    params: PyTree,
    batch_stats: PyTree,
    feed: Feed,
    indices: np.ndarray,
    batch_size: int,
    mirrored: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Features of the test transform; arguments as for `predict`.

    With `mirrored` those of the images flipped from left to right.

    Returns:
      bool [N], False for images that are skipped, and float32 [N, D].
    """
    flip = parallel.replicate(programs.parallel, np.bool_(mirrored))
    arguments = (params, batch_stats, feed.resident, flip)
    valid, found = _over_batches(
        programs.features, arguments, feed, indices, batch_size, "features"
    )
    return valid > 0, found


def features_by_class(
    programs: Programs,
    params: PyTree,
    batch_stats: PyTree,
    feed: Feed,
    by_class: list[np.ndarray],
    batch_size: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Features of several classes' images, in one pass over all of them.

    Returns:
      For each class the indices of its images that are not skipped, and their features.
    """
    joined = np.concatenate(by_class)
    valid, found = features(programs, params, batch_stats, feed, joined, batch_size)
    ends = np.cumsum([len(indices) for indices in by_class])[:-1]
    return [
        (indices[kept], part[kept])
        for indices, kept, part in zip(
            by_class, np.split(valid, ends), np.split(found, ends), strict=True
        )
    ]


def _over_batches(
    program: Callable,
    arguments: tuple,
    feed: Feed,
    indices: np.ndarray,
    batch_size: int,
    what: str,
) -> tuple[np.ndarray, ...]:
    """Runs a program over [1, B] rows; outputs joined along the images.

    `what` is shown where it takes long.
    """
    plan = batches.InOrder(np.asarray(indices), batch_size)
    found: list[tuple[np.ndarray, ...]] = []
    pending: collections.deque[tuple] = collections.deque()

    def fetch() -> None:
        count = min(batch_size, len(indices) - len(found) * batch_size)
        found.append(parallel.fetch(pending.popleft(), count))

    with contextlib.closing(feed.groups(plan)) as groups:
        for rows in bar.passing(groups, len(indices), batch_size, what):
            pending.append(program(*arguments, rows))
            if len(pending) > IN_FLIGHT:  # or streamed images pile up on the devices
                fetch()
    while pending:
        fetch()
    return tuple(
        np.concatenate([part[0] for part in parts])
        for parts in zip(*found, strict=True)
    )


def select_exemplars(
    programs: Programs,
    params: PyTree,
    batch_stats: PyTree,
    feed: Feed,
    by_class: list[np.ndarray],
    how: str,
    count: int,
    most: int,
    longest: int,
    batch_size: int,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Ranks exemplars of classes, with the network just trained on them.

    Args:
      programs: compiled functions.
      params: of the network, on the devices.
      batch_stats: of the network, on the devices.
      feed: of the training images.
      by_class: for each class the int indices of its training images.
      how: "herding" or "random".
      count: exemplars of each class.
      most: the largest count of the experiment, and
      longest: images of its largest class: one compiled size.
      batch_size: images a call.
      rng: for random selection.

    Returns:
      For each class `count` indices, in order of choice; fewer where images are skipped
      and too few are left.
    """
    if count == 0:
        return [indices[:0] for indices in by_class]
    if how == "random":
        return [i[memory.random_ranking(len(i), count, rng)] for i in by_class]
    chosen = []
    for indices, found in features_by_class(
        programs, params, batch_stats, feed, by_class, batch_size
    ):
        padded = np.zeros((longest, found.shape[1]), np.float32)
        padded[: len(found)] = found
        order = memory.herd_padded(padded, np.arange(longest) < len(found), most)
        ranked = np.asarray(order)[:count]
        chosen.append(indices[ranked[ranked >= 0]])
    return chosen
