"""Says what a run would do, without training: --config.print_plan."""

import contextlib
import dataclasses
import itertools
import time

import jax
from etils import epath
from ml_collections import ConfigDict

from bsce_jax.checkpoints import store
from bsce_jax.compute import parallel
from bsce_jax.log_prior import EXCLUDED
from bsce_jax.run.context import phase_context
from bsce_jax.run.loop import Loop, Training, call, calls, make_training
from bsce_jax.run.phases import planned
from bsce_jax.run.progress import (
    Progress,
    base_checkpoint,
    initial,
    refuse_another,
)
from bsce_jax.run.setup import Run, prepare

# Calls that time an update: their number, and seconds after which LEAST are enough.
LEAST, RESIDENT, STREAMED, SECONDS = 6, 12, 500, 20.0


def describe(config: ConfigDict, workdir: epath.Path) -> str:
    """A table of the steps, and time and device memory measured on a few updates.

    Args:
      config: resolved configuration.
      workdir: of the run; only compiled programs are written there.

    Raises:
      UserError: as for the run itself.
    """
    run = prepare(config, workdir)
    refuse_another(run)
    if config.init_from and not store.numbers(run.checkpoints):
        base_checkpoint(run)
    progress = initial(run)
    trainings = [make_training(config, each) for each in planned(config, run.dataset)]
    wide = max(len(phase.name) for phase in run.phases)
    lines = [
        f"step  {'phase':{wide}}  classes  images  exemplars  images a class  "
        "log-prior      updates",
        f"----  {'-' * wide}  -------  ------  ---------  --------------  "
        "-------------  -------",
    ]
    for training in trainings:
        data = training.data
        context = phase_context(config, run.dataset, data, progress.state.network)
        prior = context.log_prior[context.log_prior > EXCLUDED]
        counts = data.counts[: data.num_seen]
        span = f"{prior.min():.2f}..{prior.max():.2f}"
        many = f"{counts.min()}..{counts.max()}"
        images = len(data.train) + len(data.replayed)
        lines.append(
            f"{data.step:4d}  {data.phase.name:{wide}}  {data.num_seen:7d}  "
            f"{images:6d}  {data.exemplars:9d}  {many:>14}  {span:>13}  "
            f"{training.updates:7d}"
        )
    seconds, memory = _measure(run, progress, trainings[0])
    updates = sum(training.updates for training in trainings)
    images = sum(t.updates * t.training_batches.size for t in trainings)
    sizes = dict.fromkeys(str(t.training_batches.size) for t in trainings)
    hours = images / trainings[0].training_batches.size * seconds / 3600
    lines.append(
        f"{updates} updates of {' or '.join(sizes)} images, those of the base step at "
        f"{1000 * seconds:.1f} ms: about {hours:.2f} h of training "
        f"on {run.devices.num_devices} {run.devices.platform} "
        f"device(s); device memory {memory}"
    )
    return "\n".join(lines)


def _measure(run: Run, progress: Progress, training: Training) -> tuple[float, str]:
    """Seconds of a base update, its images included, and its device memory."""
    data, width = training.data, run.programs.updates_per_call
    context = parallel.replicate(
        run.devices,
        phase_context(run.config, run.dataset, data, progress.state.network),
    )
    training = _long_enough(training, width)
    loop = Loop(run.programs, run.train, training)
    # Compiled with the last images alone: while it lasts, many would be read ahead.
    last = max(training.updates - width, 0)
    state, _ = call(loop, progress.state, context, last, width)
    ends, counts = [], []
    most = RESIDENT if run.train.resident is not None else STREAMED
    with contextlib.closing(calls(loop, 0)) as planned_calls:
        for count, arguments in itertools.islice(planned_calls, most):
            state, metrics = run.programs.updates[data.phase.name](
                state, context, run.train.resident, *arguments
            )
            jax.block_until_ready((state, metrics))
            ends.append(time.perf_counter())
            counts.append(count)
            late = parallel.largest(run.devices, [ends[-1] - ends[0] > SECONDS])
            if len(ends) >= LEAST and int(late[0]):
                break
    # The first ones take what was read while the input started.
    half = len(ends) // 2
    seconds = (ends[-1] - ends[half]) / sum(counts[half + 1 :])
    resident = sum(
        x.nbytes
        for x in jax.tree.leaves((run.train.resident, run.test.resident, state))
    )
    text = f"{resident / 2**20:.0f} MiB of data and state"
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        text += f", {stats['peak_bytes_in_use'] / 2**20:.0f} MiB at the peak"
    return seconds, text


def _long_enough(training: Training, width: int) -> Training:
    """The training with as many epochs as LEAST calls of `width` updates need."""
    phase = training.data.phase
    epochs = max(phase.epochs, -(-LEAST * width // training.updates_per_epoch))
    longer = dataclasses.replace(phase, epochs=epochs, rates=phase.rates[:1] * epochs)
    data = dataclasses.replace(training.data, phase=longer)
    return dataclasses.replace(training, data=data)
