"""Runs processes of bsce_jax.main until the chosen cells are filled."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from bsce_jax.errors import UserError
from bsce_jax.report import results as results_file
from bsce_jax.reproduce import cells as tables
from bsce_jax.reproduce.cells import Cell, Run

GRACE = 60.0  # seconds that a run gets to save and end
_UPDATES = re.compile(r"(\d+)/\d+ updates")


class Process:
    """A run in a process of its own, with its log."""

    def __init__(self, run: Run, output: pathlib.Path, base: str):
        """Starts it; `base` names a run whose base step it takes over, or is ""."""
        self.run, self.started = run, time.monotonic()
        self.log = output / "logs" / f"{run.name}.log"
        self.log.parent.mkdir(exist_ok=True)
        command = tables.command(run, workdir(run.name), base and workdir(base))
        # In the output folder, so that what a run writes names no other folder.
        paths = [str(tables.SOURCE), os.environ.get("PYTHONPATH", "")]
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(output / "compiled"),
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        with self.log.open("a", encoding="utf-8") as file:
            print(f"$ {shlex.join(map(str, command))}", file=file, flush=True)
            self._process = subprocess.Popen(
                command,
                cwd=output,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=0,  # Ctrl-C comes to this process, which passes it on
            )

    def ended(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def stop(self) -> None:
        """Asks it to save and end; ends it after the grace period."""
        if not self.ended():
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
        if not self.ended():
            self._process.kill()
        self._process.wait()

    @property
    def asked_to_end(self) -> bool:
        """Whether it ended by a signal, its own progress saved."""
        return self._process.returncode in (128 + 15, 128 + 2, -15, -9)

    def updates(self) -> int:
        """Updates done, as its newest log line says."""
        found = _UPDATES.findall(tail(self.log, 2000))
        return int(found[-1]) if found else 0


def workdir(name: str) -> str:
    """A run's folder in the output folder."""
    return f"runs/{name}"


