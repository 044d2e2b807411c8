"""A run from the first step to the last.

For each step: begin -> its phases, one after another -> exemplars -> finish ->
evaluate -> checkpoint. All that must survive a crash is in the checkpoint; results.json
is written from it.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from bsce_jax import terminal
from bsce_jax.checkpoints import store
from bsce_jax.compute import parallel
from bsce_jax.compute.state import TrainState
from bsce_jax.config import priors
from bsce_jax.errors import UserError, one_line, printable
from bsce_jax.hosts.peers import Peers
from bsce_jax.hosts.stop import StopSignal
from bsce_jax.hosts.workdir import kept
from bsce_jax.report import results, tables
from bsce_jax.run import companions, hooks
from bsce_jax.run.context import has_teacher, phase_context
from bsce_jax.run.loop import (
    History,
    Loop,
    NotFiniteError,
    StopRequested,
    Watch,
    fit,
    make_training,
)
from bsce_jax.run.phases import Phase, step_data
from bsce_jax.run.progress import Progress, copy_network, restore, save
from bsce_jax.run.record import add_record
from bsce_jax.run.setup import Parts, Run, prepare

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
      workdir: folder of everything the run writes, which exists; a run found there is
        continued.
      stop: asked after every call of a compiled update.
      peers: the watch of one of several processes; ends it after the running save.

    Raises:
      UserError: bad input, a workdir of another configuration, a loss that is not
        finite, a disk that cannot be written, a workdir that is removed.
      StopRequested: `stop` was set; everything is saved.
    """
    with prepared(config, epath.Path(workdir)) as run:
        if peers is not None:
            peers.before_exit = run.writer.wait_at_most
        carry_out(run, stop)
        return _finished(run)


@contextlib.contextmanager
def prepared(
    config: ConfigDict, workdir: epath.Path, parts: Parts | None = None
) -> Iterator[Run]:
    """A run that is prepared (see `setup.prepare`), in a workdir that must stay.

    Raises:
      UserError: bad input, or something is in the way of what the run will write.
    """
    with kept(workdir, results.FILE_NAME, store.FOLDER) as still_there:
        run = prepare(config, workdir, parts)
        run.still_there = still_there
        yield run


def carry_out(
    run: Run, stop: StopSignal, after_step: Callable[[], None] | None = None
) -> None:
    """Runs or resumes what is prepared; everything is on the disk at its end.

    Args:
      run: see `prepared`.
      stop: as in `run`.
      after_step: called when a step's checkpoint and results are on the disk.

    Raises:
      UserError, StopRequested: as in `run`.
    """
    _say_what_is_left_out(run)
    with contextlib.closing(run.monitor), run.writer:
        try:
            _steps(run, stop, after_step)
        except StopRequested:
            run.writer.wait()  # or "saved" would not be true
            raise
    run.still_there()


def _say_what_is_left_out(run: Run) -> None:
    if run.config.memory.kind == "none":
        for phase in run.phases:
            if phase.images != "training":
                logger.info("no phase %s: there is no memory", phase.name)


def _steps(run: Run, stop: StopSignal, after_step: Callable[[], None] | None) -> None:
    """All steps that are left."""
    progress = restore(run)
    hooks.replace_images(run, progress)
    stop.begin_to_wait()
    run.monitor.start(progress.before + progress.updates)
    for step in range(progress.step + progress.finished, len(run.dataset.groups)):
        if step > progress.step:
            run.monitor.begin_step()
            progress = begin(run, progress, step)
        else:
            run.monitor.begin_step(progress.seconds)
        for phase in left(run, progress):
            train(run, progress, phase, stop)
        stop_if_asked(run, progress, stop)
        hooks.select_exemplars(run, progress)
        network = parallel.replicate(run.devices, hooks.finish(run, progress))
        progress.state = progress.state.replace(network=network)
        hooks.replace_images(run, progress)
        add_record(run, progress)
        save(run, progress, finished=True)
        if after_step is not None:
            run.writer.wait()
            after_step()
        stop_if_asked(run, progress, stop)


def begin(run: Run, progress: Progress, step: int) -> Progress:
    """Starts an incremental step: the trained network becomes the teacher.

    The network is what the method makes of it, alpha starts anew.
    """
    alpha = np.float32(priors.initial_alpha(run.config))
    alpha_opt_state = run.programs.alpha_optimizer.init(np.float32(1.0))
    state = progress.state.replace(
        network=hooks.begin(run, progress, step),
        alpha=alpha,
        alpha_opt_state=jax.device_get(alpha_opt_state),
    )
    return Progress(
        step=step,
        finished=False,
        before=progress.before + progress.updates,
        histories={},
        state=parallel.replicate(run.devices, state),
        teacher=copy_network(run, progress.state.network),
        ranking=progress.ranking,
    )


