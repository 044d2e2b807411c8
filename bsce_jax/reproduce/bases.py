"""The finished base steps in an output folder, which runs start from."""

import pathlib
import shutil
from collections.abc import Mapping, Sequence

from etils import epath

from bsce_jax.checkpoints import manifest, part, store
from bsce_jax.errors import UserError
from bsce_jax.report import results
from bsce_jax.report.schema import upgraded
from bsce_jax.reproduce.process import workdir
from bsce_jax.reproduce.tables import Job
from bsce_jax.run.progress import finished_checkpoint

FOLDER = "bases"  # of networks alone; whole runs are in "runs"
_OPTIMISER = "state/opt_state/"


class BaseSteps:
    """The finished base steps in an output folder, by hash; files are read once."""

    def __init__(self, output: pathlib.Path, jobs: Sequence[Job] = ()) -> None:
        """Reads nothing yet; `jobs` are those that may start from one."""
        self._output = output
        self._optimised = {job.base_hash for job in jobs if _goes_on(job)}
        self._known: dict[str, tuple[tuple[int, int], str]] = {}

    def scan(self) -> dict[str, str]:
        """For each base hash a folder with a checkpoint to start from, in the output.

        One of the network alone before a run's, which may have come without it; and
        where a job goes on with the optimiser of the base step, one that has that too.
        """
        found: dict[str, str] = {}
        for kind in (FOLDER, "runs"):
            folders = self._output / kind
            for folder in sorted(folders.iterdir()) if folders.is_dir() else ():
                key = self._read(folder)
                if key not in found and key and self._suffices(folder, key):
                    found[key] = f"{kind}/{folder.name}"
        return found

    def _suffices(self, folder: pathlib.Path, key: str) -> bool:
        """Whether there is a checkpoint with all that jobs of the hash go on with."""
        checkpoints = epath.Path(folder / store.FOLDER)
        if key not in self._optimised:
            return any(checkpoints.glob("*"))
        try:
            number = finished_checkpoint(checkpoints, 0)
            arrays = manifest.read(checkpoints / str(number))["arrays"]
        except UserError:
            return False
        return any(name.startswith(_OPTIMISER) for name in arrays)

    def has_step(self, name: str) -> bool:
        """Whether a run has finished a step itself; as of the last scan."""
        return bool(self._known.get(workdir(name), ((0, 0), ""))[1])

    def _read(self, folder: pathlib.Path) -> str:
        """The base hash of a run with a finished step, else ""."""
        name = f"{folder.parent.name}/{folder.name}"
        try:
            stat = (folder / results.FILE_NAME).stat()
            stamp = stat.st_mtime_ns, stat.st_size
            if self._known.get(name, ((0, 0), ""))[0] != stamp:
                found = results.read(folder)
                key = found["base_hash"] if found["steps"] else ""
                # It becomes the name of a folder, and anybody may have written it.
                named = key.isascii() and key.isalnum()
                self._known[name] = stamp, key if named else ""
        except (OSError, UserError):  # none, or not a run's
            return ""
        return self._known[name][1]


def keep_networks(
    output: pathlib.Path, found: Mapping[str, str], jobs: Sequence[Job]
) -> None:
    """Copies the networks of base steps into OUTPUT/bases, where they are not yet.

    Without the rest of their checkpoints, which is more than half of it; the
    optimiser's state goes with them where a job goes on with it.

    Args:
      output: folder of all runs.
      found: see `BaseSteps.scan`.
      jobs: that may start from them.

    Raises:
      UserError: one cannot be read or written; the others are there.
    """
    problems = []
    for key, folder in found.items():
        kept = output / FOLDER / key[:16]
        if folder.startswith(FOLDER):
            continue
        try:
            _keep_network(output / folder, key, kept, jobs)
        except (UserError, OSError) as error:
            problems.append(f"{kept.name}: {error}")
    if problems:
        raise UserError("; ".join(problems))


def _keep_network(
    folder: pathlib.Path, key: str, kept: pathlib.Path, jobs: Sequence[Job]
) -> None:
    """Copies one network, with the optimiser's state where a job needs it."""
    parts: tuple[str, ...] = ("state/network/",)
    if any(job.base_hash == key and _goes_on(job) for job in jobs):
        parts += (_OPTIMISER,)
    checkpoints = epath.Path(folder / store.FOLDER)
    number = finished_checkpoint(checkpoints, 0)
    new = kept.with_name(f".{kept.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    (new / store.FOLDER).mkdir(parents=True)
    part.copy(checkpoints, number, new / store.FOLDER, parts)
    meta = store.read_meta(checkpoints, number)
    results.write(new, upgraded(meta["results"]))
    shutil.rmtree(kept, ignore_errors=True)  # one that lacks what is wanted now
    new.rename(kept)


def _goes_on(job: Job) -> bool:
    """Whether a phase of a job's goes on with the optimiser of the one before."""
    config = job.config
    return any(
        value == "kept" and config[name.replace(".optimizer", ".epochs")]
        for name, value in config.items()
        if name.startswith("phase.") and name.endswith(".optimizer")
    )
