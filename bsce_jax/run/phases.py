"""The phases of a step: which run, on which images, and for how long.

A phase is a section of the configuration, `config.phase.<name>`: a program and the
steps in which it runs. What a phase trains on are indices into the training images.
"""

import dataclasses
import weakref
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from bsce_jax import memory
from bsce_jax.compute import optim
from bsce_jax.config import priors
from bsce_jax.data import sampling
from bsce_jax.run.dataset import Dataset
from bsce_jax.run.quotas import (
    exemplars_per_class,
    held_once,
    held_out_per_class,
    most_held_out,
)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase as it is configured (see config/fields.py), the same in all its steps.

    Attributes:
      name: of its section.
      steps: "base" or "later".
      images: "training", "held_out" or "exemplars".
      epochs: passes over its images, at least 1.
      batch_size: images of the global batch.
      first_epoch: epochs of the phases before it, which random numbers go on from.
      rates: the learning rate of each epoch, before `by_step`.
      by_step: "constant" or "1/step".
      sampling: "uniform", "memory" or "class".
      replay: exemplars of each batch beside the new images, or 0.
      beside: "", "memory" or "companions", a second stream.
      beside_size: images of its batches, or with each image.
      teacher: "before", "now" or "none".
      rows: "seen" or "new", rows of the head that move.
      rate: factor of each group of parameters.
      optimizer: "new" or "kept".
      begin: function of the method that changes the network as it begins, or "".
    """

    name: str
    steps: str
    images: str
    epochs: int
    batch_size: int
    first_epoch: int
    rates: tuple[float, ...]
    by_step: str
    sampling: str
    replay: int
    beside: str
    beside_size: int
    teacher: str
    rows: str
    rate: dict[str, float]
    optimizer: str
    begin: str

    def learning_rates(self, step: int) -> tuple[float, ...]:
        """One an epoch, in step number `step` (0 = base step)."""
        divisor = step + 1 if self.by_step == "1/step" else 1
        return tuple(rate / divisor for rate in self.rates)


def configured(config: ConfigDict) -> tuple[Phase, ...]:
    """The phases of a resolved configuration that exist, in order."""
    found: list[Phase] = []
    for name in config.phases:
        section = config.phase[name]
        if not section.epochs:
            continue
        epochs = _shortened(config, section.epochs)
        before = sum(p.epochs for p in found if p.steps == section.steps)
        found.append(
            Phase(
                name=name,
                epochs=epochs,
                batch_size=section.batch_size or config.optim.batch_size,
                first_epoch=before,
                rates=_rates(config, section, epochs),
                rate=section.rate.to_dict(),
                **{
                    field: section[field]
                    for field in (
                        "steps",
                        "images",
                        "by_step",
                        "sampling",
                        "replay",
                        "beside",
                        "beside_size",
                        "teacher",
                        "rows",
                        "optimizer",
                        "begin",
                    )
                },
            )
        )
    return tuple(found)


def _shortened(config: ConfigDict, epochs: int) -> int:
    """Epochs, or the epoch of a milestone, in a run that may be shortened."""
    return max(1, epochs // config.short)


def _rates(config: ConfigDict, section: ConfigDict, epochs: int) -> tuple[float, ...]:
    """The learning rate of each epoch of a phase."""
    rate = section.learning_rate
    if section.schedule == "cosine":
        return tuple(optim.lagged_cosine(rate, e, epochs) for e in range(epochs))
    milestones = [_shortened(config, mark) for mark in section.milestones]
    return tuple(
        optim.step_decay(rate, e, milestones, section.decay) for e in range(epochs)
    )


def of_step(phases: Sequence[Phase], step: int, exemplars: int) -> tuple[Phase, ...]:
    """The phases that run in a step.

    Args:
      phases: of the run.
      step: 0 is the base step.
      exemplars: of each class after the step; without any, phases that learn from
        exemplars or from held-out images do not run.
    """
    kind = "later" if step else "base"
    return tuple(
        phase
        for phase in phases
        if phase.steps == kind and (exemplars or phase.images == "training")
    )


def _none() -> np.ndarray:
    return np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True)
class StepData:
    """The images of one phase of a step, as indices into the training images.

    Attributes:
      phase: that learns from them.
      step: 0 is the base step.
      num_old, num_seen: classes before the step, and with it.
      train: int32, the images to learn from: of the whole training set D_t, new images
        and exemplars without the held-out ones.
      held_out: int32, the balanced B_t where alpha is learned on it; else empty.
      counts: int [C], images of each class in `train` and `replayed`.
      exemplars: how many of the old classes' images there are in `train` and
        `held_out` together.
      sampler: of `train`, where images are not drawn once an epoch each.
      replayed: int32, exemplars that each batch has some of beside images of `train`,
        where they are not part of that; else empty.
      memory: int32, exemplars of the second stream, where there is one; else empty.
    """

    phase: Phase
    step: int
    num_old: int
    num_seen: int
    train: np.ndarray
    held_out: np.ndarray
    counts: np.ndarray
    exemplars: int
    sampler: sampling.Sampler | None = None
    replayed: np.ndarray = dataclasses.field(default_factory=_none)
    memory: np.ndarray = dataclasses.field(default_factory=_none)


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """The images of an incremental step.

    Attributes:
      train: int32, D_t: new images and exemplars, without the held-out ones.
      held_out: int32, balanced over all classes seen; empty where nothing needs it.
      exemplars: how many of both are of old classes.
    """

    train: np.ndarray
    held_out: np.ndarray
    exemplars: int


def held_out_once(config: ConfigDict, dataset: Dataset) -> np.ndarray:
    """Training images that no phase but one on held-out images learns from.

    Returns:
      int32 [C, R]: of each class the R that the step which holds out the most does, as
      BiC's code has it; a step takes the first of them. R is 0 where they are drawn
      anew in each step.
    """
    most = most_held_out(config, dataset.groups) if held_once(config) else 0
    if not most:
        return np.zeros((dataset.num_classes, 0), np.int32)
    return _reserved(dataset, most, config.seed)


# As long as there is the data set: many ask, and a large one takes its time.
_known: weakref.WeakKeyDictionary[Dataset, dict[tuple[int, int], np.ndarray]]
_known = weakref.WeakKeyDictionary()


def _reserved(dataset: Dataset, count: int, seed: int) -> np.ndarray:
    """`memory.reserved` of a data set, drawn once; read-only."""
    drawn = _known.setdefault(dataset, {})
    if (count, seed) not in drawn:
        classes = dataset.num_classes
        found = memory.reserved(dataset.train_labels, classes, count, seed)
        found.setflags(write=False)
        drawn[count, seed] = found
    return drawn[count, seed]


def new_images(config: ConfigDict, dataset: Dataset, step: int) -> list[np.ndarray]:
    """Indices of the training images of each new class of a step, in their order.

    Without those that are held out once and for all.
    """
    labels = _trainable_labels(config, dataset)
    return [np.flatnonzero(labels == position) for position in dataset.groups[step]]


def _trainable_labels(config: ConfigDict, dataset: Dataset) -> np.ndarray:
    """The labels of the training images, -1 for those held out once and for all."""
    never = held_out_once(config, dataset)
    if not never.size:
        return dataset.train_labels
    labels = dataset.train_labels.copy()
    labels[never] = -1
    return labels


def training_set(
    config: ConfigDict, dataset: Dataset, ranking: np.ndarray, step: int
) -> TrainingSet:
    """The training set of a step: its new classes' images and the exemplars.

    Args:
      config: resolved configuration.
      dataset: the whole data set.
      ranking: int32 [C, M], the old classes' exemplars in order of choice.
      step: 0 is the base step.
    """
    group, labels = dataset.groups[step], _trainable_labels(config, dataset)
    new = np.flatnonzero((labels >= group.start) & (labels < group.stop))
    size = exemplars_per_class(config, group.start) if step else 0
    held = held_out_per_class(config, group.start) if step else 0
    stored, _ = memory.exemplars(ranking, group.start, size)
    train = np.concatenate([new.astype(np.int32), stored.astype(np.int32)])
    if not held:
        return TrainingSet(train, _none(), len(stored))
    if config.memory.held_out == "once":
        held_out = held_out_once(config, dataset)[: group.stop, :held]
        exemplars = len(stored) + held_out[: group.start].size
        return TrainingSet(train, held_out.ravel(), exemplars)
    rng = np.random.default_rng([config.seed, step, _HELD_OUT])
    train, drawn = memory.balanced_split(train, labels[train], held, rng)
    return TrainingSet(train, drawn, len(stored))


def step_data(
    config: ConfigDict, dataset: Dataset, ranking: np.ndarray, step: int, phase: Phase
) -> StepData:
    """The images of a phase of a step; arguments as for `training_set`.

    A phase on the exemplars needs those of the step's new classes in the ranking.
    """
    group, labels = dataset.groups[step], dataset.train_labels
    held_out = _none()
    if phase.images == "exemplars":
        size = exemplars_per_class(config, group.stop)
        train, _ = memory.exemplars(ranking, group.stop, size)
        exemplars = group.start * size
    else:
        found = training_set(config, dataset, ranking, step)
        train, exemplars = found.train, found.exemplars
        if phase.images == "held_out":
            train = found.held_out
        elif priors.learns_alpha_in(config, config.phase[phase.name]):
            held_out = found.held_out
    counts = np.bincount(labels[train], minlength=dataset.num_classes)
    sampler, replayed = None, _none()
    old = labels[train] < group.start
    stored = train[old] if phase.beside == "memory" else _none()
    if exemplars and phase.replay:
        train, replayed = train[~old], train[old]
    elif exemplars and phase.sampling == "memory":
        sampler = sampling.memory(labels[train], group.start)
    elif exemplars and phase.sampling == "class":
        sampler = sampling.classes(labels[train])
    return StepData(
        phase=phase,
        step=step,
        num_old=group.start,
        num_seen=group.stop,
        train=train,
        held_out=held_out,
        counts=counts,
        exemplars=exemplars,
        sampler=sampler,
        replayed=replayed,
        memory=stored,
    )


def phases_of(
    config: ConfigDict, dataset: Dataset, phases: Sequence[Phase], step: int
) -> tuple[Phase, ...]:
    """The phases that run in a step of a run."""
    size = exemplars_per_class(config, dataset.groups[step].stop)
    return of_step(phases, step, size)


def empty_ranking(config: ConfigDict, dataset: Dataset) -> np.ndarray:
    """int32 [C, M] of -1: each class's exemplars in order of choice, none yet."""
    longest = max(exemplars_per_class(config, g.stop) for g in dataset.groups)
    return np.full((dataset.num_classes, longest), -1, np.int32)


def planned(config: ConfigDict, dataset: Dataset) -> list[StepData]:
    """Every phase's data, with stand-ins for exemplars that are not chosen yet."""
    ranking = empty_ranking(config, dataset)
    for step, group in enumerate(dataset.groups):
        new = new_images(config, dataset, step)
        for position, images in zip(group, new, strict=True):
            chosen = images[: ranking.shape[1]]
            ranking[position, : len(chosen)] = chosen
    phases = configured(config)
    return [
        step_data(config, dataset, ranking, step, phase)
        for step in range(len(dataset.groups))
        for phase in phases_of(config, dataset, phases, step)
    ]


_HELD_OUT = 1  # a stream of random numbers of a step; see those in `run.hooks`
