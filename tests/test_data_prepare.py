"""The command that prepares a data set: downloads, checks, says what went wrong."""

import hashlib
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from bsce_jax.data import prepare, resident
from bsce_jax.data.builders import cifar100
from bsce_jax.errors import UserError
from tests import datasets


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("served") / "small.tar.gz"
    return datasets.write_archive(path, datasets.cifar100_files(25))


@pytest.fixture
def served(archive: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The small archive in the official one's place."""
    content = archive.read_bytes()
    expected = len(content), hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(cifar100, "URL", archive.as_uri())
    monkeypatch.setattr(cifar100, "official", lambda: expected)
    return archive


def test_size_and_checksum_are_the_official_ones() -> None:
    size, sha256 = cifar100.official()
    assert size == 168_513_733
    assert sha256.startswith("58a81ae1") and len(sha256) == 64


def test_cifar100_is_downloaded_checked_and_prepared(
    served: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main(["cifar100", "--data_dir", str(tmp_path)]) == 0
    assert str(tmp_path / "cifar100" / "3.0.2") in capsys.readouterr().out
    assert len(resident.load("cifar100", "train", str(tmp_path)).labels) == 25
    assert [path.name for path in tmp_path.iterdir()] == ["cifar100"]


def test_what_is_prepared_is_not_downloaded_again(
    served: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare.prepare_cifar100(str(tmp_path), str(served))
    monkeypatch.setattr(cifar100, "URL", "file:///nowhere")
    assert prepare.prepare_cifar100(str(tmp_path)) == folder


def test_another_archive_passes_only_unverified(
    archive: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    size = archive.stat().st_size
    with pytest.raises(UserError, match=f"has {size} bytes, 168513733 are expected"):
        prepare.prepare_cifar100(str(tmp_path), str(archive))
    assert not (tmp_path / "cifar100").exists()
    prepare.prepare_cifar100(str(tmp_path), str(archive), verify=False)
    assert len(resident.load("cifar100", "test", str(tmp_path)).labels) == 25


def test_a_download_of_the_wrong_bytes_is_refused(
    served: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(served.read_bytes())
    content[-1] ^= 1
    tampered = tmp_path / "tampered"
    tampered.write_bytes(content)
    monkeypatch.setattr(cifar100, "URL", tampered.as_uri())
    with pytest.raises(UserError, match="has SHA-256 .* is expected"):
        prepare.prepare_cifar100(str(tmp_path / "tfds"))
    tampered.write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"has {len(content) - 1} bytes"):
        prepare.prepare_cifar100(str(tmp_path / "tfds"))
    assert not (tmp_path / "tfds").exists()


def test_an_endless_download_is_cut_off(tmp_path: pathlib.Path) -> None:
    size = 3 * prepare.BLOCK
    (tmp_path / "long").write_bytes(bytes(4 * size))
    prepare.download((tmp_path / "long").as_uri(), tmp_path / "copy", size)
    assert size < (tmp_path / "copy").stat().st_size <= size + prepare.BLOCK


def test_no_network_is_one_line_and_status_2(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cifar100, "official", lambda: (1, ""))
    monkeypatch.setattr(cifar100, "URL", (tmp_path / "absent").as_uri())
    assert prepare.main(["cifar100", "--data_dir", str(tmp_path / "tfds")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: cannot download file:///") and "--archive" in said
    assert said.count("\n") == 1


def test_a_missing_archive_is_one_line_and_status_2(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = str(tmp_path / "absent.tar.gz")
    words = ["cifar100", "--archive", absent, "--data_dir", str(tmp_path)]
    assert prepare.main(words) == 2
    assert f"archive {absent} cannot be read: No such file" in capsys.readouterr().err


def test_digits_are_prepared(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main(["digits", "--data_dir", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out == f"digits is prepared in {tmp_path / 'digits' / '1.0.0'}\n"
    assert said.err == ""  # not a terminal: no progress bar
    with pytest.raises(SystemExit) as status:
        prepare.main(["digits", "--archive", "x"])
    assert status.value.code == 2
    said = capsys.readouterr().err  # one line, without argparse's usage
    assert (
        said == "error: unrecognized arguments: --archive x (all arguments: --help)\n"
    )


def test_a_folder_that_is_no_data_set_is_not_taken_for_one(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, version in (("digits", "1.0.0"), ("cifar100", "3.0.2")):
        folder = tmp_path / name / version
        folder.mkdir(parents=True)
        assert prepare.main([name, "--data_dir", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert said == (
            f"error: {folder} is there without a dataset_info.json: remove it\n"
        )
        assert not list(folder.iterdir())


def test_no_folder_of_images_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(["image_folder", "--name", "x", "--train", ""]) == 2
    assert "--train='': expected a folder of class" in capsys.readouterr().err


def test_what_is_there_is_said_to_be(
    served: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("digits", "cifar100"):
        assert prepare.main([name, "--data_dir", str(tmp_path)]) == 0
        assert f"{name} is prepared in {tmp_path}" in capsys.readouterr().out
        assert prepare.main([name, "--data_dir", str(tmp_path)]) == 0
        assert f"{name} was prepared before in {tmp_path}" in capsys.readouterr().out


INTERRUPTED = """
import os, sys
from bsce_jax.data import prepare
from bsce_jax.data.builders import arrays

def png(image):
    os.kill(os.getpid(), {number})

arrays.png = png
sys.exit(prepare.main(["digits", "--data_dir", {folder!r}]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_preparation(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """Leaves nothing behind; what one that is killed leaves is named the next time."""
    script = INTERRUPTED.format(number=int(number), folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, encoding="utf-8"
    )
    left = list(tmp_path.iterdir())
    if number == signal.SIGKILL:
        assert done.returncode == -number and len(left) == 1
        note = f"note: {left[0]} is of a preparation that was killed, or is still at "
    else:
        assert done.returncode == 128 + number and not left
        assert done.stderr == "interrupted; nothing is left behind\n"
        note = ""
    assert prepare.main(["digits", "--data_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert said.startswith(note) and said.count("\n") == bool(note)


def test_an_index_is_written_for_every_split(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare.main(["digits", "--data_dir", str(tmp_path)])
    folder = tmp_path / "digits" / "1.0.0"
    before = {path: path.read_bytes() for path in sorted(folder.glob("*.npy"))}
    assert [path.name for path in before] == ["labels-test.npy", "labels-train.npy"]
    for path in before:
        path.unlink()
    capsys.readouterr()
    assert prepare.main(["index", "digits", "--data_dir", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out == f"digits has a label index of every split in {folder}\n"
    assert said.err == ""
    assert {path: path.read_bytes() for path in sorted(folder.glob("*.npy"))} == before


def test_an_index_needs_a_data_set_whole_and_writable(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["index", "my_birds", "--data_dir", str(tmp_path)]
    assert prepare.main(words) == 2
    assert "'my_birds' is not on this machine" in capsys.readouterr().err
    images = [np.zeros((4, 5, 3), np.uint8)] * 3
    folder = datasets.write(tmp_path, "my_birds", {"train": (images, [2, 0, 1])})
    index = folder / "labels-train.npy"
    index.unlink()
    index.mkdir()
    assert prepare.main(words) == 2
    assert "label index of my_birds cannot be written: " in capsys.readouterr().err
    assert [path.name for path in folder.glob("*labels-train*")] == [index.name]
    index.rmdir()
    records = next(folder.glob("*array_record*"))
    records.write_bytes(records.read_bytes()[:-1])
    assert prepare.main(words) == 2
    assert f"shard {records} is damaged or cut short" in capsys.readouterr().err
    assert not index.exists()


def test_a_data_dir_that_cannot_be_is_one_line(tmp_path, capsys):
    assert prepare.main(["digits", "--data_dir", str(tmp_path / ("a" * 300))]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --data_dir=") and said.count("\n") == 1
    assert "File name too long" in said
