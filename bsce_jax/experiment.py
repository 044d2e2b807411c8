"""A run from the first step to the last.

For each step: data -> begin -> fit -> exemplars -> evaluate -> checkpoint. All that
must survive a crash is in the checkpoint; results.json is written from it.
"""

import dataclasses
import hashlib
import logging
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from bsce_jax import (
    checkpoint,
    evaluate,
    log_prior,
    memory,
    metrics,
    optim,
    parallel,
    startup,
    training,
)
from bsce_jax import plan as planning
from bsce_jax import programs as compiled
from bsce_jax.config import config_hash, flatten, term_weight
from bsce_jax.errors import UserError
from bsce_jax.monitor import Monitor
from bsce_jax.report import results as results_file
from bsce_jax.report import tables
from bsce_jax.state import Images, PyTree, StepContext, TrainState

logger = logging.getLogger("bsce_jax")


@dataclasses.dataclass
class Run:
    """A run's fixed parts and its progress so far."""

    config: ConfigDict
    workdir: epath.Path
    dataset: planning.Dataset
    programs: compiled.Programs
    train: Images
    test: Images
    results: dict[str, Any]
    monitor: Monitor

    @property
    def checkpoints(self) -> epath.Path:
        """Folder of the numbered checkpoints."""
        return self.workdir / "checkpoints"


@dataclasses.dataclass
class Progress:
    """What changes over the steps: exactly what a checkpoint holds.

    Attributes:
      step: the current step.
      finished: whether the step is trained, evaluated and its exemplars chosen.
      before: updates of all earlier steps.
      history: of the current step.
      state: training state on the devices.
      teacher: {"params", "batch_stats"} of the step before (of the initial network
        in the base step, where nothing reads it).
      ranking: int32 [C, M], exemplars of each class in order of choice.
    """

    step: int
    finished: bool
    before: int
    history: training.History
    state: TrainState
    teacher: PyTree
    ranking: np.ndarray


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
    progress = restore(run)
    run.monitor.start(progress.before + progress.history.updates)
    for step in range(progress.step + progress.finished, len(run.dataset.groups)):
        if step > progress.step:
            progress = begin(run, progress, step)
        run.monitor.begin_step()
        train(run, progress, stop)
        select_exemplars(run, progress)
        record(run, progress)
        save(run, progress, finished=True)
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
        for data in planned_steps(config, dataset)
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


def planned_steps(
    config: ConfigDict, dataset: planning.Dataset
) -> list[planning.StepData]:
    """Every step's data, with stand-ins for exemplars that are not chosen yet."""
    ranking = planning.empty_ranking(config, dataset)
    for position in range(dataset.num_classes):
        images = np.flatnonzero(dataset.train_labels == position)
        ranking[position] = images[: ranking.shape[1]]
    steps = range(len(dataset.groups))
    return [planning.step_data(config, dataset, ranking, step) for step in steps]


def initial(run: Run) -> Progress:
    """Fresh parameters; the base step not begun."""
    config, programs = run.config, run.programs
    variables = compiled.init_model(
        programs.model, run.dataset.train_images.shape[1:], config.seed
    )
    params, batch_stats = variables["params"], variables["batch_stats"]
    state = TrainState(
        params=params,
        batch_stats=batch_stats,
        opt_state=programs.optimizer.init(params),
        alpha=np.float32(1.0),
        alpha_opt_state=programs.alpha_optimizer.init(np.float32(1.0)),
        extra={},
    )
    return Progress(
        step=0,
        finished=False,
        before=0,
        history=training.History(),
        state=parallel.replicate(programs.parallel, jax.device_get(state)),
        teacher=_network(run, state),
        ranking=planning.empty_ranking(config, run.dataset),
    )


def _network(run: Run, state: TrainState) -> PyTree:
    """A copy of the network, safe from the reuse of the state's buffers."""
    network = {"params": state.params, "batch_stats": state.batch_stats}
    return parallel.replicate(run.programs.parallel, jax.device_get(network))


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
        teacher=_network(run, progress.state),
        ranking=progress.ranking,
    )


def make_context(run: Run, progress: Progress, data: planning.StepData) -> StepContext:
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
        name: np.float32(term_weight(name, term.weight, data.num_old, data.num_seen))
        for name, term in config.terms.items()
    }
    context = StepContext(
        log_prior=shifted.astype(np.float32),
        old=old,
        seen=seen,
        counts=counts,
        task_ids=task_ids,
        weights=weights,
        update_scale=optim.update_scale(progress.state.params, seen),
        teachers=(progress.teacher,) if data.step else (),
    )
    return parallel.replicate(run.programs.parallel, context)


