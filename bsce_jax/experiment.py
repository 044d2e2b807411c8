"""A run from the first step to the last.

For each step: begin -> train -> fine-tune -> exemplars -> evaluate -> checkpoint. All
that must survive a crash is in the checkpoint; results.json is written from it.
"""

import contextlib
import logging
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from bsce_jax import memory, methods
from bsce_jax.checkpoints import store
from bsce_jax.compute import parallel
from bsce_jax.compute.state import PyTree, TrainState
from bsce_jax.errors import UserError
from bsce_jax.hosts.peers import Peers
from bsce_jax.hosts.stop import StopSignal
from bsce_jax.report import results as results_file
from bsce_jax.report import tables
from bsce_jax.run import evaluate, loop, phases
from bsce_jax.run.context import make_context
from bsce_jax.run.dataset import exemplars_per_class
from bsce_jax.run.progress import Progress, copy_network, restore, save
from bsce_jax.run.record import step_result
from bsce_jax.run.setup import Run, prepare

logger = logging.getLogger("bsce_jax")


def run(
    config: ConfigDict,
    workdir: epath.PathLike,
    stop: StopSignal,
    peers: Peers | None = None,
) -> dict[str, Any]:
    """Runs or resumes an experiment and returns its results.

    Args:
      config: resolved configuration.
      workdir: folder of everything the run writes; a run found there is continued.
      stop: asked after every call of a compiled update.
      peers: the watch of one of several processes; ends it after the running save.

    Raises:
      UserError: bad input, a workdir of another configuration, a loss that is not
        finite, a disk that cannot be written.
      training.StopRequested: `stop` was set; everything is saved.
    """
    run = prepare(config, epath.Path(workdir))
    if peers is not None:
        peers.before_exit = run.writer.wait_at_most
    if config.finetune.epochs and config.memory.kind == "none":
        logger.info("no fine-tuning: there is no memory")
    with run.writer:
        try:
            _steps(run, stop)
        except loop.StopRequested:
            run.writer.wait()  # or "saved" would not be true
            raise
    return finish(run)


def _steps(run: Run, stop: StopSignal) -> None:
    """All steps that are left."""
    progress = restore(run)
    run.monitor.start(progress.before + progress.history.updates)
    for step in range(progress.step + progress.finished, len(run.dataset.groups)):
        if step > progress.step:
            progress = begin(run, progress, step)
        run.monitor.begin_step(progress.seconds)
        if progress.main is None:
            train(run, progress, stop)
        if phases.has_finetuning(run.config, run.dataset, step):
            finetune(run, progress, stop)
        stop_if_asked(run, progress, stop)
        select_exemplars(run, progress)
        record(run, progress)
        save(run, progress, finished=True)
        stop_if_asked(run, progress, stop)


def begin(run: Run, progress: Progress, step: int) -> Progress:
    """Starts an incremental step: the trained network becomes the teacher.

    The optimiser starts anew, and so does alpha; the head's rows of the new classes
    are the method's, or still have their initial values.
    """
    programs = run.programs
    alpha = run.config.alpha if run.config.prior == "weighted" else 1.0
    state = _new_optimizer(progress.state).replace(
        params=new_head_rows(run, progress, step),
        alpha=np.float32(alpha),
        alpha_opt_state=jax.device_get(programs.alpha_optimizer.init(np.float32(1.0))),
    )
    return Progress(
        step=step,
        finished=False,
        before=progress.before + progress.history.updates,
        main=None,
        history=loop.History(),
        state=parallel.replicate(programs.parallel, state),
        teacher=copy_network(run, progress.state),
        ranking=progress.ranking,
    )


def new_head_rows(run: Run, progress: Progress, step: int) -> PyTree:
    """The parameters, on the host, with the method's head rows of the new classes."""
    config, dataset = run.config, run.dataset
    params = jax.device_get(progress.state.params)
    method = methods.module(config.method)
    if not hasattr(method, "begin"):
        return params
    data = phases.step_data(config, dataset, progress.ranking, step)
    labels = dataset.train_labels[data.train]
    found = evaluate.features_by_class(
        run.programs,
        progress.state.params,
        progress.state.batch_stats,
        run.train,
        [data.train[labels == position] for position in dataset.groups[step]],
        config.evaluation.batch_size,
    )
    features = [part for _, part in found]
    rng = np.random.default_rng([config.seed, step, _NEW_ROWS])
    head = method.begin(params["head"], features, data.num_old, rng)
    return {**params, "head": head}


def _new_optimizer(state: TrainState) -> TrainState:
    """The state, on the host, with the optimiser as at its start: no momentum."""
    state = jax.device_get(state)
    return state.replace(opt_state=jax.tree.map(np.zeros_like, state.opt_state))