def left(run: Run, progress: Progress) -> tuple[Phase, ...]:
    """The phases of the current step that have not ended, or whose end was not seen."""
    phases = run.phases_of(progress.step)
    begun = [i for i, phase in enumerate(phases) if phase.name in progress.histories]
    return phases[max(begun, default=0) :]


def enter(run: Run, progress: Progress, phase: Phase) -> None:
    """Begins a phase: exemplars, teacher and optimiser as it wants them.

    Repeatable: a run that is stopped before the phase's first update does it again.
    """
    if phase.images == "exemplars" or phase.begin:
        hooks.select_exemplars(run, progress)
    if phase.begin:
        network = hooks.enter(run, progress, phase.begin)
        progress.state = progress.state.replace(
            network=parallel.replicate(run.devices, network)
        )
    if phase.teacher == "now":
        progress.teacher = copy_network(run, progress.state.network)
    if phase.optimizer == "new":
        nothing = jax.tree.map(
            lambda leaf: np.zeros(leaf.shape, leaf.dtype), progress.state.opt_state
        )
        progress.state = progress.state.replace(
            opt_state=parallel.replicate(run.devices, nothing)
        )
    progress.histories[phase.name] = History()


def train(run: Run, progress: Progress, phase: Phase, stop: StopSignal) -> None:
    """Trains a phase of the current step from wherever it stands, saving inside it."""
    if phase.name not in progress.histories:
        enter(run, progress, phase)
    config, history = run.config, progress.histories[phase.name]
    before = progress.before + progress.updates - history.updates
    data = step_data(config, run.dataset, progress.ranking, progress.step, phase)
    context = phase_context(config, run.dataset, data, progress.state.network)
    if has_teacher(data):
        context = context.replace(teacher=progress.teacher)
    loop = Loop(run.programs, run.train, make_training(config, data))
    last_save = time.monotonic()

    def after_call(history: History, images: int) -> None:
        run.writer.check()
        run.monitor.trained(loop.training, history, before, images)

    def due() -> bool:
        # The first process's clock is that of all.
        passed = time.monotonic() - last_save
        return parallel.is_first() and passed >= 60 * config.checkpoint.minutes

    def save_inside(state: TrainState, history: History) -> None:
        nonlocal last_save
        progress.state, progress.histories[phase.name] = state, history
        save(run, progress, finished=False)
        last_save = time.monotonic()

    watch = Watch(after_call, due, save_inside, lambda: stop.number)
    run.monitor.begin_phase()
    context = parallel.replicate(run.devices, context)
    if loop.training.with_companions:
        table = functools.partial(companions.table, run, loop, context)
        loop = dataclasses.replace(loop, companions=table)
    try:
        progress.state = fit(loop, progress.state, context, history, watch)
    except NotFiniteError as error:
        raise UserError(f"{error}; {_last_good(run)}") from None
    # Exemplars and accuracies may take long: nothing is lost meanwhile.
    save(run, progress, finished=False)


def _last_good(run: Run) -> str:
    """Where a run that cannot go on could be taken up again."""
    with contextlib.suppress(UserError):
        run.writer.wait()
    numbers = store.numbers(run.checkpoints)
    last = f"checkpoint {numbers[-1]}" if numbers else "none"
    return f"last good: {last} in {run.checkpoints}"


def stop_if_asked(run: Run, progress: Progress, stop: StopSignal) -> None:
    """Ends a run that is saved where a process was asked to stop.

    Raises:
      StopRequested: it was, and there is something left to do.
    """
    asked = parallel.largest(run.devices, (stop.number,))
    if (number := int(asked[0])) and run.results["status"] != "done":
        raise StopRequested(progress.step, progress.updates, number)


def _finished(run: Run) -> dict[str, Any]:
    """Prints the table and draws the pictures, without which the run is whole."""
    if parallel.is_first():
        width = terminal.columns(sys.stdout) if sys.stdout.isatty() else 0
        print(tables.step_table(run.results, width=width), flush=True)
        pictures = []
        try:
            from bsce_jax.report import plots  # matplotlib only at the end

            pictures = plots.draw([run.results], run.workdir)
        except Exception as error:  # whatever a drawing library may raise
            logger.warning("no pictures: %s", one_line(error))
        print(_where_it_is(run.workdir, pictures), flush=True)
    return run.results


def _where_it_is(workdir: epath.Path, pictures: Sequence[epath.Path]) -> str:
    """What a run has left and what can be done with it next, for a person."""
    files = [workdir / results.FILE_NAME, *pictures]
    quoted = printable(shlex.quote(os.fspath(workdir)))
    return "\n".join(
        [
            "",
            *(printable(os.fspath(file)) for file in files),
            "next:",
            f"  python -m bsce_jax.report {quoted}",
            f"  python -m bsce_jax.predict {quoted}",
        ]
    )
