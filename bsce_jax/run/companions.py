"""Which images go with which: a method's choice among the images of an epoch.

It is made anew for every epoch, from the teacher's features of the very images that are
trained on, and never saved: teacher and random keys settle it.
"""

import collections
import contextlib

import numpy as np

from bsce_jax import methods
from bsce_jax.compute import parallel
from bsce_jax.compute.state import StepContext
from bsce_jax.data import batches
from bsce_jax.data.companions import epoch_images
from bsce_jax.run.evaluate import IN_FLIGHT
from bsce_jax.run.loop import Loop, make_schedule
from bsce_jax.run.setup import Run
from bsce_jax.telemetry.bar import passing


def table(run: Run, loop: Loop, context: StepContext, epoch: int) -> np.ndarray:
    """The companions of each image of an epoch.

    Args:
      run: whose method chooses.
      loop: of the phase.
      context: of the phase, with its teacher, on the devices.
      epoch: of the phase, counted from 0.

    Returns:
      int32 [places of the epoch, K]: see `data.companions`.
    """
    data = loop.training.data
    plan = loop.training.training_batches
    assert isinstance(plan, batches.Shuffled)
    images = epoch_images(plan, epoch)
    each = plan.per_epoch
    shown = _features(loop, context, epoch * each, (epoch + 1) * each)
    valid, features = (part[: len(images)] for part in shown)
    labels = run.dataset.train_labels[images]
    found = methods.module(run.config.method).companions(
        features,
        np.where(valid, labels, -1),
        data.num_old,
        data.phase.beside_size,
        **run.config.options,
    )
    return np.asarray(found, np.int32)


def _features(
    loop: Loop, context: StepContext, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of the rows of some updates: whether there is an image, and its features."""
    training, programs = loop.training, loop.programs
    plan = batches.Leading(training.training_batches, stop)
    program = programs.epoch_features[training.data.phase.name]
    found: list[tuple[np.ndarray, np.ndarray]] = []
    pending: collections.deque[tuple] = collections.deque()

    def fetch() -> None:
        valid, features = parallel.fetch(pending.popleft(), plan.size)
        found.append((valid[0] > 0, features[0]))

    with contextlib.closing(loop.feed.groups(plan, start)) as groups:
        images = len(training.data.train)
        shown = passing(
            groups, images, plan.size, "companions", enabled=parallel.is_first()
        )
        for update, rows in enumerate(shown, start):
            schedule = make_schedule(training, update, 1, 1)
            schedule = parallel.replicate(programs.devices, schedule)
            arguments = (context.teacher, context, loop.feed.resident, schedule, rows)
            pending.append(program(*arguments))
            if len(pending) > IN_FLIGHT:
                fetch()
    while pending:
        fetch()
    valid, features = zip(*found, strict=True)
    return np.concatenate(valid), np.concatenate(features)
