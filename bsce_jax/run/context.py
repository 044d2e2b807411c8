"""The constants of an incremental step or of its fine-tuning, on the devices."""

import numpy as np
from ml_collections import ConfigDict

from bsce_jax import log_prior
from bsce_jax.compute import optim, parallel
from bsce_jax.compute.state import PyTree, StepContext
from bsce_jax.config import terms
from bsce_jax.run import phases
from bsce_jax.run.progress import Progress
from bsce_jax.run.setup import Run


def make_context(run: Run, progress: Progress, data: phases.StepData) -> StepContext:
    """The step's constants on the devices.

    The log-prior is shifted to a maximum of 0, which changes no loss (Eq. 3 to 6
    depend on ratios only), so that equal counts give the very same base step.
    """
    config, dataset = run.config, run.dataset
    positions = np.arange(dataset.num_classes)
    old, seen = positions < data.num_old, positions < data.num_seen
    counts = data.counts.astype(np.float32)
    if config.prior == "none":
        prior = log_prior.uniform(seen)
    elif config.prior == "relaxed":
        prior = log_prior.relaxed(counts, old, epsilon_count(config))
    else:
        prior = log_prior.balanced(counts)
    shifted = np.asarray(prior)
    shifted = np.where(shifted > log_prior.EXCLUDED, shifted - shifted.max(), shifted)
    task_ids = np.zeros(dataset.num_classes, np.int32)
    for task, group in enumerate(dataset.groups):
        task_ids[group.start : group.stop] = task
    weights = {
        name: np.float32(terms.weight(name, term, data.num_old, data.num_seen))
        for name, term in config.terms.items()
    }
    context = StepContext(
        log_prior=shifted.astype(np.float32),
        old=old,
        seen=seen,
        counts=counts,
        task_ids=task_ids,
        weights=weights,
        update_scale=_update_scale(config, progress.state.params, data, old, seen),
        teachers=(progress.teacher,) if data.step else (),
    )
    return parallel.replicate(run.programs.parallel, context)


def _update_scale(
    config: ConfigDict,
    params: PyTree,
    data: phases.StepData,
    old: np.ndarray,
    seen: np.ndarray,
) -> PyTree:
    """Main training may hold the old rows; fine-tuning moves all, or nothing else."""
    if data.phase == "main":
        held = old if config.optim.freeze_old_rows else np.zeros_like(old)
        return optim.update_scale(params, seen & ~held)
    rest = 1.0 if config.finetune.trainable == "all" else 0.0
    return optim.update_scale(params, seen, rest=rest, scalars=rest)


def epsilon_count(config: ConfigDict) -> float:
    """Epsilon of Eq. 6 as a number of images (500 a class: 0.2 % is 1)."""
    if config.epsilon_unit == "percent":
        return config.epsilon / 100.0 * config.data.nominal_per_class
    return config.epsilon
