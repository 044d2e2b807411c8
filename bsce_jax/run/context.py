"""The constants of a phase of a step, and of an evaluation, on the devices."""

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from bsce_jax import log_prior
from bsce_jax.compute import optim, parallel
from bsce_jax.compute.state import Network, StepContext
from bsce_jax.config import priors, terms
from bsce_jax.run.dataset import Dataset
from bsce_jax.run.phases import StepData


def phase_context(
    config: ConfigDict, dataset: Dataset, data: StepData, network: Network
) -> StepContext:
    """The constants of a phase of a step but for its teacher, NumPy arrays.

    Args:
      config: resolved configuration.
      dataset: the whole data set.
      data: of the phase.
      network: any with the shapes of the one in training.
    """
    phase = data.phase
    old, seen, task_ids = _classes(dataset.num_classes, _seen(dataset, data.step))
    counts = data.counts.astype(np.float32)
    used = terms.of_phase(config.terms, config.phase[phase.name].terms)
    weights = {
        name: np.float32(terms.weight(name, term, data.num_old, data.num_seen))
        for name, term in used.items()
    }
    rows = seen & ~old if phase.rows == "new" else seen
    taught = {"before": old, "now": seen, "none": np.zeros_like(old)}[phase.teacher]
    return StepContext(
        log_prior=priors.log_prior(config, counts, old, seen),
        old=old,
        seen=seen,
        taught=taught,
        counts=counts,
        task_ids=task_ids,
        weights=weights,
        update_scale=optim.update_scale(network.params, phase.rate, rows),
        teacher=None,
        decay=np.float32(_decay(config, len(dataset.groups), data.step)),
    )


def _decay(config: ConfigDict, steps: int, step: int) -> float:
    """Factor of the weight decay in a step, of as many."""
    falls = config.optim.weight_decay_by_step == "groups/step"
    return steps / (step + 1) if falls else 1.0


def has_teacher(data: StepData) -> bool:
    """Whether there is a teacher in a phase of a step: in the base step none before."""
    teacher = data.phase.teacher
    return teacher == "now" or (teacher == "before" and data.step > 0)


def evaluation_context(
    dataset: Dataset, devices: parallel.Parallel, step: int
) -> StepContext:
    """What a forward pass may ask after a step, outside of training; on the devices."""
    context = test_context(dataset.num_classes, _seen(dataset, step))
    return parallel.replicate(devices, context)


def test_context(num_classes: int, seen: Sequence[int]) -> StepContext:
    """The context of predictions: no teacher, no loss, the plain softmax.

    Args:
      num_classes: length of the class axis.
      seen: number of classes seen after each step, up to the network's.
    """
    old, now, task_ids = _classes(num_classes, seen)
    return StepContext(
        log_prior=np.asarray(log_prior.uniform(now)),
        old=old,
        seen=now,
        taught=np.zeros_like(old),
        counts=np.zeros(num_classes, np.float32),
        task_ids=task_ids,
        weights={},
        update_scale={},
        teacher=None,
    )


def _seen(dataset: Dataset, step: int) -> list[int]:
    """Number of classes seen after each step, up to `step`."""
    return [group.stop for group in dataset.groups[: step + 1]]


def _classes(
    num_classes: int, seen: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Old and seen classes, bool [C], and the step of each, int32 [C], -1 if unseen."""
    positions = np.arange(num_classes)
    old = positions < (seen[-2] if len(seen) > 1 else 0)
    now = positions < seen[-1]
    steps = np.searchsorted(seen, positions, side="right")
    return old, now, np.where(now, steps, -1).astype(np.int32)
