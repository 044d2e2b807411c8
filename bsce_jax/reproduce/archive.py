"""What one machine leaves another to go on with: a few tar files in a folder."""

import io
import os
import pathlib
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping

from etils import epath

from bsce_jax.checkpoints import store
from bsce_jax.errors import UserError
from bsce_jax.hosts.workdir import in_use
from bsce_jax.report import results

RESULTS, GOING = "results.tar.gz", "going.tar"
BASES, COMPILED = "bases.tar", "compiled.tar"
NAMES = (RESULTS, GOING, BASES, COMPILED)


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
        """Replaces what has changed.

        Raises:
          UserError: a file cannot be written, or a run cannot be read.
        """
        done: dict[str, pathlib.Path] = {}
        going: dict[str, pathlib.Path] = {}
        for run in _folders(self._output / "runs"):
            if _rank(run)[0]:
                done |= _members(self._output, run / results.FILE_NAME)
            elif numbers := store.numbers(run / "checkpoints"):
                newest = run / "checkpoints" / str(numbers[-1])
                going |= _members(self._output, run / results.FILE_NAME, newest)
        bases = _members(self._output, *_folders(self._output / "bases"))
        compiled = {f"compiled/{path.name}": path for path in self._compiled.own()}
        for name, members in zip(NAMES, (done, going, bases, compiled), strict=True):
            stamp = [(m, p.stat().st_mtime_ns) for m, p in sorted(members.items())]
            if self._written.get(name, []) != stamp:
                target = epath.Path(self._folder) / name
                results.replace(target, pack(members, name.endswith(".gz")))
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
        """Moves files there."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in files:
            os.replace(path, self.folder / path.name)
            self._others.discard(path.name)

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
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
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
    with tempfile.TemporaryDirectory(prefix=".import-", dir=output) as name:
        new = pathlib.Path(name)
        for file in found:
            unpack(file, new)
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
    (old / "checkpoints").mkdir(parents=True, exist_ok=True)
    for number in store.numbers(new / "checkpoints"):
        checkpoint = new / "checkpoints" / str(number)
        checkpoint.rename(old / "checkpoints" / str(number))
    if (new / results.FILE_NAME).exists():
        os.replace(new / results.FILE_NAME, old / results.FILE_NAME)


def _rank(run: pathlib.Path) -> tuple[bool, int]:
    """How far a run is: whether it is done, and the number of its newest checkpoint."""
    done = False
    if (run / results.FILE_NAME).exists():
        done = results.read(run)["status"] == "done"
    return done, max(store.numbers(run / "checkpoints"), default=-1)


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
