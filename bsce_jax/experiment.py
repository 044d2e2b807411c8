"""A run from the first step to the last.

For each step: data -> begin -> fit -> exemplars -> evaluate -> checkpoint. All that
must survive a crash is in the checkpoint; results.json is written from it.
"""

import hashlib
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from bsce_jax import (
    checkpoint,
    evaluate,
    memory,
    metrics,
    parallel,
    session,
    startup,
    training,
)
from bsce_jax import plan as planning
from bsce_jax import programs as compiled
from bsce_jax.config import config_hash, flatten
from bsce_jax.context import make_context
from bsce_jax.errors import UserError
from bsce_jax.monitor import Monitor
from bsce_jax.report import results as results_file
from bsce_jax.report import tables
from bsce_jax.session import Progress, Run
from bsce_jax.state import Images, TrainState


def run(
    config: ConfigDict, workdir: epath.PathLike, stop: startup.StopSignal
) -> dict[str, Any]:
    """Runs or resumes an experiment and returns its results.

    Args:
      config: resolved configuration.
      workdir: folder of everything the run writes; a run found there is continued.
      stop: asked after every call of a compiled update.

    Raises:
      UserError: bad input, a workdir of another configuration, a loss that is not
        finite, a disk that cannot be written.
      training.StopRequested: `stop` was set; everything is saved.
    """
    run = prepare(config, epath.Path(workdir))
    progress = session.restore(run)
    run.monitor.start(progress.before + progress.history.updates)
    for step in range(progress.step + progress.finished, len(run.dataset.groups)):
        if step > progress.step:
            progress = begin(run, progress, step)
        run.monitor.begin_step()
        train(run, progress, stop)
        select_exemplars(run, progress)
        record(run, progress)
        session.save(run, progress, finished=True)
    return finish(run)


def prepare(config: ConfigDict, workdir: epath.Path) -> Run:
    """Reads the data, places it on the devices and builds the programs."""
    devices = parallel.create(config.parallel)
    dataset = planning.load(config)
    results = {
        "schema": results_file.SCHEMA,
        "name": config.name,
        "status": "running",
        "config": flatten(config),
        "config_hash": config_hash(config),
        "base_hash": planning.base_hash(config, dataset),
        "class_names": list(dataset.class_names),
        "class_order": [int(i) for i in dataset.class_order],
        "image_shape": list(dataset.train_images.shape[1:]),
        "steps": [],
        "summary": results_file.summary([]),
    }

    def place(images: np.ndarray, labels: np.ndarray) -> Images:
        return parallel.replicate(devices, Images(images, labels.astype(np.int32)))

    updates = [
        training.make_plan(config, data).updates
        for data in planning.planned_steps(config, dataset)
    ]
    return Run(
        config,
        workdir,
        dataset,
        compiled.build(config, devices, dataset.num_classes),
        place(dataset.train_images, dataset.train_labels),
        place(dataset.test_images, dataset.test_labels),
        results,
        Monitor(workdir, len(updates), sum(updates), config.log_seconds),
    )


def begin(run: Run, progress: Progress, step: int) -> Progress:
    """Starts an incremental step: the trained network becomes the teacher.

    The optimiser starts anew, and so does alpha; the head's new rows still have
    their initial values.
    """
    programs = run.programs
    alpha = run.config.alpha if run.config.prior == "weighted" else 1.0
    state = jax.device_get(progress.state)
    state = state.replace(
        opt_state=jax.tree.map(np.zeros_like, state.opt_state),
        alpha=np.float32(alpha),
        alpha_opt_state=jax.device_get(programs.alpha_optimizer.init(np.float32(1.0))),
    )
    return Progress(
        step=step,
        finished=False,
        before=progress.before + progress.history.updates,
        history=training.History(),
        state=parallel.replicate(programs.parallel, state),
        teacher=session.copy_network(run, progress.state),
        ranking=progress.ranking,
    )


