"""Prepares a data set once, without TensorFlow.

    python -m bsce_jax.data.prepare digits
    python -m bsce_jax.data.prepare cifar100 [--archive cifar-100-binary.tar.gz]
    python -m bsce_jax.data.prepare image_folder --name my_birds --train FOLDER
    python -m bsce_jax.data.prepare index imagenet2012

CIFAR-100 comes from its authors' site (169 MB), or from a copy of the same file.
`image_folder` prepares anyone's JPEG and PNG images, in one folder a class; `index`
writes beside a large data set that other code has prepared of what class each image is.
"""

import argparse
import contextlib
import glob

from bsce_jax import terminal

if __name__ == "__main__":
    terminal.start()  # before what takes seconds

import hashlib
import http.client
import pathlib
import signal
import sys
import tempfile
import types
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from bsce_jax.data import metadata, source
from bsce_jax.data.builders import cifar100, digits, image_folder
from bsce_jax.errors import UserError

BLOCK = 1 << 20  # bytes read at a time
TIMEOUT = 30  # seconds without an answer


def prepare_cifar100(
    data_dir: str = "", archive: str = "", *, verify: bool = True
) -> pathlib.Path:
    """Prepares CIFAR-100 and returns its folder; does nothing where it exists.

    Args:
      data_dir: tfds data directory, as in `source.open_split`.
      archive: path of cifar-100-binary.tar.gz; "" downloads it.
      verify: whether size and SHA-256 must be those of the official archive.

    Raises:
      UserError: no download, another archive than the official one, no room.
    """
    root = source.root(data_dir)
    folder = root / "cifar100" / str(cifar100.Cifar100.VERSION)
    if metadata.is_prepared(folder):
        return folder
    size, sha256 = cifar100.official()
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(archive or f"{scratch}/cifar-100-binary.tar.gz")
        if not archive:
            download(cifar100.URL, path, size)
        if verify:
            check(path, size, sha256)
        return cifar100.prepare(root, path)


def download(url: str, path: pathlib.Path, size: int) -> None:
    """Writes what is at url to path, with a progress bar on a terminal.

    Args:
      url: of the file.
      path: where to write it.
      size: expected bytes, for the bar; no more than this is read.

    Raises:
      UserError: the download fails.
    """
    shown = terminal.shows_bars()
    try:
        with (
            urllib.request.urlopen(url, timeout=TIMEOUT) as answer,
            path.open("wb") as file,
            tqdm(
                total=size, desc=path.name, unit="B", unit_scale=True, disable=not shown
            ) as bar,
        ):
            while file.tell() <= size and (block := answer.read(BLOCK)):
                file.write(block)
                bar.update(len(block))
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot download {url}: {error}; fetch the file some other way and give "
            "it by --archive"
        ) from error


