"""Where a run stands: what a checkpoint holds, saving it and going on."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from bsce_jax.checkpoints import store
from bsce_jax.compute import parallel
from bsce_jax.compute.state import OWN, Network, PyTree, TrainState
from bsce_jax.config import priors
from bsce_jax.config.hashes import base_fields, differences
from bsce_jax.errors import UserError
from bsce_jax.report import results
from bsce_jax.report.schema import upgraded
from bsce_jax.run.dataset import difference
from bsce_jax.run.loop import History
from bsce_jax.run.phases import empty_ranking
from bsce_jax.run.programs import init_network
from bsce_jax.run.setup import Run

logger = logging.getLogger("bsce_jax")


@dataclasses.dataclass
class Progress:
    """What changes over the steps: exactly what a checkpoint holds.

    Its place in the run is (step, phase, update): the phase is the last one in
    `histories`, the update is counted there.

    Attributes:
      step: the current step.
      finished: whether the step is trained, evaluated and its exemplars chosen.
      before: updates of all earlier steps.
      histories: of the phases of the step that have begun, in order, by name.
      state: training state on the devices.
      teacher: the network of the step before (in the base step the initial one, where
        nothing reads it), or what a phase has put in its place.
      ranking: int32 [C, M], exemplars of each class in order of choice.
      seconds: of wall clock that earlier processes spent on the step.
    """

    step: int
    finished: bool
    before: int
    histories: dict[str, History]
    state: TrainState
    teacher: Network
    ranking: np.ndarray
    seconds: float = 0.0

    @property
    def updates(self) -> int:
        """Updates of the step so far, all its phases together."""
        return sum(history.updates for history in self.histories.values())


def initial(run: Run) -> Progress:
    """Fresh parameters; the base step not begun."""
    config, programs = run.config, run.programs
    network = init_network(config, programs.model, run.dataset.image_shape)
    state = TrainState(
        network=network,
        opt_state=programs.optimizer.init(network.params),
        alpha=np.float32(1.0),
        alpha_opt_state=programs.alpha_optimizer.init(np.float32(1.0)),
    )
    return Progress(
        step=0,
        finished=False,
        before=0,
        histories={},
        state=parallel.replicate(run.devices, jax.device_get(state)),
        teacher=copy_network(run, network),
        ranking=empty_ranking(config, run.dataset),
    )


def copy_network(run: Run, network: Network) -> Network:
    """A copy of a network, safe from the reuse of the training state's buffers."""
    # np.array copies: on CPU device_get and device_put may share the device's memory.
    copy = jax.tree.map(np.array, jax.device_get(network))
    return parallel.replicate(run.devices, copy)


def save(run: Run, progress: Progress, finished: bool) -> None:
    """Writes a checkpoint in the background, after a step results.json too.

    Nothing where the newest checkpoint is this one already.

    Raises:
      UserError: the workdir is gone, or the save before has failed.
    """
    progress.finished = finished
    run.monitor.flush()
    number = progress.before + progress.updates + progress.step + finished
    if number == run.saved:
        return
    run.still_there()
    meta = {
        "permanent": finished,
        "step": progress.step,
        "finished": finished,
        "before": progress.before,
        "histories": [
            [name, dataclasses.asdict(history)]
            for name, history in progress.histories.items()
        ],
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
    results.write(workdir, meta["results"])


def _histories(meta: Mapping[str, Any]) -> dict[str, History]:
    return {name: History(**fields) for name, fields in meta["histories"]}


def restore(run: Run) -> Progress:
    """Continues from the newest intact checkpoint, or starts.

    Raises:
      UserError: the workdir belongs to another configuration, or to other data.
    """
    progress = initial(run)
    refuse_another(run)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _arrays(progress)
    )
    found = store.latest(run.checkpoints, target)
    if found is None:
        return take_over(run, progress) if run.config.init_from else progress
    for name in ("status", "steps", "summary"):
        run.results[name] = found.meta["results"][name]
    progress = Progress(
        step=found.meta["step"],
        finished=found.meta["finished"],
        before=found.meta["before"],
        histories=_histories(found.meta),
        state=parallel.replicate(run.devices, found.arrays["state"]),
        teacher=parallel.replicate(run.devices, found.arrays["teacher"]),
        ranking=found.arrays["ranking"],
        seconds=found.meta["seconds"],
    )
    logger.info(
        "continuing in step %d after its update %d", progress.step, progress.updates
    )
    run.saved = found.number
    if progress.finished and parallel.is_first():
        results.write(run.workdir, run.results)
    return progress


