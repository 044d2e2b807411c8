"""Trains a phase of a step: plans batches, calls compiled updates, keeps history."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from bsce_jax import optim, parallel
from bsce_jax.data import batches, sampling
from bsce_jax.errors import UserError
from bsce_jax.plan import StepData
from bsce_jax.programs import Programs
from bsce_jax.state import Images, Rows, Schedule, StepContext, TrainState


class NotFiniteError(UserError):
    """The training loss became NaN or infinite."""


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
    def updates_per_epoch(self) -> int:
        """Batches of an epoch, the last partial one included."""
        images = self.sampler.draws if self.sampler else len(self.train)
        return batches.updates_per_epoch(images, self.batch_size)

    @property
    def updates(self) -> int:
        """Updates of the whole step."""
        return self.epochs * self.updates_per_epoch


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
    data: Images,
    plan: Plan,
    history: History,
    *,
    after_call: Callable[[History, int], bool],
    save: Callable[[TrainState, History], None],
    stop: Callable[[], bool],
) -> TrainState:
    """Runs the plan's updates from `history.updates` to the end.

    Metrics are fetched one call late, so that the devices never wait for the host.

    Args:
      programs: compiled functions.
      state: training state on the devices; its buffers are reused.
      context: the step's constants on the devices.
      data: training images on the devices.
      plan: the batches.
      history: updated in place.
      after_call: called with the history and the images of the call; whether to
        save now.
      save: called with a state and the history that belongs to it.
      stop: whether the run should end: saves, then raises StopRequested.

    Raises:
      NotFiniteError: the loss is not finite; names step and update.
      StopRequested: `stop` was true, after saving.
    """
    pending: tuple[int, int, dict[str, Any]] | None = None
    done = history.updates
    while done < plan.updates:
        count = min(programs.updates_per_call, plan.updates - done)
        state, metrics = call(programs, state, context, data, plan, done, count)
        wanted = False
        if pending is not None:
            wanted = after_call(history, _record(plan, history, *pending))
        pending = done, count, metrics
        done += count
        stopping = stop()
        if wanted or stopping:
            after_call(history, _record(plan, history, *pending))
            pending = None
            save(state, history)
        if stopping:
            raise StopRequested(plan.step, done)
    if pending is not None:
        after_call(history, _record(plan, history, *pending))
    return state


class StopRequested(Exception):  # noqa: N818
    """The run was asked to end and has saved."""

    def __init__(self, step: int, update: int) -> None:
        """Names the step and the update after which the run has saved."""
        super().__init__(f"stopped in step {step} after update {update}; saved")


def call(
    programs: Programs,
    state: TrainState,
    context: StepContext,
    data: Images,
    plan: Plan,
    first: int,
    count: int,
) -> tuple[TrainState, dict[str, Any]]:
    """Dispatches updates `first` to `first + count` as one compiled call."""
    schedule, rows = _rows(plan, first, count, programs.updates_per_call)
    place = programs.parallel
    arguments = [
        state,
        context,
        data,
        parallel.replicate(place, np.int32(count)),
        parallel.replicate(place, schedule),
        parallel.shard(place, rows),
    ]
    if plan.phase == "finetune":
        assert programs.finetune_update is not None
        return programs.finetune_update(*arguments)
    if not plan.alpha_every:
        program = programs.incremental_update if plan.step else programs.base_update
        return program(*arguments)
    assert programs.meta_update is not None
    if programs.updates_per_call == 1 and first % plan.alpha_every:
        return programs.incremental_update(*arguments)
    held_out = _held_out_rows(plan, first, programs.updates_per_call)
    return programs.meta_update(*arguments, parallel.shard(place, held_out))


def _rows(plan: Plan, first: int, count: int, width: int) -> tuple[Schedule, Rows]:
    """Batches of `count` updates, padded to `width` updates."""
    indices, valid = batches.chunk(
        plan.train,
        plan.batch_size,
        first,
        count,
        width,
        seed=plan.seed,
        step=plan.step,
        first_epoch=plan.first_epoch,
        sampler=plan.sampler,
    )
    updates = first + np.minimum(np.arange(width), count - 1)
    epochs, within = np.divmod(updates, plan.updates_per_epoch)
    constant = np.ones(width, np.int32)
    schedule = Schedule(
        seed=plan.seed * constant,
        step=plan.step * constant,
        epoch=(plan.first_epoch + epochs).astype(np.int32),
        update=within.astype(np.int32),
        learning_rate=np.asarray(plan.learning_rates, np.float32)[epochs],
    )
    return schedule, Rows(indices, valid, _numbers(indices.shape))


def _held_out_rows(plan: Plan, first: int, width: int) -> Rows:
    """One batch of B_t for each update of alpha in `width` updates."""
    draws = range(-(-width // plan.alpha_every))
    indices = np.stack(
        [
            batches.cycled_rows(
                plan.held_out,
                plan.held_out_batch_size,
                first // plan.alpha_every + draw,
                seed=plan.seed,
                step=plan.step,
            )
            for draw in draws
        ]
    )
    return Rows(indices, np.ones(indices.shape, np.float32), _numbers(indices.shape))


def _numbers(shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)


def _record(
    plan: Plan, history: History, first: int, count: int, metrics: dict[str, Any]
) -> int:
    """Adds a call's metrics to the history; returns its number of images."""
    fetched = {name: np.asarray(value)[:count] for name, value in metrics.items()}
    images = 0
    for i in range(count):
        loss, n = float(fetched["loss"][i]), float(fetched["images"][i])
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"the loss is {loss} in step {plan.step} at update {first + i}"
                + (" of fine-tuning" if plan.phase == "finetune" else "")
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
    return images