def tail(path: pathlib.Path, size: int) -> str:
    """The last `size` bytes of a text file."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - size))
        return file.read().decode(errors="replace")


class Runner:
    """Keeps up to `jobs` runs going; a base step is trained once and then shared."""

    def __init__(
        self,
        runs: Sequence[Run],
        output: pathlib.Path,
        jobs: int,
        show: Callable[[str], None],
        changed: Callable[[dict[str, str], bool], None],
    ) -> None:
        """Looks at what is done already.

        Args:
          runs: those of this process.
          output: folder of all runs.
          jobs: runs at once.
          show: takes a line of progress.
          changed: takes the runs' states when one starts or ends, and whether that is
            the last time.
        """
        self._runs, self._output, self._jobs = runs, output, jobs
        self._show, self._changed = show, changed
        self.states = {run.name: state(output, run) for run in runs}
        self._active: list[Process] = []
        self._began, self._done_before = time.monotonic(), self._done()

    def work(self, deadline: float, stop: Callable[[], bool]) -> None:
        """Runs what is to do until all is done, the deadline or `stop`."""
        shown = 0.0
        try:
            while not stop() and time.monotonic() < deadline:
                self._collect()
                self._start()
                if not self._active:
                    return
                if time.monotonic() - shown >= 10:
                    shown = time.monotonic()
                    self._show(self.progress())
                time.sleep(1.0)
        finally:
            for process in self._active:
                process.stop()
                self._judge(process)
            self._active = []
            self._changed(self.states, True)

    def _collect(self) -> None:
        for process in [process for process in self._active if process.ended()]:
            self._active.remove(process)
            process.stop()
            self._judge(process)
            self._show(f"{process.run.name}: {self.states[process.run.name]}")
            self._changed(self.states, False)

    def _judge(self, process: Process) -> None:
        name = process.run.name
        results = read(self._output / workdir(name))
        if results is not None and results["status"] == "done":
            self.states[name] = "done"
        elif process.asked_to_end:
            self.states[name] = "to do"
        else:
            self.states[name] = "failed"
            last = tail(process.log, 4000).strip().splitlines()[-1]
            self._show(f"{name} failed: {last} (see {process.log})")

    def _start(self) -> None:
        """Starts runs as long as there is room, but none that waits for a base step."""
        for run in self._runs:
            if len(self._active) >= self._jobs:
                return
            if self.states[run.name] != "to do":
                continue
            base = self._base(run)
            if base == "wait":
                continue
            self.states[run.name] = "running"
            self._active.append(Process(run, self._output, base))
            self._changed(self.states, False)

    def _base(self, run: Run) -> str:
        """A run whose base step can be taken over, "" for its own, or "wait"."""
        if finished_steps(self._output / workdir(run.name)):
            return ""
        for folder in sorted((self._output / "runs").iterdir()):
            results = read(folder)
            if results and results["steps"] and results["base_hash"] == run.base_hash:
                return folder.name
        same = [other for other in self._runs if other.base_hash == run.base_hash]
        busy = any(self.states[other.name] == "running" for other in same)
        return "wait" if busy else ""

    def _done(self) -> int:
        """Updates of finished and running runs; a shared base step counts once."""
        active = {process.run.name: process.updates() for process in self._active}
        done, bases = 0, set()
        for run in self._runs:
            if self.states[run.name] == "done":
                own = run.updates
            else:
                own = min(active.get(run.name, 0), run.updates)
            if own and run.base_hash in bases:
                own = max(0, own - run.base_updates)
            elif own:
                bases.add(run.base_hash)
            done += own
        return done

    def progress(self) -> str:
        """A line: runs done, share of the updates, time left at the pace so far."""
        groups = tables.by_base_step(self._runs)
        total, done = sum(map(tables.cost, groups)), self._done()
        finished = sum(state == "done" for state in self.states.values())
        line = f"{finished}/{len(self._runs)} runs, {100 * done / total:.1f} %"
        now = [f"{p.run.name} at {p.updates()}/{p.run.updates}" for p in self._active]
        advanced = done - self._done_before
        if advanced > 0:
            seconds = (time.monotonic() - self._began) * (total - done) / advanced
            line += f", about {seconds / 3600:.1f} h left"
        return ", ".join([line, *now])


def state(output: pathlib.Path, run: Run) -> str:
    """ "done" or "to do", as the disk says.

    Raises:
      UserError: the folder holds a run of another configuration.
    """
    folder = output / workdir(run.name)
    results = read(folder)
    if results is None:
        return "to do"
    if results["config_hash"] != run.config_hash:
        raise UserError(
            f"{folder} holds a run of another configuration: give another --output"
        )
    return "done" if results["status"] == "done" else "to do"


def read(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The results of a run, None before its first finished step."""
    if not (workdir / results_file.FILE_NAME).exists():
        return None
    return results_file.read(workdir)


def finished_steps(workdir: pathlib.Path) -> int:
    """Steps that a run has finished."""
    results = read(workdir)
    return len(results["steps"]) if results else 0


def write_manifest(
    output: pathlib.Path,
    protocol: str,
    cells: Sequence[Cell],
    states: dict[str, str],
) -> None:
    """Writes OUTPUT/manifest.json, from which the report page is made.

    {"schema": 1, "protocol": "full" or "reduced: ...", "cells": [{"table", "row",
    "column", "missing", "runs": [{"name", "seed", "workdir", "command", "status"}]}]}
    """
    found = []
    for cell in cells:
        runs = [
            {
                "name": run.name,
                "seed": run.seed,
                "workdir": workdir(run.name),
                "command": tables.shown_command(run),
                "status": states.get(run.name, "to do"),
            }
            for run in cell.runs
        ]
        found.append({**cell._asdict(), "runs": runs})
    manifest = {"schema": 1, "protocol": protocol, "cells": found}
    text = json.dumps(manifest, indent=1) + "\n"
    results_file.replace(epath.Path(output) / "manifest.json", text)
