"""Trains a phase of a step: plans batches, calls compiled updates, keeps history."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from bsce_jax.compute import parallel
from bsce_jax.compute.state import (
    COMPANIONS,
    HELD_OUT,
    MEMORY,
    TRAIN,
    Rows,
    Schedule,
    StepContext,
    TrainState,
)
from bsce_jax.data import batches
from bsce_jax.data.companions import Companions
from bsce_jax.errors import UserError
from bsce_jax.run.feed import Feed
from bsce_jax.run.phases import StepData
from bsce_jax.run.programs import Programs


class NotFiniteError(UserError):
    """The training loss or the network became NaN or infinite."""


@dataclasses.dataclass
class History:
    """What happened in a phase of a step so far; JSON-able, part of every checkpoint.

    Attributes:
      updates: updates done.
      loss: mean training loss of each finished epoch.
      accuracy: training accuracy of each finished epoch, percent.
      alpha: [update, alpha] at the end of each epoch (Meta only).
      sums: loss * images, correct and images of the unfinished epoch.
    """

    updates: int = 0
    loss: list[float] = dataclasses.field(default_factory=list)
    accuracy: list[float] = dataclasses.field(default_factory=list)
    alpha: list[list[float]] = dataclasses.field(default_factory=list)
    sums: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0, 0.0])


@dataclasses.dataclass(frozen=True)
class Training:
    """Every batch of a phase of a step, from a few numbers.

    Attributes:
      data: of the phase and step: its images, and the phase itself.
      seed: what the order of images and all randomness depend on, with the step.
      batch_size: images of the global batch.
      alpha_every: updates from one update of alpha to the next; 0 = none.
      held_out_batch_size: images of a batch of B_t.
    """

    data: StepData
    seed: int
    batch_size: int
    alpha_every: int = 0
    held_out_batch_size: int = 0

    @property
    def training_batches(self) -> batches.Shuffled | batches.Replayed:
        """The training batches, one an update."""
        data, phase = self.data, self.data.phase
        if len(data.replayed):
            return batches.Replayed(
                data.train,
                data.replayed,
                self.batch_size,
                phase.replay,
                phase.epochs,
                self.seed,
                data.step,
                phase.first_epoch,
            )
        return batches.Shuffled(
            data.train,
            self.batch_size,
            phase.epochs,
            self.seed,
            data.step,
            phase.first_epoch,
            data.sampler,
        )

    @property
    def held_out_batches(self) -> batches.Cycled:
        """The batches of B_t, one an update of alpha."""
        draws = -(-self.updates // self.alpha_every)
        return batches.Cycled(
            self.data.held_out,
            self.held_out_batch_size,
            draws,
            self.seed,
            self.data.step,
        )

    def memory_batches(self, updates: int) -> batches.Cycled:
        """The batches of exemplars beside those of the first updates."""
        return batches.Cycled(
            self.data.memory,
            self.data.phase.beside_size,
            updates,
            self.seed,
            self.data.step,
            batches.BESIDE,
        )

    @property
    def with_companions(self) -> bool:
        """Whether companions go with each image."""
        return self.data.phase.beside == "companions"

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """One an epoch."""
        return self.data.phase.learning_rates(self.data.step)

    @property
    def updates_per_epoch(self) -> int:
        """Batches of an epoch, the last partial one included."""
        return self.training_batches.per_epoch

    @property
    def updates(self) -> int:
        """Updates of the whole phase."""
        return len(self.training_batches)

    def __str__(self) -> str:
        """What messages call it: step 2, phase incremental."""
        return f"step {self.data.step}, phase {self.data.phase.name}"


def make_training(config: ConfigDict, data: StepData) -> Training:
    """The training of a phase of a step."""
    return Training(
        data=data,
        seed=config.seed,
        batch_size=data.phase.batch_size,
        alpha_every=config.meta.every if len(data.held_out) else 0,
        held_out_batch_size=config.meta.batch_size,
    )


@dataclasses.dataclass(frozen=True)
class Loop:
    """What runs a training.

    Attributes:
      programs: compiled functions.
      feed: of the training images.
      training: the batches.
      companions: the table of an epoch of it, see `Companions`; where the
        training has companions.
    """

    programs: Programs
    feed: Feed
    training: Training
    companions: Callable[[int], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Watch:
    """What a training reports to, and asks.

    Attributes:
      after_call: called with the history and the images of a finished call.
      due: whether it is time to save.
      save: called with a state and the history that belongs to it.
      stop: number of the signal that asks the run to end, or 0.
    """

    after_call: Callable[[History, int], None]
    due: Callable[[], bool]
    save: Callable[[TrainState, History], None]
    stop: Callable[[], int]


def fit(
    loop: Loop,
    state: TrainState,
    context: StepContext,
    history: History,
    watch: Watch,
) -> TrainState:
    """Runs the updates of a training from `history.updates` to the end.

    Metrics are fetched one call late, so that the devices never wait for the host, and
    so is what the processes agree on: to save when one of them is due, and to stop at
    the same update when one of them was asked to.

    Args:
      loop: what to run.
      state: training state on the devices; its buffers are reused.
      context: the phase's constants on the devices.
      history: updated in place.
      watch: what is told and asked meanwhile.

    Raises:
      NotFiniteError: the loss or the network is not finite; names step and update.
      StopRequested: a stop was asked for, after saving.
    """
    pending: tuple[int, int, dict[str, Any]] | None = None
    asked: Any = (0, 0)
    done = history.updates

    def note() -> None:
        nonlocal pending
        if pending is not None:
            watch.after_call(history, _record(loop.training, history, *pending))
            pending = None

    with contextlib.closing(calls(loop, done)) as planned:
        for count, arguments in planned:
            update = program(loop, done)
            state, metrics = update(state, context, loop.feed.resident, *arguments)
            note()
            number, wanted = (int(value) for value in asked)
            pending = done, count, metrics
            done += count
            if wanted or number:
                note()
                watch.save(state, history)
            if number:
                raise StopRequested(loop.training.data.step, done, number)
            # After the save: what was due before it is due no more.
            asked = parallel.largest(loop.programs.devices, (watch.stop(), watch.due()))
    note()
    return state


class StopRequested(Exception):  # noqa: N818
    """The run was asked to end and has saved."""

    def __init__(self, step: int, update: int, number: int) -> None:
        """Names step and update after which the run has saved, and the signal."""
        super().__init__(f"stopped in step {step} after update {update}; saved")
        self.number = number


def call(
    loop: Loop, state: TrainState, context: StepContext, first: int, count: int
) -> tuple[TrainState, dict[str, Any]]:
    """Dispatches updates `first` to `first + count` as one compiled call."""
    with contextlib.closing(calls(loop, first, count)) as planned:
        _, arguments = next(planned)
        update = program(loop, first)
        return update(state, context, loop.feed.resident, *arguments)


def program(loop: Loop, first: int) -> Callable:
    """What runs the call that begins with update `first`."""
    programs, name = loop.programs, loop.training.data.phase.name
    if _updates_alpha(loop, first):
        return programs.meta_updates[name]
    return programs.updates[name]


def _updates_alpha(loop: Loop, first: int) -> bool:
    """Whether a call begins with an update of alpha."""
    every = loop.training.alpha_every
    return every > 0 and first % every == 0


def calls(loop: Loop, first: int, count: int = 0) -> Generator[tuple[int, list[Any]]]:
    """Yields the updates and the arguments of one call after another, from `first` on.

    The arguments are those after the images. `count` limits the first call.
    """
    for stop in _ends(loop, first):
        yield from _calls_until(loop, first, stop, count)
        first, count = stop, 0


def _ends(loop: Loop, first: int) -> Iterator[int]:
    """Where calls must end: with an epoch, whose end settles the next companions.

    A call of several updates that begins inside a group of alpha's must end with it.
    """
    training, every = loop.training, loop.training.alpha_every
    while first < training.updates:
        stop = training.updates
        if training.with_companions:
            each = training.updates_per_epoch
            stop = (first // each + 1) * each
        if every and loop.programs.updates_per_call > 1 and first % every:
            stop = min(stop, (first // every + 1) * every)
        yield stop
        first = stop


def _calls_until(
    loop: Loop, first: int, stop: int, count: int
) -> Generator[tuple[int, list[Any]]]:
    """The calls from update `first` to `stop`; `count` limits the first one."""
    training, every = loop.training, loop.training.alpha_every
    place, width = loop.programs.devices, loop.programs.updates_per_call
    with contextlib.ExitStack() as stack:

        def groups(plan: batches.Batches, start: int, size: int) -> Generator[Rows]:
            return stack.enter_context(
                contextlib.closing(loop.feed.groups(plan, start, size))
            )

        plan = training.training_batches
        plans: dict[str, batches.Batches] = {TRAIN: plan}
        if len(training.data.memory):
            plans[MEMORY] = training.memory_batches(stop)
        if loop.companions is not None:
            assert isinstance(plan, batches.Shuffled)
            epoch = first // training.updates_per_epoch
            plans[TRAIN] = batches.Leading(plan, stop)
            table = loop.companions(epoch)
            plans[COMPANIONS] = Companions(plan, epoch, table)
        opened = {name: groups(plan, first, width) for name, plan in plans.items()}
        if every:
            start, size = (-(-n // every) for n in (first, width))
            held_out = groups(training.held_out_batches, start, size)
        while first < stop:
            count = min(count or width, stop - first)
            schedule = make_schedule(training, first, count, width)
            streams = {name: next(rows) for name, rows in opened.items()}
            if _updates_alpha(loop, first):
                streams[HELD_OUT] = next(held_out)
            yield (
                count,
                [
                    parallel.replicate(place, np.int32(count)),
                    parallel.replicate(place, schedule),
                    streams,
                ],
            )
            first, count = first + count, 0


def make_schedule(training: Training, first: int, count: int, width: int) -> Schedule:
    """Of `count` updates, padded to `width`."""
    updates = first + np.minimum(np.arange(width), count - 1)
    epochs, within = np.divmod(updates, training.updates_per_epoch)
    constant = np.ones(width, np.int32)
    first_epoch = training.data.phase.first_epoch
    return Schedule(
        seed=training.seed * constant,
        step=training.data.step * constant,
        epoch=(first_epoch + epochs).astype(np.int32),
        update=within.astype(np.int32),
        learning_rate=np.asarray(training.learning_rates, np.float32)[epochs],
    )


def _record(
    training: Training,
    history: History,
    first: int,
    count: int,
    metrics: dict[str, Any],
) -> int:
    """Adds a call's metrics to the history; returns its number of images."""
    fetched = {name: np.asarray(value)[:count] for name, value in metrics.items()}
    images = 0
    for i in range(count):
        loss, n = float(fetched["loss"][i]), float(fetched["images"][i])
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"the loss is {loss} in {training} at update {first + i}"
            )
        images += int(n)
        values = (loss * n, float(fetched["correct"][i]), n)
        history.sums = [a + b for a, b in zip(history.sums, values, strict=True)]
        history.updates = first + i + 1
        if history.updates % training.updates_per_epoch == 0:
            total = history.sums[2]
            history.loss.append(history.sums[0] / total)
            history.accuracy.append(100.0 * history.sums[1] / total)
            history.sums = [0.0, 0.0, 0.0]
            if training.alpha_every:
                alpha = float(fetched["alpha"][i])
                history.alpha.append([history.updates, alpha])
    if not fetched["finite"].all():
        last = first + count - 1
        raise NotFiniteError(
            f"the network is not finite in {training} after update {last}"
        )
    return images
