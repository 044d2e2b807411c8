"""Runs processes of bsce_jax.main until the chosen cells are filled."""

import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from bsce_jax.config.hashes import differences
from bsce_jax.errors import UserError
from bsce_jax.hosts.workdir import in_use
from bsce_jax.report import results
from bsce_jax.reproduce import tables
from bsce_jax.reproduce.bases import BaseSteps
from bsce_jax.reproduce.process import Process, log_file, logged_updates, workdir
from bsce_jax.reproduce.tables import Job

GRACE = 60.0  # seconds that runs get to save and end
LOOK_SECONDS = 1.0  # from one look at the runs to the next
SHOW_SECONDS = 10.0  # from one line of progress to the next


class Runner:
    """Keeps so many jobs going; a base step is trained once and then shared.

    Attributes:
      states: of each job by name: "to do", "running", "elsewhere" (another process has
        its workdir), "done" or "failed".
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        output: pathlib.Path,
        at_once: int,
        show: Callable[[str], None],
        changed: Callable[[dict[str, str], bool], None],
    ) -> None:
        """Looks at what is done already.

        Args:
          jobs: those of this process.
          output: folder of all runs.
          at_once: how many may run.
          show: takes a line of progress.
          changed: takes the jobs' states when one starts or ends, and whether that is
            the last time.
        """
        self._jobs, self._output, self._at_once = jobs, output, at_once
        self._show, self._changed = show, changed
        self._bases = BaseSteps(output, jobs)
        self.states = {job.name: state(output, job) for job in jobs}
        self._active: list[Process] = []
        # Updates done, of each job that is neither done nor to do from its start.
        self._updates = {
            job.name: logged_updates(log_file(output, job.name))
            for job in jobs
            if (output / workdir(job.name) / "checkpoints").exists()
        }
        self._began, self._advanced = time.monotonic(), 0

    def work(self, deadline: float, stop: Callable[[], bool]) -> None:
        """Runs what is to do until all is done, the deadline or `stop`."""
        shown = -SHOW_SECONDS
        try:
            while not stop() and time.monotonic() < deadline:
                self._collect(stop)
                self._start()
                if not self._active and not self._waiting():
                    return
                if time.monotonic() - shown >= SHOW_SECONDS:
                    shown = time.monotonic()
                    self._show(self.progress())
                time.sleep(LOOK_SECONDS)
        finally:
            self._end()

    def _waiting(self) -> bool:
        """Whether a job is still to do, but not yet: see `_start`."""
        return any(state in ("to do", "elsewhere") for state in self.states.values())

    def _end(self) -> None:
        """Tells all jobs to save and end, at once, and waits."""
        for process in self._active:
            process.tell()
        latest = time.monotonic() + GRACE
        for process in self._active:
            process.wait(latest - time.monotonic())
        self._collect(lambda: True)
        self._changed(self.states, True)

    def _collect(self, stop: Callable[[], bool]) -> None:
        """Judges the jobs that have ended; `stop`: all processes were told to."""
        for process in list(self._active):
            ended, advanced = process.ended(), self._count(process)
            if not ended:
                continue
            self._advanced += advanced
            self._active.remove(process)
            name = process.job.name
            self.states[name], why = self._judge(process, stop)
            self._show(f"{name}: {self.states[name]}{why}")
            self._changed(self.states, False)

    def _judge(self, process: Process, stop: Callable[[], bool]) -> tuple[str, str]:
        """The state of a job that has ended, and what to say of it."""
        folder = self._output / workdir(process.job.name)
        try:
            found = _results(folder)
        except UserError as error:
            return "failed", f", {error}"
        if found is not None and found["status"] == "done":
            return "done", ""
        if process.told or stop():
            return "to do", ""
        if in_use(folder):  # somebody started it at the same time
            return "elsewhere", ""
        return "failed", f", {process.end} (see {process.log})"

    def _start(self) -> None:
        """Starts jobs as long as there is room, but none that waits for a base step."""
        free = self._at_once - len(self._active)
        if free <= 0:
            return
        bases = self._bases.scan()
        for job in self._jobs:
            if self.states[job.name] not in ("to do", "elsewhere"):
                continue
            if in_use(self._output / workdir(job.name)):
                if self.states[job.name] == "to do":
                    self._show(f"{job.name}: runs in another process")
                self.states[job.name] = "elsewhere"
                continue
            if self.states[job.name] == "elsewhere":
                self.states[job.name] = state(self._output, job)
                self._changed(self.states, False)
            if self.states[job.name] == "done" or not free:
                continue
            base = self._base(job, bases)
            if base is not None:
                free -= 1
                self.states[job.name] = "running"
                self._active.append(Process(job, self._output, base))
                self._changed(self.states, False)

    def _base(self, job: Job, bases: dict[str, str]) -> str | None:
        """A folder whose base step is taken over, "" for its own, None to wait."""
        if self._bases.has_step(job.name):
            return ""
        if job.base_hash in bases:
            return bases[job.base_hash]
        same = [other for other in self._jobs if other.base_hash == job.base_hash]
        busy = any(self.states[o.name] in ("running", "elsewhere") for o in same)
        return None if busy else ""

    def _count(self, process: Process) -> int:
        """Notes how far a process is; returns what it has done itself."""
        name, now = process.job.name, process.updates()
        if now:
            self._updates[name] = now
        return (now - process.first) * process.job.pixels

    def _done(self) -> int:
        """The cost of what is done of all but failed jobs; a base step counts once."""
        done, bases = 0, set()
        for job in self._jobs:
            if self.states[job.name] == "failed":
                continue
            own = min(self._updates.get(job.name, 0), job.updates)
            own = job.updates if self.states[job.name] == "done" else own
            if own and job.base_hash in bases:
                own = max(0, own - job.base_updates)
            elif own:
                bases.add(job.base_hash)
            done += own * job.pixels
        return done

    def progress(self) -> str:
        """A line: runs done, share of the updates, time left at the pace so far."""
        advanced = self._advanced + sum(map(self._count, self._active))
        alive = [job for job in self._jobs if self.states[job.name] != "failed"]
        total, done = sum(map(tables.cost, tables.by_base_step(alive))), self._done()
        finished = sum(state == "done" for state in self.states.values())
        line = f"{finished}/{len(self._jobs)} runs, {100 * done / max(1, total):.1f} %"
        if failed := len(self._jobs) - len(alive):
            line += f", {failed} failed"
        if advanced > 0:
            seconds = (time.monotonic() - self._began) * (total - done) / advanced
            line += f", about {seconds / 3600:.1f} h left"
        now = [
            f"{p.job.name} at {self._updates.get(p.job.name, 0)}/{p.job.updates}"
            for p in self._active
        ]
        return ", ".join([line, *now])


def state(output: pathlib.Path, job: Job) -> str:
    """ "done" or "to do", as the disk says.

    Raises:
      UserError: the folder holds a run of another configuration.
    """
    folder = output / workdir(job.name)
    found = _results(folder)
    if found is None:
        return "to do"
    if found["config_hash"] != job.config_hash:
        changed = differences(found["config"], dict(job.config))
        raise UserError(
            f"{folder} holds a run of another configuration ({changed}): "
            "give another --output"
        )
    return "done" if found["status"] == "done" else "to do"


def _results(folder: pathlib.Path) -> dict[str, Any] | None:
    """The results in a run's folder, None before its first finished step."""
    if not (folder / results.FILE_NAME).exists():
        return None
    return results.read(folder)
