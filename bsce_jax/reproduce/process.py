"""A job in a process of its own: starting, watching and stopping it."""

import os
import pathlib
import re
import shlex
import signal
import subprocess

from bsce_jax import untrusted
from bsce_jax.config import files
from bsce_jax.reproduce import tables
from bsce_jax.reproduce.tables import Job

_UPDATES = re.compile(r"(\d+)/\d+ updates")


class Process:
    """A job that has been started, and its log.

    Attributes:
      job: what runs.
      log: file that takes all it prints.
      first: the updates in the first line of this process that told them, 0 before.
      told: whether it has been asked to end.
    """

    def __init__(self, job: Job, output: pathlib.Path, base: str):
        """Starts it; `base` is a folder whose base step it takes over, or is ""."""
        self.job, self.first, self.told = job, 0, False
        self.log = log_file(output, job.name)
        self.log.parent.mkdir(exist_ok=True)
        command = tables.command(job, workdir(job.name), base)
        # In the output folder, so that what a run writes names no other folder.
        paths = [str(files.PACKAGE), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        environment |= absolute_folders()
        with untrusted.open_own(self.log) as file:
            print(f"$ {shlex.join(map(str, command))}", file=file, flush=True)
            self._begin = file.tell()
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

    def tell(self) -> None:
        """Asks it to save and end."""
        if not self.ended():
            self.told = True
            self._process.terminate()

    def wait(self, seconds: float) -> None:
        """Waits for its end; kills it after so many seconds."""
        try:
            self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def end(self) -> str:
        """Why it has ended, in a line: a signal's name, or what it printed last."""
        status = self._process.returncode
        if status < 0:
            text = f"killed by {signal.Signals(-status).name}"
            memory = " (out of memory?)" if status == -signal.SIGKILL else ""
            return text + memory
        lines = tail(self.log, 4000, self._begin).strip().splitlines()
        return lines[-1] if lines else f"exit status {status}"

    def updates(self) -> int:
        """Updates of the whole run that are done, as its newest line says."""
        now = logged_updates(self.log, self._begin)
        self.first = self.first or now
        return now


def absolute(folder: str) -> str:
    """A folder as seen from here, for a process that starts in another one."""
    if not folder or "://" in folder:
        return folder
    return str(pathlib.Path(folder).expanduser().resolve())


def absolute_folders() -> dict[str, str]:
    """The variables of the environment that name folders, as `absolute` ones."""
    names = ("TFDS_DATA_DIR", "JAX_COMPILATION_CACHE_DIR")
    return {n: absolute(os.environ[n]) for n in names if os.environ.get(n)}


def workdir(name: str) -> str:
    """A run's folder in the output folder."""
    return f"runs/{name}"


def log_file(output: pathlib.Path, name: str) -> pathlib.Path:
    """The log of a run's processes, one after another."""
    return output / "logs" / f"{name}.log"


def logged_updates(log: pathlib.Path, begin: int = 0) -> int:
    """The newest number of updates in a log after its byte `begin`; 0: none."""
    found = _UPDATES.findall(tail(log, 2000, begin)) if log.exists() else []
    return int(found[-1]) if found else 0


def tail(path: pathlib.Path, size: int, begin: int = 0) -> str:
    """The last `size` bytes of a text file, at most those after `begin`."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(begin, end - size))
        return file.read().decode(errors="replace")
