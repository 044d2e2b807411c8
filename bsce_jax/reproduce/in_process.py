"""Runs one job after another in this process, which reads and compiles things once."""

import contextlib
import logging
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import jax
from etils import epath
from ml_collections import ConfigDict

from bsce_jax import experiment
from bsce_jax.config.flags import parse
from bsce_jax.config.resolve import resolve
from bsce_jax.errors import UserError
from bsce_jax.hosts import jax_settings
from bsce_jax.hosts.stop import StopSignal
from bsce_jax.hosts.workdir import in_use, lock, open_workdir
from bsce_jax.report import results
from bsce_jax.reproduce.archive import Export
from bsce_jax.reproduce.bases import BaseSteps, keep_networks
from bsce_jax.reproduce.process import absolute, absolute_folders, workdir
from bsce_jax.reproduce.runner import state
from bsce_jax.reproduce.tables import Job
from bsce_jax.run.loop import StopRequested
from bsce_jax.run.shared import Shared

logger = logging.getLogger("bsce_jax")

GRACE = 10.0  # seconds before a limit in which the last run saves, and all is packed
# Seconds to the first checkpoint of a run whose programs are compiled, and of another.
READY, COMPILING = 5.0, 45.0
# What holds for the whole process.
_OF_PROCESS = ("deterministic", "matmul_precision", "compile_cache")


def configure(jobs: Sequence[Job], output: pathlib.Path) -> pathlib.Path | None:
    """JAX's settings of all jobs; returns its folder of compiled programs, if any.

    Raises:
      UserError: the jobs do not agree on them, or there is no device.
    """
    for name in _OF_PROCESS:
        values = {job.config[name] for job in jobs}
        if len(values) > 1:
            shown = " and ".join(sorted(map(str, values)))
            raise UserError(
                f"--in_process: config.{name} is {shown} in different runs: expected "
                "one value, which holds for the whole process"
            )
    config = config_of(jobs[0])
    jax_settings.configure_jax(config, epath.Path(output))
    jax_settings.keep_compiled(config, alone=True)
    jax_settings.require_devices()
    os.environ.update(absolute_folders())  # runs are in the folder `output`
    given = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not given:
        return None
    folder = absolute(given)
    jax.config.update("jax_compilation_cache_dir", folder)
    return pathlib.Path(folder)


def devices() -> str:
    """What runs will be on, in a few words."""
    found = jax.devices()
    return f"on {len(found)} {found[0].platform} device(s), {found[0].device_kind}"


def config_of(job: Job, base: str = "") -> ConfigDict:
    """The configuration of a job; `base` is a folder whose base step it takes over."""
    taken = [f"--config.init_from={base}"] if base else []
    return resolve(parse(["reproduce", *job.flags, *taken]).config)