def train(run: Run, progress: Progress, stop: startup.StopSignal) -> None:
    """Trains the current step, from wherever it stands."""
    config = run.config
    data = planning.step_data(config, run.dataset, progress.ranking, progress.step)
    plan = training.make_plan(config, data)
    context = make_context(run, progress, data)
    last_save = time.monotonic()

    def after_call(history: training.History, images: int) -> bool:
        run.monitor.trained(plan, history, progress.before, images)
        return time.monotonic() - last_save >= 60 * config.checkpoint.minutes

    def save_inside(state: TrainState, history: training.History) -> None:
        nonlocal last_save
        progress.state, progress.history = state, history
        session.save(run, progress, finished=False)
        last_save = time.monotonic()

    try:
        progress.state = training.fit(
            run.programs,
            progress.state,
            context,
            run.train,
            plan,
            progress.history,
            after_call=after_call,
            save=save_inside,
            stop=stop.requested,
        )
    except training.NotFiniteError as error:
        kept = checkpoint.numbers(run.checkpoints)
        last = f"checkpoint {kept[-1]}" if kept else "none"
        raise UserError(f"{error}; last good: {last} in {run.checkpoints}") from None


def select_exemplars(run: Run, progress: Progress) -> None:
    """Ranks exemplars of the step's new classes; old rankings are never touched."""
    config, dataset = run.config, run.dataset
    group = dataset.groups[progress.step]
    labels = dataset.train_labels
    chosen = evaluate.select_exemplars(
        run.programs,
        progress.state.params,
        progress.state.batch_stats,
        run.train,
        [np.flatnonzero(labels == position) for position in group],
        config.memory.selection,
        planning.exemplars_per_class(config, group.stop),
        progress.ranking.shape[1],
        int(dataset.images_per_class.max()),
        config.evaluation.batch_size,
        np.random.default_rng([config.seed, progress.step, _RANDOM_EXEMPLARS]),
    )
    for position, indices in zip(group, chosen, strict=True):
        progress.ranking = memory.store(progress.ranking, position, indices)


_RANDOM_EXEMPLARS = 2  # keeps this stream of random numbers apart from the others


def record(run: Run, progress: Progress) -> None:
    """Evaluates the network on all classes seen and appends the step's record."""
    config, dataset, state = run.config, run.dataset, progress.state
    data = planning.step_data(config, dataset, progress.ranking, progress.step)
    images = np.flatnonzero(dataset.test_labels < data.num_seen)
    labels = dataset.test_labels[images]
    seen = np.arange(dataset.num_classes) < data.num_seen
    predicted, top5 = evaluate.predict(
        run.programs,
        state.params,
        state.batch_stats,
        parallel.replicate(run.programs.parallel, seen),
        run.test,
        images,
        config.evaluation.batch_size,
    )
    confusion = metrics.confusion_matrix(labels, predicted, dataset.num_classes)

    def percent(first: int, last: int) -> float:
        return 100.0 * metrics.accuracy(confusion, slice(first, last))

    groups = dataset.groups[: progress.step + 1]
    by_task = [percent(group.start, group.stop) for group in groups]
    result = {
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
        "loss": progress.history.loss,
        "train_accuracy": progress.history.accuracy,
        "alpha": progress.history.alpha,
        "parameters_sha256": _fingerprint(state),
        "confusion": [
            [int(i), int(j), int(confusion[i, j])] for i, j in np.argwhere(confusion)
        ],
    }
    for earlier in run.results["steps"]:
        earlier["result"].pop("confusion", None)
    found = {"result": result, "telemetry": run.monitor.step_telemetry()}
    run.results["steps"].append({"step": progress.step, **found})
    run.results["summary"] = results_file.summary(run.results["steps"])
    if progress.step == len(dataset.groups) - 1:
        run.results["status"] = "done"
    updates = progress.before + progress.history.updates
    run.monitor.evaluated(progress.step, updates, result)


def _fingerprint(state: TrainState) -> str:
    """SHA-256 of the network's arrays."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get((state.params, state.batch_stats))):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def finish(run: Run) -> dict[str, Any]:
    """Draws the pictures and prints the table."""
    from bsce_jax.report import plots  # matplotlib only at the end

    plots.accuracy_curves([run.results], run.workdir / "curves.png")
    plots.confusion_matrices([run.results], run.workdir / "confusion.png")
    plots.alpha_curve([run.results], run.workdir / "alpha.png")
    run.monitor.close()
    print(tables.step_table(run.results))
    return run.results
