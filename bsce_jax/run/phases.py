"""What a run will do, before it does it: data, classes of each step, exemplars."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from bsce_jax import memory
from bsce_jax.data import sampling
from bsce_jax.run.dataset import Dataset, exemplars_per_class


@dataclasses.dataclass(frozen=True)
class StepData:
    """The images of one phase of a step, as indices into the training images.

    Attributes:
      phase: "main", or "finetune" on the exemplars of all classes.
      step: 0 is the base step.
      num_old, num_seen: classes before the step, and with it.
      train: int32, D_t: new images and exemplars, without the held-out ones.
      held_out: int32, the balanced B_t of Meta; empty for every other prior.
      counts: int [C], images of each class in `train`.
      exemplars: how many of the old classes' images there are in `train` and
        `held_out` together.
      sampler: of `train`, where images are not drawn once an epoch each.
    """

    phase: str
    step: int
    num_old: int
    num_seen: int
    train: np.ndarray
    held_out: np.ndarray
    counts: np.ndarray
    exemplars: int
    sampler: sampling.Sampler | None = None


def empty_ranking(config: ConfigDict, dataset: Dataset) -> np.ndarray:
    """int32 [C, M] of -1: each class's exemplars in order of choice, none yet."""
    longest = max(exemplars_per_class(config, g.stop) for g in dataset.groups)
    return np.full((dataset.num_classes, longest), -1, np.int32)


def step_data(
    config: ConfigDict, dataset: Dataset, ranking: np.ndarray, step: int
) -> StepData:
    """The training set of a step: its new classes' images and the exemplars.

    Args:
      config: resolved configuration.
      dataset: the whole data set.
      ranking: int32 [C, M], the old classes' exemplars in order of choice.
      step: 0 is the base step.
    """
    group = dataset.groups[step]
    labels = dataset.train_labels
    train = np.flatnonzero((labels >= group.start) & (labels < group.stop))
    train = train.astype(np.int32)
    num_old = group.start
    size = exemplars_per_class(config, num_old) if num_old else 0
    stored, _ = memory.exemplars(ranking, num_old, size)
    train = np.concatenate([train, stored.astype(np.int32)])
    held_out = np.zeros(0, np.int32)
    if config.prior == "meta" and num_old:
        held = memory.held_out_per_class(size, config.meta.fraction)
        rng = np.random.default_rng([config.seed, step, _HELD_OUT])
        train, held_out = memory.balanced_split(train, labels[train], held, rng)
    counts = np.bincount(labels[train], minlength=dataset.num_classes)
    kept = len(stored)
    sampler = None
    if kept and config.sampling == "memory":
        sampler = sampling.memory(labels[train], num_old)
    elif kept and config.sampling == "class":
        sampler = sampling.classes(labels[train])
    return StepData(
        "main", step, num_old, group.stop, train, held_out, counts, kept, sampler
    )


def has_finetuning(config: ConfigDict, dataset: Dataset, step: int) -> bool:
    """Whether an incremental step ends with fine-tuning on exemplars of all classes."""
    size = exemplars_per_class(config, dataset.groups[step].stop)
    return step > 0 and config.finetune.epochs > 0 and size > 0


def finetune_data(
    config: ConfigDict, dataset: Dataset, ranking: np.ndarray, step: int
) -> StepData:
    """The balanced training set of a step's fine-tuning: the exemplars it leaves.

    Arguments as for `step_data`, with the new classes ranked too.
    """
    group = dataset.groups[step]
    size = exemplars_per_class(config, group.stop)
    train, labels = memory.exemplars(ranking, group.stop, size)
    counts = np.bincount(labels, minlength=dataset.num_classes)
    nothing = np.zeros(0, np.int32)
    old = group.start
    return StepData(
        "finetune", step, old, group.stop, train, nothing, counts, old * size
    )


def planned_phases(config: ConfigDict, dataset: Dataset) -> list[StepData]:
    """Every phase's data, with stand-ins for exemplars that are not chosen yet."""
    ranking = empty_ranking(config, dataset)
    for position in range(dataset.num_classes):
        images = np.flatnonzero(dataset.train_labels == position)
        ranking[position] = images[: ranking.shape[1]]
    planned = []
    for step in range(len(dataset.groups)):
        planned.append(step_data(config, dataset, ranking, step))
        if has_finetuning(config, dataset, step):
            planned.append(finetune_data(config, dataset, ranking, step))
    return planned


_HELD_OUT = 1  # keeps this stream of random numbers apart from the epoch orders'