def train(run: Run, progress: Progress, stop: StopSignal) -> None:
    """Main training of the current step, from wherever it stands."""
    data = phases.step_data(run.config, run.dataset, progress.ranking, progress.step)
    _fit(run, progress, data, stop)


def finetune(run: Run, progress: Progress, stop: StopSignal) -> None:
    """Balanced fine-tuning of the current step, from wherever it stands.

    It begins by choosing the new classes' exemplars, with the network just trained.
    """
    if progress.main is None:
        select_exemplars(run, progress)
        progress.before += progress.history.updates
        progress.main, progress.history = progress.history, loop.History()
        progress.state = parallel.replicate(
            run.programs.parallel, _new_optimizer(progress.state)
        )
    data = phases.finetune_data(
        run.config, run.dataset, progress.ranking, progress.step
    )
    _fit(run, progress, data, stop)


def _fit(run: Run, progress: Progress, data: phases.StepData, stop: StopSignal) -> None:
    """Trains a phase of a step, saving inside it."""
    config = run.config
    plan = loop.make_plan(config, data)
    context = make_context(run, progress, data)
    last_save = time.monotonic()

    def after_call(history: loop.History, images: int) -> None:
        run.writer.check()
        run.monitor.trained(plan, history, progress.before, images)

    def due() -> bool:
        # The first process's clock is that of all.
        passed = time.monotonic() - last_save
        return parallel.is_first() and passed >= 60 * config.checkpoint.minutes

    def save_inside(state: TrainState, history: loop.History) -> None:
        nonlocal last_save
        progress.state, progress.history = state, history
        save(run, progress, finished=False)
        last_save = time.monotonic()

    try:
        progress.state = loop.fit(
            run.programs,
            progress.state,
            context,
            run.train,
            plan,
            progress.history,
            after_call=after_call,
            due=due,
            save=save_inside,
            stop=lambda: stop.number,
        )
    except loop.NotFiniteError as error:
        with contextlib.suppress(UserError):
            run.writer.wait()
        kept = store.numbers(run.checkpoints)
        last = f"checkpoint {kept[-1]}" if kept else "none"
        raise UserError(f"{error}; last good: {last} in {run.checkpoints}") from None
    # Exemplars and accuracies may take long: nothing is lost meanwhile.
    save(run, progress, finished=False)


def stop_if_asked(run: Run, progress: Progress, stop: StopSignal) -> None:
    """Ends a run that is saved where a process was asked to stop.

    Raises:
      training.StopRequested: it was, and there is something left to do.
    """
    asked = parallel.largest(run.programs.parallel, (stop.number,))
    if (number := int(asked[0])) and run.results["status"] != "done":
        raise loop.StopRequested(progress.step, progress.history.updates, number)


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
        exemplars_per_class(config, group.stop),
        progress.ranking.shape[1],
        int(dataset.images_per_class.max()),
        config.evaluation.batch_size,
        np.random.default_rng([config.seed, progress.step, _RANDOM_EXEMPLARS]),
    )
    for position, indices in zip(group, chosen, strict=True):
        progress.ranking = memory.store(progress.ranking, position, indices)


# Keep these streams of random numbers apart from the others.
_RANDOM_EXEMPLARS, _NEW_ROWS = 2, 3


def record(run: Run, progress: Progress) -> None:
    """Evaluates the network on all classes seen and appends the step's record."""
    result = step_result(run, progress)
    parallel.require_same(
        {"network": result["parameters_sha256"], "memory": progress.ranking.tolist()}
    )
    for earlier in run.results["steps"]:
        earlier["result"].pop("confusion", None)
    tested = sum(images for *_, images in result["confusion"])
    wanted = int(np.sum(run.dataset.test_labels < result["num_seen"]))
    times = {**run.monitor.step_telemetry(), "skipped_test_images": wanted - tested}
    found = {"result": result, "telemetry": times}
    run.results["steps"].append({"step": progress.step, **found})
    run.results["summary"] = results_file.summary(run.results["steps"])
    if progress.step == len(run.dataset.groups) - 1:
        run.results["status"] = "done"
    updates = progress.before + progress.history.updates
    run.monitor.evaluated(progress.step, updates, result)


def finish(run: Run) -> dict[str, Any]:
    """Draws the pictures and prints the table."""
    if parallel.is_first():
        from bsce_jax.report import plots  # matplotlib only at the end

        plots.accuracy_curves([run.results], run.workdir / "curves.png")
        plots.confusion_matrices([run.results], run.workdir / "confusion.png")
        plots.alpha_curve([run.results], run.workdir / "alpha.png")
        print(tables.step_table(run.results))
    run.monitor.close()
    return run.results
