"""Trains a phase of a step: plans batches, calls compiled updates, keeps history."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from bsce_jax.compute import optim, parallel
from bsce_jax.compute.state import Rows, Schedule, StepContext, TrainState
from bsce_jax.data import batches, sampling
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
class Plan:
    """Every batch of a phase of a step's training, from a few numbers.

    Attributes:
      phase: "main" or "finetune".
      seed, step: what the order of images and all randomness depend on.
      train: int32, D_t; held_out: int32, B_t of Meta, else empty.
      batch_size: images of the global batch.
      epochs: passes over D_t, or of the sampler's draws.
      learning_rates: one an epoch.
      first_epoch: epochs of the phases before, which random numbers go on from.
      alpha_every: updates from one update of alpha to the next; 0 = none.
      held_out_batch_size: images of a batch of B_t.
      sampler: of `train`, where images are not drawn once an epoch each.
    """

    phase: str
    seed: int
    step: int
    train: np.ndarray
    held_out: np.ndarray
    batch_size: int
    epochs: int
    learning_rates: tuple[float, ...]
    first_epoch: int = 0
    alpha_every: int = 0
    held_out_batch_size: int = 0
    sampler: sampling.Sampler | None = None

    @property
    def training_batches(self) -> batches.Shuffled:
        """The training batches, one an update."""
        return batches.Shuffled(
            self.train,
            self.batch_size,
            self.epochs,
            self.seed,
            self.step,
            self.first_epoch,
            self.sampler,
        )

    @property
    def held_out_batches(self) -> batches.Cycled:
        """The batches of B_t, one an update of alpha."""
        draws = -(-self.updates // self.alpha_every)
        return batches.Cycled(
            self.held_out, self.held_out_batch_size, draws, self.seed, self.step
        )

    @property
    def updates_per_epoch(self) -> int:
        """Batches of an epoch, the last partial one included."""
        return self.training_batches.per_epoch

    @property
    def updates(self) -> int:
        """Updates of the whole step."""
        return len(self.training_batches)


def make_plan(config: ConfigDict, data: StepData) -> Plan:
    """The plan of a phase of a step: its main training or its fine-tuning."""
    o = config.optim
    first_epoch = 0
    if data.phase == "finetune":
        first_epoch, epochs = o.epochs, config.finetune.epochs
        rate, milestones = config.finetune.learning_rate, config.finetune.milestones
    elif data.step == 0:
        epochs, rate = o.base_epochs, o.base_learning_rate
        milestones = o.base_milestones
    else:
        epochs, rate, milestones = o.epochs, o.learning_rate, o.milestones
    if o.schedule == "cosine" and data.phase == "main":
        rates = [optim.lagged_cosine(rate, e, epochs) for e in range(epochs)]
    else:
        rates = [optim.step_decay(rate, e, milestones, o.decay) for e in range(epochs)]
    return Plan(
        phase=data.phase,
        seed=config.seed,
        step=data.step,
        train=data.train,
        held_out=data.held_out,
        batch_size=o.batch_size,
        epochs=epochs,
        learning_rates=tuple(rates),
        first_epoch=first_epoch,
        alpha_every=config.meta.every if len(data.held_out) else 0,
        held_out_batch_size=config.meta.batch_size,
        sampler=data.sampler,
    )


def fit(
    programs: Programs,
    state: TrainState,
    context: StepContext,
    feed: Feed,
    plan: Plan,
    history: History,
    *,
    after_call: Callable[[History, int], None],
    due: Callable[[], bool],
    save: Callable[[TrainState, History], None],
    stop: Callable[[], int],
) -> TrainState:
    """Runs the plan's updates from `history.updates` to the end.

    Metrics are fetched one call late, so that the devices never wait for the host, and
    so is what the processes agree on: to save when one of them is due, and to stop at
    the same update when one of them was asked to.

    Args:
      programs: compiled functions.
      state: training state on the devices; its buffers are reused.
      context: the step's constants on the devices.
      feed: of the training images.
      plan: the batches.
      history: updated in place.
      after_call: called with the history and the images of a finished call.
      due: whether it is time to save.
      save: called with a state and the history that belongs to it.
      stop: number of the signal that asks the run to end, or 0.

    Raises:
      NotFiniteError: the loss or the network is not finite; names step and update.
      StopRequested: `stop` was asked, after saving.
    """
    pending: tuple[int, int, dict[str, Any]] | None = None
    asked: Any = (0, 0)
    done = history.updates
    with contextlib.closing(calls(programs, feed, plan, done)) as planned:
        for count, arguments in planned:
            program = _program(programs, plan, done)
            state, metrics = program(state, context, feed.resident, *arguments)
            if pending is not None:
                after_call(history, _record(plan, history, *pending))
            number, wanted = (int(value) for value in asked)
            pending = done, count, metrics
            done += count
            if wanted or number:
                after_call(history, _record(plan, history, *pending))
                pending = None
                save(state, history)
            if number:
                raise StopRequested(plan.step, done, number)
            # After the save: what was due before it is due no more.
            asked = parallel.largest(programs.parallel, (stop(), due()))
    if pending is not None:
        after_call(history, _record(plan, history, *pending))
    return state


class StopRequested(Exception):  # noqa: N818
    """The run was asked to end and has saved."""

    def __init__(self, step: int, update: int, number: int) -> None:
        """Names step and update after which the run has saved, and the signal."""
        super().__init__(f"stopped in step {step} after update {update}; saved")
        self.number = number


def call(
    programs: Programs,
    state: TrainState,
    context: StepContext,
    feed: Feed,
    plan: Plan,
    first: int,
    count: int,
) -> tuple[TrainState, dict[str, Any]]:
    """Dispatches updates `first` to `first + count` as one compiled call."""
    with contextlib.closing(calls(programs, feed, plan, first, count)) as planned:
        _, arguments = next(planned)
        program = _program(programs, plan, first)
        return program(state, context, feed.resident, *arguments)


def _program(programs: Programs, plan: Plan, first: int) -> Callable:
    """What runs the call that begins with update `first`."""
    if plan.phase == "finetune":
        assert programs.finetune_update is not None
        return programs.finetune_update
    if not plan.step:
        return programs.base_update
    if _updates_alpha(programs, plan, first):
        assert programs.meta_update is not None
        return programs.meta_update
    return programs.incremental_update


def _updates_alpha(programs: Programs, plan: Plan, first: int) -> bool:
    """Whether a call begins with an update of alpha: longer ones always do."""
    if not plan.alpha_every:
        return False
    return programs.updates_per_call > 1 or first % plan.alpha_every == 0


def calls(
    programs: Programs, feed: Feed, plan: Plan, first: int, count: int = 0
) -> Generator[tuple[int, list[Any]]]:
    """Yields the updates and the arguments of one call after another, from `first` on.

    The arguments are those after the images. `count` limits the first call.
    """
    place, width = programs.parallel, programs.updates_per_call
    with contextlib.ExitStack() as stack:

        def open_groups(
            source: batches.Batches, start: int, size: int
        ) -> Generator[Rows]:
            return stack.enter_context(
                contextlib.closing(feed.groups(source, start, size))
            )

        rows = open_groups(plan.training_batches, first, width)
        if plan.alpha_every:
            start, size = (-(-n // plan.alpha_every) for n in (first, width))
            held_out = open_groups(plan.held_out_batches, start, size)
        while first < plan.updates:
            count = min(count or width, plan.updates - first)
            schedule = _schedule(plan, first, count, width)
            arguments = [
                parallel.replicate(place, np.int32(count)),
                parallel.replicate(place, schedule),
                next(rows),
            ]
            if _updates_alpha(programs, plan, first):
                arguments.append(next(held_out))
            yield count, arguments
            first, count = first + count, 0


def _schedule(plan: Plan, first: int, count: int, width: int) -> Schedule:
    """Of `count` updates, padded to `width`."""
    updates = first + np.minimum(np.arange(width), count - 1)
    epochs, within = np.divmod(updates, plan.updates_per_epoch)
    constant = np.ones(width, np.int32)
    return Schedule(
        seed=plan.seed * constant,
        step=plan.step * constant,
        epoch=(plan.first_epoch + epochs).astype(np.int32),
        update=within.astype(np.int32),
        learning_rate=np.asarray(plan.learning_rates, np.float32)[epochs],
    )


def _record(
    plan: Plan, history: History, first: int, count: int, metrics: dict[str, Any]
) -> int:
    """Adds a call's metrics to the history; returns its number of images."""
    fetched = {name: np.asarray(value)[:count] for name, value in metrics.items()}
    phase = " of fine-tuning" if plan.phase == "finetune" else ""
    images = 0
    for i in range(count):
        loss, n = float(fetched["loss"][i]), float(fetched["images"][i])
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"the loss is {loss} in step {plan.step} at update {first + i}{phase}"
            )
        images += int(n)
        values = (loss * n, float(fetched["correct"][i]), n)
        history.sums = [a + b for a, b in zip(history.sums, values, strict=True)]
        history.updates = first + i + 1
        if history.updates % plan.updates_per_epoch == 0:
            total = history.sums[2]
            history.loss.append(history.sums[0] / total)
            history.accuracy.append(100.0 * history.sums[1] / total)
            history.sums = [0.0, 0.0, 0.0]
            if plan.alpha_every:
                alpha = float(fetched["alpha"][i])
                history.alpha.append([history.updates, alpha])
    if not fetched["finite"].all():
        last = first + count - 1
        raise NotFiniteError(
            f"the network is not finite in step {plan.step} after update {last}{phase}"
        )
    return images
