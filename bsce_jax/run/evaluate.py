"""Predictions and features over whole sets of images."""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from bsce_jax.compute import parallel
from bsce_jax.compute.state import Network, StepContext
from bsce_jax.compute.views import VIEWS
from bsce_jax.data import batches
from bsce_jax.run.feed import Feed
from bsce_jax.run.programs import Programs
from bsce_jax.telemetry.bar import passing

IN_FLIGHT = 4  # batches whose outputs are not fetched yet


@dataclasses.dataclass(frozen=True)
class Inference:
    """A network in evaluation mode, and the images that it is shown.

    Attributes:
      programs: compiled functions.
      feed: of the images.
      batch_size: images a call.
      network: on the devices.
      context: of the evaluation, on the devices.
    """

    programs: Programs
    feed: Feed
    batch_size: int
    network: Network
    context: StepContext


class Predictions(NamedTuple):
    """What `predict` finds for N images.

    Attributes:
      valid: bool [N]; False for images that are skipped, for which the rest has no
        meaning.
      classes: int32 [N], predicted positions in the class order.
      top5: bool [N], whether the label is among the five highest scores.
      features: float32 [N, D].
    """

    valid: np.ndarray
    classes: np.ndarray
    top5: np.ndarray
    features: np.ndarray


def predict(inference: Inference, indices: np.ndarray) -> Predictions:
    """Classifies images, int [N], by the highest score among the seen classes."""
    arguments = (inference.network, inference.context, inference.feed.resident)
    program = inference.programs.evaluate
    valid, *rest = _over_batches(program, arguments, inference, indices, "evaluation")
    return Predictions(valid > 0, *rest)


def features(
    inference: Inference, indices: np.ndarray, view: str = "plain"
) -> tuple[np.ndarray, np.ndarray]:
    """Features of the test transform.

    Args:
      inference: the network and the images.
      indices: int [N], of the images.
      view: of the images, one of compute.views.VIEWS.

    Returns:
      Which images are not skipped, bool [N], and features, float32 [N, D].
    """
    number = parallel.replicate(inference.programs.devices, np.int32(VIEWS.index(view)))
    arguments = (inference.network, inference.context, inference.feed.resident, number)
    program = inference.programs.features
    valid, found = _over_batches(program, arguments, inference, indices, "features")
    return valid > 0, found


def features_by_group(
    inference: Inference, groups: Sequence[np.ndarray], view: str = "plain"
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Features of several groups of images, in one pass over all of them.

    Returns:
      For each group the indices of its images that are not skipped, and their features.
    """
    valid, found = features(inference, np.concatenate(groups), view)
    ends = np.cumsum([len(indices) for indices in groups])[:-1]
    return [
        (indices[kept], part[kept])
        for indices, kept, part in zip(
            groups, np.split(valid, ends), np.split(found, ends), strict=True
        )
    ]


def _over_batches(
    program: Callable,
    arguments: tuple,
    inference: Inference,
    indices: np.ndarray,
    what: str,
) -> tuple[np.ndarray, ...]:
    """Runs a program over [1, B] rows; outputs joined along the images.

    `what` is shown where it takes long.
    """
    batch_size = inference.batch_size
    plan = batches.InOrder(np.asarray(indices), batch_size)
    found: list[tuple[np.ndarray, ...]] = []
    pending: collections.deque[tuple] = collections.deque()

    def fetch() -> None:
        count = min(batch_size, len(indices) - len(found) * batch_size)
        found.append(parallel.fetch(pending.popleft(), count))

    with contextlib.closing(inference.feed.groups(plan)) as groups:
        shown = passing(
            groups, len(indices), batch_size, what, enabled=parallel.is_first()
        )
        for rows in shown:
            pending.append(program(*arguments, rows))
            if len(pending) > IN_FLIGHT:  # or streamed images pile up on the devices
                fetch()
    while pending:
        fetch()
    return tuple(
        np.concatenate([part[0] for part in parts])
        for parts in zip(*found, strict=True)
    )
