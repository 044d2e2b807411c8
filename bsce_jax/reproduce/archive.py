"""What one machine leaves another to go on with: a few tar files in a folder."""

import io
import logging
import lzma
import os
import pathlib
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping

from etils import epath

from bsce_jax.checkpoints import store
from bsce_jax.errors import UserError
from bsce_jax.hosts.workdir import in_use
from bsce_jax.report import results

logger = logging.getLogger("bsce_jax")

RESULTS, GOING = "results.tar.gz", "going.tar"
BASES, COMPILED = "bases.tar", "compiled.tar"
# In this order they are taken over: a run that has ended since is in both of the first.
NAMES = (GOING, RESULTS, BASES, COMPILED)


class Export:
    """A folder that is brought up to date from time to time.

    results.tar.gz: results.json of finished runs; going.tar: runs that are not, with
    their newest checkpoint; bases.tar: networks of base steps; compiled.tar: compiled
    programs. Each is replaced at once, and only where something has changed.
    """

    def __init__(
        self, folder: pathlib.Path, output: pathlib.Path, compiled: "Compiled"
    ) -> None:
        """Makes the folder.

        Args:
          folder: of the tar files.
          output: folder of all runs.
          compiled: the compiled programs.

        Raises:
          UserError: it cannot be made.
        """
        self._folder, self._output, self._compiled = folder, output, compiled
        self._written: dict[str, object] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"--export={folder} cannot be made: {reason}") from None

    def write(self) -> None:
        """Replaces what has changed; one file that cannot be does not keep others.

        Raises:
          UserError: a file cannot be written, or a run cannot be read.
        """
        problems = []
        done: dict[str, pathlib.Path] = {}
        going: dict[str, pathlib.Path] = {}
        for run in _folders(self._output / "runs"):
            if _rank(run)[0]:
                done |= _members(self._output, run / results.FILE_NAME)
            elif numbers := store.numbers(run / store.FOLDER):
                newest = run / store.FOLDER / str(numbers[-1])
                going |= _members(self._output, run / results.FILE_NAME, newest)
        bases = _members(self._output, *_folders(self._output / "bases"))
        compiled = {f"compiled/{path.name}": path for path in self._compiled.own()}
        for name, members in zip(NAMES, (going, done, bases, compiled), strict=True):
            try:
                self._replace(name, members)
            except (UserError, OSError) as error:  # a run may prune its checkpoints
                problems.append(f"{name}: {error}")
        if problems:
            raise UserError("; ".join(problems))

    def _replace(self, name: str, members: Mapping[str, pathlib.Path]) -> None:
        """Replaces one file, if there is something to say or an older one there."""
        stamp = [(m, p.stat().st_mtime_ns) for m, p in sorted(members.items())]
        target = self._folder / name
        if self._written.get(name) == stamp or not (stamp or target.exists()):
            return
        packed = pack(members, name.endswith(".gz"))
        results.replace(epath.Path(target), packed)
        self._written[name] = stamp