def refuse_another(run: Run) -> None:
    """Compares configuration and data with those of the newest readable checkpoint.

    Raises:
      UserError: they are others.
    """
    for number in reversed(store.numbers(run.checkpoints)):
        try:
            theirs = upgraded(store.read_meta(run.checkpoints, number)["results"])
        except store.DamagedError:
            continue  # reported when it is restored
        if theirs["config_hash"] != run.results["config_hash"]:
            changed = differences(theirs["config"], run.results["config"])
            raise UserError(
                f"workdir {run.workdir} belongs to another configuration ({changed}): "
                "give another --workdir"
            )
        other = difference(theirs["data"], run.results["data"])
        if other:
            raise UserError(
                f"workdir {run.workdir} belongs to a run on other data ({other}): "
                "give another --workdir"
            )
        return


def _arrays(progress: Progress) -> dict[str, Any]:
    """What a checkpoint holds besides its JSON."""
    return {
        "state": progress.state,
        "teacher": progress.teacher,
        "ranking": progress.ranking,
    }


def take_over(run: Run, progress: Progress) -> Progress:
    """Starts from the trained network of config.init_from's base step.

    Only the model and its history are taken, and the optimiser's state where a later
    phase goes on with it: what the method has of its own is this run's, exemplars are
    chosen and the accuracy is measured by this run, as after a base step of its own.

    Raises:
      UserError: there is no finished base step, or it is not the same one.
    """
    number = base_checkpoint(run)
    folder = epath.Path(run.config.init_from) / store.FOLDER
    target = {"state": _shared(run, progress.state)}
    found = store.restore(folder, number, target, partial=True)
    state = _merged(progress.state, found.arrays["state"])
    return dataclasses.replace(
        progress,
        state=parallel.replicate(run.devices, state),
        histories=_taken(run, _histories(found.meta)),
    )


def base_checkpoint(run: Run) -> int:
    """The number of the checkpoint that config.init_from gives.

    Raises:
      UserError: as for `take_over`.
    """
    where = f"config.init_from={run.config.init_from!r}"
    folder = epath.Path(run.config.init_from)
    try:
        theirs = results.read(folder)
        number = finished_checkpoint(folder / store.FOLDER, 0)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if other := difference(theirs["data"], run.results["data"]):
        raise UserError(f"{where}: its data are others ({other})")
    if theirs["base_hash"] != run.results["base_hash"]:
        of_base = (base_fields(c["config"]) for c in (theirs, run.results))
        changed = differences(*of_base)
        changed = changed or "classes, terms, or a prior that weighs unequal classes"
        raise UserError(f"{where}: its base step is another one ({changed})")
    return number


def _taken(run: Run, histories: Mapping[str, History]) -> dict[str, History]:
    """Those of phases that train the model: this run trains what is its method's own.

    Up to the first that does not.
    """
    moving = itertools.takewhile(
        lambda phase: priors.moves_network(phase.rate), run.phases_of(0)
    )
    return {phase.name: histories[phase.name] for phase in moving}


def finished_checkpoint(folder: epath.Path, step: int) -> int:
    """The number of the checkpoint of the end of a step.

    Of the others, damaged ones are passed over.

    Raises:
      UserError: there is none, or it may be one of those that cannot be read.
    """
    damaged: list[str] = []
    for number in store.numbers(folder):
        try:
            meta = store.read_meta(folder, number)
        except store.CheckpointError as error:
            damaged.append(str(error))
            continue  # or just removed by a run, inside a later step
        if meta["step"] == step and meta["finished"]:
            return number
    unread = f" that can be read: {'; '.join(damaged[:3])}" if damaged else ""
    raise UserError(f"{folder} has no checkpoint of the end of step {step}{unread}")


def _shared(run: Run, state: TrainState) -> PyTree:
    """The part of a state that base steps of one hash have in common."""
    network = {
        "params": {k: part for k, part in state.network.params.items() if k != OWN},
        "batch_stats": state.network.batch_stats,
    }
    kept = any(phase.optimizer == "kept" for phase in run.phases)
    return {"network": network} | ({"opt_state": state.opt_state} if kept else {})


def _merged(state: TrainState, shared: PyTree) -> TrainState:
    """The state with the part that `_shared` names from another one."""
    network = shared["network"]
    return state.replace(
        network=state.network.replace(
            params={**state.network.params, **network["params"]},
            batch_stats=network["batch_stats"],
        ),
        opt_state=shared.get("opt_state", state.opt_state),
    )
