"""Says what a run would do, without training: --config.print_plan."""

import contextlib
import dataclasses
import itertools
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from bsce_jax.compute import parallel
from bsce_jax.log_prior import EXCLUDED
from bsce_jax.run import loop, phases, setup
from bsce_jax.run.context import make_context
from bsce_jax.run.progress import Progress, initial

# Calls that time an update: their number, and seconds after which LEAST are enough.
LEAST, RESIDENT, STREAMED, SECONDS = 6, 12, 500, 20.0


def describe(config: ConfigDict, workdir: str) -> str:
    """A table of the steps, and time and device memory measured on a few updates.

    Args:
      config: resolved configuration.
      workdir: of the run; only compiled programs are written there.

    Raises:
      UserError: as for the run itself.
    """
    run = setup.prepare(config, workdir)
    progress = initial(run)
    lines = [
        "step  phase     classes  images  exemplars  images a class  log-prior      "
        "updates",
        "----  --------  -------  ------  ---------  --------------  -------------  "
        "-------",
    ]
    updates = 0
    for data in phases.planned_phases(config, run.dataset):
        context = make_context(run, progress, data)
        prior = np.asarray(context.log_prior)
        prior = prior[prior > EXCLUDED]
        counts = data.counts[: data.num_seen]
        plan = loop.make_plan(config, data)
        updates += plan.updates
        span = f"{prior.min():.2f}..{prior.max():.2f}"
        many = f"{counts.min()}..{counts.max()}"
        lines.append(
            f"{data.step:4d}  {data.phase:8}  {data.num_seen:7d}  "
            f"{len(data.train):6d}  {data.exemplars:9d}  {many:>14}  {span:>13}  "
            f"{plan.updates:7d}"
        )
    seconds, memory = _measure(run, progress)
    total = updates * seconds
    lines.append(
        f"{updates} updates of {config.optim.batch_size} images at "
        f"{1000 * seconds:.1f} ms: about {total / 3600:.2f} h of training on "
        f"{run.programs.parallel.num_devices} {run.programs.parallel.platform} "
        f"device(s); device memory {memory}"
    )
    return "\n".join(lines)


def _measure(run: setup.Run, progress: Progress) -> tuple[float, str]:
    """Seconds of a base update, its images included, and its device memory."""
    data = phases.planned_phases(run.config, run.dataset)[0]
    context = make_context(run, progress, data)
    width, devices = run.programs.updates_per_call, run.programs.parallel
    plan = loop.make_plan(run.config, data)
    epochs = max(plan.epochs, -(-LEAST * width // plan.updates_per_epoch))
    rates = plan.learning_rates[:1] * epochs
    plan = dataclasses.replace(plan, epochs=epochs, learning_rates=rates)
    # Compiled with the last images alone: while it lasts, many would be read ahead.
    last = max(plan.updates - width, 0)
    state, _ = loop.call(
        run.programs, progress.state, context, run.train, plan, last, width
    )
    ends, counts = [], []
    most = RESIDENT if run.train.resident is not None else STREAMED
    with contextlib.closing(loop.calls(run.programs, run.train, plan, 0)) as calls:
        for count, arguments in itertools.islice(calls, most):
            state, metrics = run.programs.base_update(
                state, context, run.train.resident, *arguments
            )
            jax.block_until_ready((state, metrics))
            ends.append(time.perf_counter())
            counts.append(count)
            late = parallel.largest(devices, [ends[-1] - ends[0] > SECONDS])
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