class Compiled:
    """JAX's folder of compiled programs: those of this process and imported ones."""

    def __init__(self, folder: pathlib.Path | None) -> None:
        """Looks at what is there already; None: nothing is kept."""
        self.folder = folder
        self._others = {path.name for path in self._files()}

    def own(self) -> list[pathlib.Path]:
        """The files that were not there before."""
        return [path for path in self._files() if path.name not in self._others]

    def take(self, files: Iterator[pathlib.Path]) -> None:
        """Copies files there; those that cannot be will be compiled again."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in filter(_is_file, files):
                # The folder may be on another disk than the files.
                new = self.folder / f".{path.name}.{os.getpid()}.new"
                shutil.copyfile(path, new)
                os.replace(new, self.folder / path.name)
                self._others.discard(path.name)
        except OSError as error:
            logger.warning("compiled programs are not taken over: %s", error)

    def _files(self) -> Iterator[pathlib.Path]:
        if self.folder is not None and self.folder.is_dir():
            yield from (path for path in self.folder.iterdir() if _is_file(path))


def pack(members: Mapping[str, pathlib.Path], compress: bool) -> bytes:
    """A tar file of regular files, by their names inside."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if compress else "w") as tar:
        for name, path in sorted(members.items()):
            data = path.read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def unpack(file: pathlib.Path, folder: pathlib.Path) -> None:
    """Unpacks a tar file of regular files that stay inside of the folder.

    Raises:
      UserError: it is none.
    """
    try:
        with tarfile.open(file) as tar:
            for member in tar:
                if not member.isreg():
                    raise UserError(f"{file}: {member.name!r} is no regular file")
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise UserError(f"{file} cannot be unpacked: {error}") from None
    except (zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{file} cannot be unpacked: {error}") from None


def take_over(folder: pathlib.Path, output: pathlib.Path, compiled: Compiled) -> None:
    """Takes over what `Export` has written; what is further here stays as it is.

    Raises:
      UserError: there is no such folder, it cannot be unpacked, or a run in it is one
        of another configuration than here.
    """
    found = [folder / name for name in NAMES if (folder / name).is_file()]
    if not found:
        raise UserError(f"--import={folder}: expected a folder that --export has made")
    try:
        with tempfile.TemporaryDirectory(prefix=".import-", dir=output) as name:
            for file in found:
                unpack(file, pathlib.Path(name))
            _take_all(pathlib.Path(name), output, compiled)
    except OSError as error:
        reason = f"cannot be taken over: {error}"
        raise UserError(f"--import={folder} {reason}") from None


def _take_all(new: pathlib.Path, output: pathlib.Path, compiled: Compiled) -> None:
    """Takes over what was unpacked."""
    for run in _folders(new / "runs"):
        _take_run(run, output / "runs" / run.name)
    for base in _folders(new / "bases"):
        results.read(base)
        if not (output / "bases" / base.name).exists():
            (output / "bases").mkdir(exist_ok=True)
            base.rename(output / "bases" / base.name)
    if (new / "compiled").is_dir():
        compiled.take(path for path in (new / "compiled").iterdir())


def _take_run(new: pathlib.Path, old: pathlib.Path) -> None:
    """Moves results and newest checkpoint of a run where they are further."""
    if in_use(old) or _rank(old) >= _rank(new):
        return
    if (old / results.FILE_NAME).exists() and (new / results.FILE_NAME).exists():
        theirs, ours = results.read(new), results.read(old)
        if theirs["config_hash"] != ours["config_hash"]:
            raise UserError(
                f"--import: {old} holds a run of another configuration: "
                "give another --output"
            )
    (old / store.FOLDER).mkdir(parents=True, exist_ok=True)
    for number in store.numbers(new / store.FOLDER):
        checkpoint = new / store.FOLDER / str(number)
        checkpoint.rename(old / store.FOLDER / str(number))
    if (new / results.FILE_NAME).exists():
        os.replace(new / results.FILE_NAME, old / results.FILE_NAME)


def _rank(run: pathlib.Path) -> tuple[bool, int]:
    """How far a run is: whether it is done, and the number of its newest checkpoint."""
    done = False
    if (run / results.FILE_NAME).exists():
        done = results.read(run)["status"] == "done"
    return done, max(store.numbers(run / store.FOLDER), default=-1)


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders in a folder, which need not exist, but for hidden ones."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in inside if path.is_dir() and path.name[0] != "."]


def _members(output: pathlib.Path, *paths: pathlib.Path) -> dict[str, pathlib.Path]:
    """All regular files of some paths, by their names in the output folder."""
    files = [file for path in paths for file in (path, *path.rglob("*"))]
    return {str(p.relative_to(output)): p for p in files if _is_file(p)}


def _is_file(path: pathlib.Path) -> bool:
    return path.is_file() and not path.is_symlink()