def epsilon_count(config: ConfigDict) -> float:
    """Epsilon of Eq. 6 as a number of images (500 a class: 0.2 % is 1)."""
    if config.epsilon_unit == "percent":
        return config.epsilon / 100.0 * config.data.nominal_per_class
    return config.epsilon


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
        save(run, progress, finished=False)
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


def save(run: Run, progress: Progress, finished: bool) -> None:
    """Writes a checkpoint; after a finished step also results.json."""
    progress.finished = finished
    run.monitor.flush()
    number = progress.before + progress.history.updates + progress.step + finished
    arrays = {
        "state": progress.state,
        "teacher": progress.teacher,
        "ranking": progress.ranking,
    }
    meta = {
        "permanent": finished,
        "step": progress.step,
        "finished": finished,
        "before": progress.before,
        "history": dataclasses.asdict(progress.history),
        "results": run.results,
    }
    checkpoint.save(
        run.checkpoints, number, arrays, meta, keep=run.config.checkpoint.keep
    )
    if finished:
        results_file.write(run.workdir, run.results)


def restore(run: Run) -> Progress:
    """Continues from the newest intact checkpoint, or starts.

    Raises:
      UserError: the workdir belongs to another configuration.
    """
    progress = initial(run)
    for number in reversed(checkpoint.numbers(run.checkpoints)):
        try:
            theirs = checkpoint.read_meta(run.checkpoints, number)["results"]
        except checkpoint.DamagedError:
            continue  # reported below
        if theirs["config_hash"] != run.results["config_hash"]:
            changed = _differences(theirs["config"], run.results["config"])
            raise UserError(
                f"workdir {run.workdir} belongs to another configuration ({changed}): "
                "give another --workdir"
            )
        break
    found = checkpoint.latest(run.checkpoints, _arrays(progress))
    if found is None:
        return take_over(run, progress) if run.config.init_from else progress
    place = run.programs.parallel
    for name in ("status", "steps", "summary"):
        run.results[name] = found.meta["results"][name]
    progress = Progress(
        step=found.meta["step"],
        finished=found.meta["finished"],
        before=found.meta["before"],
        history=training.History(**found.meta["history"]),
        state=parallel.replicate(place, found.arrays["state"]),
        teacher=parallel.replicate(place, found.arrays["teacher"]),
        ranking=found.arrays["ranking"],
    )
    logger.info(
        "continuing in step %d after its update %d",
        progress.step,
        progress.history.updates,
    )
    if progress.finished:
        results_file.write(run.workdir, run.results)
    return progress


def _arrays(progress: Progress) -> dict[str, Any]:
    arrays = {
        "state": progress.state,
        "teacher": progress.teacher,
        "ranking": progress.ranking,
    }
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    names = sorted(
        name
        for name in theirs.keys() | ours.keys()
        if theirs.get(name) != ours.get(name)
    )
    shown = [f"{n}: {theirs.get(n)!r} there, {ours.get(n)!r} here" for n in names[:3]]
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return "; ".join(shown) + more


def take_over(run: Run, progress: Progress) -> Progress:
    """Starts from the trained network of config.init_from's base step.

    Only the network and its history are taken: exemplars are chosen and the accuracy
    is measured by this run, as after a base step of its own.

    Raises:
      UserError: there is no finished base step, or it is not the same one.
    """
    where = f"config.init_from={run.config.init_from!r}"
    folder = epath.Path(run.config.init_from)
    theirs = results_file.read(folder)
    if theirs["base_hash"] != run.results["base_hash"]:
        changed = _differences(theirs["config"], run.results["config"])
        raise UserError(f"{where}: its base step is another one ({changed})")
    variables = {
        "params": progress.state.params,
        "batch_stats": progress.state.batch_stats,
    }
    for number in checkpoint.numbers(folder / "checkpoints"):
        meta = checkpoint.read_meta(folder / "checkpoints", number)
        if meta["step"] == 0 and meta["finished"]:
            found = checkpoint.restore(
                folder / "checkpoints", number, {"state": variables}, partial=True
            )
            network = parallel.replicate(run.programs.parallel, found.arrays["state"])
            return dataclasses.replace(
                progress,
                state=progress.state.replace(**network),
                history=training.History(**found.meta["history"]),
            )
    raise UserError(f"{where}: its base step is not finished")


def finish(run: Run) -> dict[str, Any]:
    """Draws the pictures and prints the table."""
    from bsce_jax.report import plots  # matplotlib only at the end

    plots.accuracy_curves([run.results], run.workdir / "curves.png")
    plots.confusion_matrices([run.results], run.workdir / "confusion.png")
    plots.alpha_curve([run.results], run.workdir / "alpha.png")
    run.monitor.close()
    print(tables.step_table(run.results))
    return run.results