class Rows:
    """Runs jobs in their order; a base step is trained once and then shared.

    Attributes:
      states: of each job by name, as a `runner.Runner` has them.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        output: pathlib.Path,
        shared: Shared,
        show: Callable[[str], None],
        changed: Callable[[dict[str, str], bool], None],
        export: Export | None = None,
    ) -> None:
        """Looks at what is done already.

        Args:
          jobs: in the order in which they run.
          output: folder of all runs.
          shared: what they have in common.
          show, changed: as for a `runner.Runner`.
          export: is brought up to date after every step.
        """
        self._jobs, self._output, self._shared = jobs, output, shared
        self._show, self._changed, self._export = show, changed, export
        self._bases = BaseSteps(output, jobs)
        self._ahead: dict[str, Future[bool]] = {}
        self.states = {job.name: state(output, job) for job in jobs}

    def work(self, deadline: float, stop: StopSignal) -> None:
        """Runs what is to do until all is done, the deadline, or `stop`."""
        # A run writes relative names of its neighbours: see `process.Process`.
        with contextlib.chdir(self._output), _ended_at(deadline, stop):
            try:
                for job in self._to_do():
                    if stop.number or not self._has_time(job, deadline):
                        break
                    self._run(job, stop)
            finally:
                self._pack()
                # A page takes seconds, which a limit does not have.
                ended = all(s in ("done", "failed") for s in self.states.values())
                self._changed(self.states, ended or deadline == float("inf"))

    def left(self) -> list[str]:
        """A line for each job that is not done: its state, and how far it is."""
        lines = []
        for job in self._jobs:
            if self.states[job.name] != "done":
                steps = 0
                with contextlib.suppress(UserError):  # it has not finished any
                    folder = self._output / workdir(job.name)
                    steps = len(results.read(folder)["steps"])
                has_base = job.config["scenario.base_classes"] > 0
                of = job.config["scenario.steps"] + has_base
                state = self.states[job.name]
                lines.append(f"{job.name}: {state}, {steps} of {of} steps finished")
        return lines

    def _to_do(self) -> Iterator[Job]:
        """The jobs that are to do, where no other process has them."""
        for job in self._jobs:
            if self.states[job.name] != "to do":
                continue
            if in_use(self._output / workdir(job.name)):
                self.states[job.name] = "elsewhere"
                self._show(f"{job.name}: runs in another process")
                continue
            yield job

    def _has_time(self, job: Job, deadline: float) -> bool:
        """Whether a job would reach a checkpoint."""
        ahead = self._ahead.get(job.name)
        compiled = ahead is not None and ahead.done() and ahead.result()
        needed = READY if compiled else COMPILING
        return deadline - time.monotonic() >= needed

    def _run(self, job: Job, stop: StopSignal) -> None:
        """Runs a job, and compiles what it and the one after it need meanwhile."""
        self.states[job.name] = "running"
        self._changed(self.states, False)
        self._show(f"{job.name}: begins")
        following = [j for j in self._jobs if self.states[j.name] == "to do"]
        trained = set(self._bases.scan())
        for each in (job, *following[:1]):
            if each.name not in self._ahead:
                base = each.base_hash not in trained
                config = config_of(each)
                self._ahead[each.name] = self._shared.compile_ahead(config, base)
            trained.add(job.base_hash)  # when the following one begins
        self.states[job.name], why = self._outcome(job, stop)
        self._show(f"{job.name}: {self.states[job.name]}{why}")
        self._changed(self.states, False)

    def _outcome(self, job: Job, stop: StopSignal) -> tuple[str, str]:
        """Runs a job; returns its state and what to say of it."""
        bases = self._bases.scan()
        own = self._bases.has_step(job.name)
        config = config_of(job, "" if own else bases.get(job.base_hash, ""))
        folder = epath.Path(workdir(job.name)).resolve()
        try:
            open_workdir(folder)
            parts = self._shared.parts
            with lock(folder), experiment.prepared(config, folder, parts) as run:
                experiment.carry_out(run, stop, self._pack)
        except StopRequested as stopped:
            return "to do", f", {stopped}"
        except UserError as error:
            return "failed", f", {error}"
        except Exception as error:  # such as too little memory: the others go on
            logger.exception("%s", job.name)
            return "failed", f", {type(error).__name__}"
        return "done", ""

    def _pack(self) -> None:
        """Brings the export up to date."""
        if self._export is None:
            return
        for pack in (self._keep_networks, self._export.write):
            try:
                pack()
            except (UserError, OSError) as error:
                self._show(f"not exported: {error}")  # the runs matter more

    def _keep_networks(self) -> None:
        keep_networks(self._output, self._bases.scan(), self._jobs)


@contextlib.contextmanager
def _ended_at(deadline: float, stop: StopSignal) -> Iterator[None]:
    """Asks for an end at a time, as SIGTERM does."""

    def ask() -> None:
        stop.number = stop.number or signal.SIGTERM

    timer = None
    if deadline < float("inf"):
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), ask)
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
