"""Files of a folder that somebody else may have filled."""

import contextlib
import os
import pathlib
import shutil

import pytest
from etils import epath

from bsce_jax import untrusted
from bsce_jax.errors import UserError
from bsce_jax.hosts import workdir
from bsce_jax.report import plots, results
from tests.example_results import make_results


def plant(kind: str, path: pathlib.Path, outside: pathlib.Path) -> None:
    """Puts something in the place of a file that is to be written."""
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "dangling link":
        path.symlink_to(outside.with_name("new"))
    elif kind == "hard link":
        path.hardlink_to(outside)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("left behind by a run that was killed")


KINDS = ["link", "dangling link", "hard link", "pipe", "file"]


@pytest.fixture
def outside(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "outside" / "precious"
    path.parent.mkdir()
    path.write_text("precious")
    return path


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Of a run, given by somebody else."""
    path = tmp_path / "run"
    path.mkdir()
    return path


def untouched(outside: pathlib.Path) -> bool:
    only = list(outside.parent.iterdir()) == [outside]
    return only and outside.read_text() == "precious"


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_file_takes_the_place_of_whatever_is_there(
    folder: pathlib.Path, outside: pathlib.Path, kind: str
) -> None:
    plant(kind, folder / "file", outside)
    with untrusted.create(folder / "file") as file:
        file.write(b"new")
    assert (folder / "file").read_text() == "new" and untouched(outside)


@pytest.mark.parametrize("name", ["results.json", "curves.png", "confusion.png"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_replaces_is_in_its_folder(
    folder: pathlib.Path, outside: pathlib.Path, name: str, kind: str
) -> None:
    """By way of a temporary file whose name everybody knows, as its own is."""
    for planted in (f".{name}.tmp", name):
        plant(kind, folder / planted, outside)
    results.replace(epath.Path(folder) / name, "new")
    assert [path.name for path in folder.iterdir()] == [name]
    assert (folder / name).read_text() == "new" and untouched(outside)


def test_a_report_writes_in_its_folder_alone(
    folder: pathlib.Path, outside: pathlib.Path
) -> None:
    plant("link", folder / ".alpha.png.tmp", outside)
    made = make_results(steps=1, learned_alpha=True)
    assert plots.alpha_curve([made], folder / "alpha.png")
    assert untouched(outside) and (folder / "alpha.png").stat().st_size > 1000


@pytest.mark.parametrize("kind", [*KINDS[:-1], "folder"])
def test_a_lock_that_is_no_ordinary_file_is_one_line(
    folder: pathlib.Path, outside: pathlib.Path, kind: str
) -> None:
    if kind == "folder":
        (folder / ".lock").mkdir()
    else:
        plant(kind, folder / ".lock", outside)
    assert not workdir.in_use(folder)
    with (
        pytest.raises(UserError, match=rf"^{folder}/\.lock (is|cannot)") as error,
        workdir.lock(epath.Path(folder)),
    ):
        pass
    assert "\n" not in str(error.value) and untouched(outside)


def test_a_lock_says_who_has_it_in_few_words(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workdir.time, "sleep", lambda seconds: None)
    with workdir.lock(epath.Path(folder)):
        (folder / ".lock").write_text("\N{GREEK SMALL LETTER ALPHA}\n" * 10**5)
        with (
            pytest.raises(UserError, match="in use by another run") as error,
            workdir.lock(epath.Path(folder)),
        ):
            pass
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_trying_a_workdir_writes_nowhere_else(
    folder: pathlib.Path, outside: pathlib.Path, kind: str
) -> None:
    plant(kind, folder / f".probe-{os.getpid()}", outside)
    workdir.open_workdir(epath.Path(folder))
    assert not list(folder.iterdir()) and untouched(outside)


DEPTH = 100_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[NaN]", "is not JSON: NaN is no number"),
        (b"[-Infinity]", "is not JSON: -Infinity is no number"),
        (b"[" + b"1" * 5000 + b"]", "is not JSON"),
        (b"[" * DEPTH, "nested too deep"),
        (b"[" * DEPTH + b"]" * DEPTH, "nested too deep"),
        (b'{"a":' * DEPTH + b"1" + b"}" * DEPTH, "nested too deep"),
    ],
)
def test_what_is_no_json_is_one_line(
    tmp_path: pathlib.Path, content: bytes, message: str
) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path} .*{message}") as error:
        untrusted.read_json(path, "a file")
    assert "\n" not in str(error.value)


def test_what_cannot_be_read_is_one_line(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # whose reader would wait for ever
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    words = {
        "pipe": "is not a file: expected text",
        "folder": "is not a file: expected text",
        "link": "does not exist: expected text",
        "loop": "cannot be read: Too many levels",
        "pipe/below": "does not exist: expected text",
    }
    for name, message in words.items():
        with pytest.raises(UserError, match=f"^{tmp_path / name} {message}"):
            untrusted.read_json(tmp_path / name, "text")


def kept(folder: pathlib.Path) -> contextlib.AbstractContextManager:
    return workdir.kept(epath.Path(folder), "results.json", "checkpoints")


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "file"])
def test_what_is_no_folder_is_found_before_a_run(
    folder: pathlib.Path, outside: pathlib.Path, kind: str
) -> None:
    plant(kind, folder / "checkpoints", outside)
    message = rf"^{folder}/checkpoints cannot be written: .* \(expected a folder"
    with pytest.raises(UserError, match=message), kept(folder):
        pass
    assert untouched(outside)


@pytest.mark.parametrize("name", ["results.json", ".results.json.tmp"])
def test_what_is_no_file_is_found_before_a_run(folder: pathlib.Path, name: str) -> None:
    (folder / name).mkdir()
    message = f"^{folder}/{name} is a folder, expected a file"
    with pytest.raises(UserError, match=message), kept(folder):
        pass


@pytest.mark.parametrize("how", ["removed", "moved", "another", "its parent", "file"])
def test_a_workdir_that_goes_is_noticed(folder: pathlib.Path, how: str) -> None:
    with kept(folder) as still_there:
        still_there()
        if how == "moved":
            folder.rename(folder.with_name("elsewhere"))
        else:
            shutil.rmtree(folder if how == "its parent" else folder / "checkpoints")
        if how == "another":
            (folder / "checkpoints").mkdir()
        elif how == "file":
            (folder / "checkpoints").write_text("")
        with pytest.raises(UserError, match=f"^--workdir='{folder}' is gone: ") as e:
            still_there()
    assert "\n" not in str(e.value)


def test_a_link_to_a_folder_is_the_users_choice(folder: pathlib.Path) -> None:
    (folder.parent / "large disk").mkdir()
    (folder / "checkpoints").symlink_to(folder.parent / "large disk")
    with kept(folder) as still_there:
        still_there()
    assert not list((folder.parent / "large disk").iterdir())
