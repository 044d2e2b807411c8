"""A run and where it stands: what a checkpoint holds, saving it and going on."""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from bsce_jax.checkpoints import store
from bsce_jax.compute import parallel
from bsce_jax.compute.state import PyTree, TrainState
from bsce_jax.config.hashes import differences
from bsce_jax.errors import UserError
from bsce_jax.report import results as results_file
from bsce_jax.run import base_hash, loop, phases
from bsce_jax.run.programs import init_model
from bsce_jax.run.setup import Run

logger = logging.getLogger("bsce_jax")


@dataclasses.dataclass
class Progress:
    """What changes over the steps: exactly what a checkpoint holds.

    Attributes:
      step: the current step.
      finished: whether the step is trained, evaluated and its exemplars chosen.
      before: updates of all earlier steps and phases.
      main: history of the step's main training once fine-tuning has begun, else None.
      history: of the current phase of the step.
      state: training state on the devices.
      teacher: {"params", "batch_stats"} of the step before (of the initial network
        in the base step, where nothing reads it).
      ranking: int32 [C, M], exemplars of each class in order of choice.
      seconds: of wall clock that earlier processes spent on the step.
    """

    step: int
    finished: bool
    before: int
    main: loop.History | None
    history: loop.History
    state: TrainState
    teacher: PyTree
    ranking: np.ndarray
    seconds: float = 0.0


def initial(run: Run) -> Progress:
    """Fresh parameters; the base step not begun."""
    config, programs = run.config, run.programs
    variables = init_model(programs.model, run.dataset.image_shape, config.seed)
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
        main=None,
        history=loop.History(),
        state=parallel.replicate(programs.parallel, jax.device_get(state)),
        teacher=copy_network(run, state),
        ranking=phases.empty_ranking(config, run.dataset),
    )


def copy_network(run: Run, state: TrainState) -> PyTree:
    """A copy of the network, safe from the reuse of the state's buffers."""
    network = {"params": state.params, "batch_stats": state.batch_stats}
    # np.array copies: on CPU device_get and device_put may share the device's memory.
    copy = jax.tree.map(np.array, jax.device_get(network))
    return parallel.replicate(run.programs.parallel, copy)


def save(run: Run, progress: Progress, finished: bool) -> None:
    """Writes a checkpoint in the background, after a step results.json too.

    Nothing where the newest checkpoint is this one already.
    """
    progress.finished = finished
    run.monitor.flush()
    number = progress.before + progress.history.updates + progress.step + finished
    if number == run.saved:
        return
    meta = {
        "permanent": finished,
        "step": progress.step,
        "finished": finished,
        "before": progress.before,
        "main": progress.main and dataclasses.asdict(progress.main),
        "history": dataclasses.asdict(progress.history),
        "seconds": run.monitor.step_seconds(),
        "results": run.results,
    }
    run.writer.save(
        run.checkpoints,
        number,
        _arrays(progress),
        meta,
        keep=run.config.checkpoint.keep,
        then=functools.partial(_write_results, run.workdir) if finished else None,
    )
    run.saved = number


def _write_results(workdir: epath.Path, meta: Mapping[str, Any]) -> None:
    results_file.write(workdir, meta["results"])


def restore(run: Run) -> Progress:
    """Continues from the newest intact checkpoint, or starts.

    Raises:
      UserError: the workdir belongs to another configuration.
    """
    progress = initial(run)
    for number in reversed(store.numbers(run.checkpoints)):
        try:
            theirs = store.read_meta(run.checkpoints, number)["results"]
        except store.DamagedError:
            continue  # reported below
        if theirs["config_hash"] != run.results["config_hash"]:
            changed = differences(theirs["config"], run.results["config"])
            raise UserError(
                f"workdir {run.workdir} belongs to another configuration ({changed}): "
                "give another --workdir"
            )
        break
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _arrays(progress)
    )
    found = store.latest(run.checkpoints, target)
    if found is None:
        return take_over(run, progress) if run.config.init_from else progress
    place = run.programs.parallel
    for name in ("status", "steps", "summary"):
        run.results[name] = found.meta["results"][name]
    progress = Progress(
        step=found.meta["step"],
        finished=found.meta["finished"],
        before=found.meta["before"],
        main=found.meta["main"] and loop.History(**found.meta["main"]),
        history=loop.History(**found.meta["history"]),
        state=parallel.replicate(place, found.arrays["state"]),
        teacher=parallel.replicate(place, found.arrays["teacher"]),
        ranking=found.arrays["ranking"],
        seconds=found.meta["seconds"],
    )
    logger.info(
        "continuing in step %d after its update %d",
        progress.step,
        progress.history.updates,
    )
    run.saved = found.number
    if progress.finished and parallel.is_first():
        results_file.write(run.workdir, run.results)
    return progress


def _arrays(progress: Progress) -> dict[str, Any]:
    """What a checkpoint holds besides its JSON."""
    return {
        "state": progress.state,
        "teacher": progress.teacher,
        "ranking": progress.ranking,
    }


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
        theirs_of_base, ours_of_base = (
            {k: v for k, v in config.items() if base_hash.reaches_base(k)}
            for config in (theirs["config"], run.results["config"])
        )
        changed = differences(theirs_of_base, ours_of_base)
        changed = changed or "classes, terms, or a prior that weighs unequal classes"
        raise UserError(f"{where}: its base step is another one ({changed})")
    variables = {
        "params": progress.state.params,
        "batch_stats": progress.state.batch_stats,
    }
    for number in store.numbers(folder / "checkpoints"):
        try:
            meta = store.read_meta(folder / "checkpoints", number)
        except store.CheckpointError:
            continue  # damaged, or just removed by that run, inside a later step
        if meta["step"] == 0 and meta["finished"]:
            found = store.restore(
                folder / "checkpoints", number, {"state": variables}, partial=True
            )
            network = parallel.replicate(run.programs.parallel, found.arrays["state"])
            return dataclasses.replace(
                progress,
                state=progress.state.replace(**network),
                history=loop.History(**found.meta["history"]),
            )
    raise UserError(f"{where}: its base step is not finished")
