"""Prepares a data set once, without TensorFlow.

    python -m bsce_jax.data.prepare {digits,cifar100} [--data_dir DIR] [--archive PATH]

CIFAR-100 comes from its authors' site (169 MB), or from a copy of the same file,
cifar-100-binary.tar.gz, given by --archive.
"""

import argparse
import hashlib
import http.client
import pathlib
import sys
import tempfile
import urllib.request
from collections.abc import Sequence

from tqdm import tqdm

from bsce_jax.data import source
from bsce_jax.data.builders import cifar100, digits
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
    if folder.is_dir():
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
    try:
        with (
            urllib.request.urlopen(url, timeout=TIMEOUT) as answer,
            path.open("wb") as file,
            tqdm(
                total=size, desc=path.name, unit="B", unit_scale=True, disable=None
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
    """Runs the command line and returns the exit status: 0, or 2 after an error."""
    parser = argparse.ArgumentParser(
        prog="python -m bsce_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=["digits", "cifar100"])
    parser.add_argument(
        "--data_dir", default="", help="$TFDS_DATA_DIR or ~/tensorflow_datasets"
    )
    parser.add_argument("--archive", default="", help="cifar-100-binary.tar.gz")
    options = parser.parse_args(arguments)
    try:
        if options.name == "cifar100":
            folder = prepare_cifar100(options.data_dir, options.archive)
        elif options.archive:
            raise UserError("--archive: digits needs none, they are in scikit-learn")
        else:
            folder = digits.prepare(source.root(options.data_dir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.name} is prepared in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