def check(path: pathlib.Path, size: int, sha256: str) -> None:
    """Makes sure that a file has the expected size in bytes and SHA-256.

    Raises:
      UserError: it has not, or cannot be read.
    """
    try:
        found = path.stat().st_size
        if found != size:
            raise UserError(f"archive {path} has {found} bytes, {size} are expected")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"archive {path} cannot be read: {error.strerror}") from error
    if digest != sha256:
        raise UserError(f"archive {path} has SHA-256 {digest}, {sha256} is expected")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status.

    It is 0, 2 after an error, 130 after Ctrl-C and 143 after SIGTERM.
    """
    options = _parser().parse_args(arguments)
    try:
        with _cleaning_up():
            print(options.run(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except _Interrupted as interrupted:
        print("interrupted; nothing is left behind", file=sys.stderr)
        return 128 + interrupted.number
    return 0


class _Interrupted(BaseException):  # or a library's `except Exception` may keep it
    def __init__(self, number: int) -> None:
        self.number = number


@contextlib.contextmanager
def _cleaning_up() -> Iterator[None]:
    """Makes SIGTERM and Ctrl-C remove what is half made; a second one ends at once."""

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        for known in previous:
            signal.signal(known, signal.SIG_DFL)
        raise _Interrupted(number)

    numbers = signal.SIGINT, signal.SIGTERM
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = terminal.Arguments(
        prog="python -m bsce_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(required=True, metavar="DATA_SET")

    def add(name: str, run: Callable[..., str], text: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument(
            "--data_dir", default="", help="$TFDS_DATA_DIR or ~/tensorflow_datasets"
        )
        action.set_defaults(run=run)
        return action

    add("digits", _digits, "8x8 digits, which scikit-learn ships")
    cifar = add("cifar100", _cifar100, "CIFAR-100")
    cifar.add_argument("--archive", default="", help="cifar-100-binary.tar.gz")
    folder = add("image_folder", _image_folder, "a folder of class folders")
    folder.add_argument("--name", required=True, help="of the data set, like my_birds")
    folder.add_argument("--train", required=True, help="folder of class folders")
    folder.add_argument("--test", default="", help="folder of the same class folders")
    folder.add_argument(
        "--test_fraction",
        type=float,
        help="without --test: share of every class's images (0.2)",
    )
    folder.add_argument("--seed", type=int, default=0, help="of that share (0)")
    folder.add_argument(
        "--test_name",
        default="",
        help="name of the split (test; validation for imagenet2012)",
    )
    for flag, what in (
        ("--corrupt", "files that are no whole images"),
        ("--other_files", "what is no .jpg, .jpeg or .png file"),
    ):
        choices = ["refuse", "skip"]
        folder.add_argument(flag, choices=choices, default="refuse", help=what)
    folder.add_argument(
        "--check",
        choices=["ends", "full"],
        default="ends",
        help="look at the header and the end of a file, or decode all of it",
    )
    index = add("index", _index, "label index of a prepared data set")
    index.add_argument("name", help="such as imagenet2012, imagenet2012:5.1.0")
    return parser


def _digits(options: argparse.Namespace) -> str:
    root = source.root(options.data_dir)
    return _prepared(
        root, "digits", digits.Digits.VERSION, lambda: digits.prepare(root)
    )


def _cifar100(options: argparse.Namespace) -> str:
    return _prepared(
        source.root(options.data_dir),
        "cifar100",
        cifar100.Cifar100.VERSION,
        lambda: prepare_cifar100(options.data_dir, options.archive),
    )


def _image_folder(options: argparse.Namespace) -> str:
    if options.test and options.test_fraction is not None:
        raise UserError("--test_fraction: not allowed beside --test")
    if not options.train:
        raise UserError("--train='': expected a folder of class folders")
    image_folder.check_name(options.name)
    root = source.root(options.data_dir)

    def run() -> pathlib.Path:
        fraction = options.test_fraction
        return image_folder.prepare(
            options.name,
            root,
            options.train,
            options.test,
            test_name=options.test_name,
            test_fraction=0.2 if fraction is None else fraction,
            seed=options.seed,
            skip_corrupt=options.corrupt == "skip",
            skip_others=options.other_files == "skip",
            decode_all=options.check == "full",
        )

    said = _prepared(root, options.name, image_folder.VERSION, run)
    left_out = root / options.name / image_folder.VERSION / image_folder.LEFT_OUT
    if left_out.is_file():
        said += f", without the files in {left_out}"
    return said


def _prepared(
    root: pathlib.Path, name: str, version: Any, run: Callable[[], pathlib.Path]
) -> str:
    """Prepares what is not there yet, and says so."""
    folder = root / name / str(version)
    try:
        before = metadata.is_prepared(folder)
    except OSError as error:  # no such path can be
        raise UserError(f"--data_dir={str(root)!r}: {error.strerror}") from error
    for path in sorted(root.glob(f".{glob.escape(name)}-*")):
        # Not removed: whether its owner is at work, on any machine, cannot be told.
        print(
            f"note: {path} is of a preparation that was killed, or is still at work; "
            "if none is, remove it",
            file=sys.stderr,
        )
    if before:
        return f"{name} was prepared before in {folder}: nothing is done"
    return f"{name} is prepared in {run()}"


def _index(options: argparse.Namespace) -> str:
    folder = source.write_indexes(options.name, options.data_dir)
    return f"{options.name} has a label index of every split in {folder}"


if __name__ == "__main__":
    terminal.run(main)
