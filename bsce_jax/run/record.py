"""What a step's record says: accuracies on all classes seen, losses, fingerprint."""

import hashlib
from typing import Any

import jax
import numpy as np

from bsce_jax import memory, metrics, nearest_mean
from bsce_jax.compute import parallel
from bsce_jax.compute.state import OWN, Network
from bsce_jax.report import results
from bsce_jax.run import evaluate
from bsce_jax.run.phases import training_set
from bsce_jax.run.progress import Progress
from bsce_jax.run.quotas import exemplars_per_class
from bsce_jax.run.setup import Run


def add_record(run: Run, progress: Progress) -> None:
    """Evaluates the network on all classes seen and appends the step's record."""
    result = step_result(run, progress)
    parallel.require_same(
        {"network": result["parameters_sha256"], "memory": progress.ranking.tolist()}
    )
    for earlier in run.results["steps"]:
        earlier["result"].pop("confusion", None)
    tested = sum(images for *_, images in result["confusion"])
    wanted = int(np.sum(run.dataset.test_labels < result["num_seen"]))
    telemetry = {
        **run.monitor.step_telemetry(),
        "skipped_test_images": wanted - tested,
        "gpu_graphs": run.programs.of_updates.kind,
    }
    found = {"result": result, "telemetry": telemetry}
    run.results["steps"].append({"step": progress.step, **found})
    run.results["summary"] = results.summary(run.results["steps"])
    if progress.step == len(run.dataset.groups) - 1:
        run.results["status"] = "done"
    updates = progress.before + progress.updates
    run.monitor.evaluated(progress.step, updates, result)


def step_result(run: Run, progress: Progress) -> dict[str, Any]:
    """The step's `result` in results.json (see bsce_jax.report.results)."""
    config, dataset, step = run.config, run.dataset, progress.step
    data = training_set(config, dataset, progress.ranking, step)
    groups = dataset.groups[: step + 1]
    num_old, num_seen = groups[-1].start, groups[-1].stop
    network = progress.state.network
    images = np.flatnonzero(dataset.test_labels < num_seen)
    labels = dataset.test_labels[images]
    found = evaluate.predict(run.inference(run.test, network, step), images)
    _, predicted, top5, features = (array[found.valid] for array in found)
    labels = labels[found.valid]
    confusion = metrics.confusion_matrix(labels, predicted, dataset.num_classes)
    counts = np.bincount(dataset.train_labels[data.train], minlength=num_seen)

    def percent(first: int, last: int) -> float:
        return 100.0 * metrics.accuracy(confusion, slice(first, last))

    by_task = [percent(group.start, group.stop) for group in groups]
    histories = progress.histories
    return {
        "num_old": num_old,
        "num_seen": num_seen,
        "train_images": len(data.train),
        "memory_images": data.exemplars,
        "counts": [int(n) for n in counts[:num_seen]],
        "top1": percent(0, num_seen),
        "top5": 100.0 * float(np.mean(top5)) if num_seen > 5 else None,
        "top1_base": by_task[0],
        "top1_old": percent(0, num_old) if num_old else None,
        "top1_new": by_task[-1],
        "top1_by_task": by_task,
        "top1_nearest_mean": _nearest_mean(run, progress, features, labels),
        "phases": {
            name: {"loss": history.loss, "accuracy": history.accuracy}
            for name, history in histories.items()
        },
        "alpha": [pair for history in histories.values() for pair in history.alpha],
        "own": _own(network),
        "parameters_sha256": _fingerprint(network),
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
    config, num_seen = run.config, run.dataset.groups[progress.step].stop
    size = exemplars_per_class(config, num_seen)
    if not (size and config.evaluation.nearest_mean):
        return None
    images, classes = memory.exemplars(progress.ranking, num_seen, size)
    inference = run.inference(run.train, progress.state.network, progress.step)
    views = [
        evaluate.features(inference, images, view)
        for view in ("plain", "mirrored")[: 1 + config.data.flip]
    ]
    valid = views[0][0]
    means = nearest_mean.class_means(
        [found[valid] for _, found in views], classes[valid], num_seen
    )
    return 100.0 * float(np.mean(nearest_mean.classify(features, means) == labels))


def _own(network: Network) -> dict[str, float]:
    """The scalars that the method has learned beside the model."""
    own = network.params.get(OWN, {})
    return {name: float(value) for name, value in own.items() if np.ndim(value) == 0}


def _fingerprint(network: Network) -> str:
    """SHA-256 of the network's arrays."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(network)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
