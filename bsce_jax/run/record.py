"""What a step's record says: accuracies on all classes seen, losses, fingerprint."""

import hashlib
from typing import Any

import jax
import numpy as np

from bsce_jax import memory, metrics, nearest_mean
from bsce_jax.compute import parallel
from bsce_jax.compute.state import TrainState
from bsce_jax.run import evaluate, phases
from bsce_jax.run.dataset import exemplars_per_class
from bsce_jax.run.progress import Progress
from bsce_jax.run.setup import Run


def step_result(run: Run, progress: Progress) -> dict[str, Any]:
    """The step's `result` in results.json (see bsce_jax.report.results)."""
    config, dataset, state = run.config, run.dataset, progress.state
    data = phases.step_data(config, dataset, progress.ranking, progress.step)
    images = np.flatnonzero(dataset.test_labels < data.num_seen)
    labels = dataset.test_labels[images]
    seen = np.arange(dataset.num_classes) < data.num_seen
    found = evaluate.predict(
        run.programs,
        state.params,
        state.batch_stats,
        parallel.replicate(run.programs.parallel, seen),
        run.test,
        images,
        config.evaluation.batch_size,
    )
    _, predicted, top5, features = (array[found.valid] for array in found)
    labels = labels[found.valid]
    confusion = metrics.confusion_matrix(labels, predicted, dataset.num_classes)

    def percent(first: int, last: int) -> float:
        return 100.0 * metrics.accuracy(confusion, slice(first, last))

    groups = dataset.groups[: progress.step + 1]
    main = progress.main or progress.history
    by_task = [percent(group.start, group.stop) for group in groups]
    return {
        "num_old": data.num_old,
        "num_seen": data.num_seen,
        "train_images": len(data.train),
        "memory_images": data.exemplars,
        "counts": [int(n) for n in data.counts[: data.num_seen]],
        "top1": percent(0, data.num_seen),
        "top5": 100.0 * float(np.mean(top5)) if data.num_seen > 5 else None,
        "top1_base": by_task[0],
        "top1_old": percent(0, data.num_old) if data.num_old else None,
        "top1_new": by_task[-1],
        "top1_by_task": by_task,
        "top1_nearest_mean": _nearest_mean(run, progress, features, labels),
        "loss": main.loss,
        "train_accuracy": main.accuracy,
        "alpha": main.alpha,
        "finetune_loss": progress.history.loss if progress.main else [],
        "parameters_sha256": _fingerprint(state),
        "confusion": [
            [int(i), int(j), int(confusion[i, j])] for i, j in np.argwhere(confusion)
        ],
    }


def _nearest_mean(
    run: Run, progress: Progress, features: np.ndarray, labels: np.ndarray
) -> float | None:
    """Accuracy of the nearest mean of exemplars, in percent; None without a memory.

    Mirrored exemplars enter the means too where the training images are mirrored.
    """
    config, state = run.config, progress.state
    num_seen = run.dataset.groups[progress.step].stop
    size = exemplars_per_class(config, num_seen)
    if not (size and config.evaluation.nearest_mean):
        return None
    images, classes = memory.exemplars(progress.ranking, num_seen, size)
    views = [
        evaluate.features(
            run.programs,
            state.params,
            state.batch_stats,
            run.train,
            images,
            config.evaluation.batch_size,
            mirrored,
        )
        for mirrored in ((False, True) if config.data.flip else (False,))
    ]
    valid = views[0][0]
    means = nearest_mean.class_means(
        [found[valid] for _, found in views], classes[valid], num_seen
    )
    return 100.0 * float(np.mean(nearest_mean.classify(features, means) == labels))


def _fingerprint(state: TrainState) -> str:
    """SHA-256 of the network's arrays."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get((state.params, state.batch_stats))):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
