"""A checkpoint that cannot be read, for whatever reason: the one before is used."""

import json
import os
import pathlib
import shutil
import types
from typing import Any, cast

import numpy as np
import pytest

from bsce_jax.checkpoints import manifest, store
from bsce_jax.errors import UserError
from bsce_jax.run import progress
from bsce_jax.run.progress import finished_checkpoint

TREE = {"w": np.arange(3, dtype=np.float32)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("made")
    for number in (1, 2):
        store.save(folder, number, TREE, {"step": number, "finished": True})
    return folder


@pytest.fixture
def folder(made: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """With checkpoint 1 and the newest, 2, which is to be damaged."""
    return pathlib.Path(shutil.copytree(made, tmp_path / "checkpoints"))


def sealed(path: pathlib.Path, **changes: Any) -> None:
    """Changes the JSON of a checkpoint and its checksum with it."""
    file = path / "manifest" / "data.json"
    content = json.loads(file.read_text()) | changes
    content = {key: value for key, value in content.items() if value is not None}
    content["sha256"] = manifest._json_hash(content)
    file.write_text(json.dumps(content))


def damage(path: pathlib.Path, how: str) -> None:
    file = path / "manifest" / "data.json"
    if how in ("link", "loop", "file", "empty"):
        shutil.rmtree(path)
    if how == "link":
        path.symlink_to("nothing")
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "file":
        path.write_text("")
    elif how == "empty":
        path.mkdir()
    elif how == "deep":
        file.write_text("[" * 10**5)
    elif how == "list":
        file.write_text("[]")
    elif how == "pipe":
        file.unlink()
        os.mkfifo(file)
    elif how == "no meta":
        sealed(path, meta=None)
    elif how == "no arrays":
        sealed(path, arrays=None)
    elif how == "no number":
        sealed(path, number=None)
    else:
        sealed(path, arrays={"w": {"shape": [3], "dtype": "float32"}})


KINDS = ["link", "loop", "file", "empty", "deep", "list", "pipe", "no meta"]
KINDS += ["no arrays", "no number", "no hash"]
SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in ("file", "no hash")]
WRITTEN_OVER = ["link", *SLOW]  # each is set aside in another way


@pytest.mark.parametrize("how", KINDS)
def test_the_newest_is_passed_over(
    folder: pathlib.Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder / "2", how)
    with pytest.raises(store.DamagedError):
        store.read_meta(folder, 2)
    found = store.latest(folder, TREE)
    assert found is not None and found.number == 1
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "trying the one before" in warning and "\n" not in warning


@pytest.mark.parametrize("how", WRITTEN_OVER)
def test_its_number_is_used_again(folder: pathlib.Path, how: str) -> None:
    for time in range(2):  # the second time 2.damaged is there
        damage(folder / "2", how)
        store.save(folder, 2, TREE, {"time": time})
        assert store.read_meta(folder, 2) == {"time": time}
    assert store.numbers(folder) == [1, 2]


@pytest.mark.parametrize("shape", [[10**18], [-1], ["many"]])
def test_arrays_that_cannot_be_are_damage(folder: pathlib.Path, shape: Any) -> None:
    spec = {"shape": shape, "dtype": "float32", "sha256": ""}
    sealed(folder / "2", arrays={"w": spec, "none": spec | {"dtype": "float99"}})
    store.save(folder, 2, TREE, {"again": True})
    assert store.read_meta(folder, 2) == {"again": True}


@pytest.mark.parametrize("how", KINDS)
def test_a_step_is_found_whatever_the_others_are(
    folder: pathlib.Path, how: str
) -> None:
    damage(folder / "1", how)
    assert finished_checkpoint(folder, 2) == 2
    with pytest.raises(UserError, match="end of step 1 that can be read: .*1"):
        finished_checkpoint(folder, 1)


def test_a_run_looks_for_its_workdir_before_it_saves() -> None:
    def gone() -> None:
        raise UserError("gone")

    monitor = types.SimpleNamespace(flush=lambda: None)
    run = types.SimpleNamespace(monitor=monitor, saved=-1, still_there=gone)
    place = types.SimpleNamespace(before=0, updates=1, step=0, finished=False)
    with pytest.raises(UserError, match="^gone$"):  # and there is no writer
        progress.save(cast(Any, run), cast(Any, place), finished=True)


def test_a_folder_that_is_gone_is_not_made_again(tmp_path: pathlib.Path) -> None:
    with pytest.raises(store.CheckpointError, match="folder of checkpoints is gone"):
        store.save(tmp_path / "none", 0, TREE, {})
    assert not list(tmp_path.iterdir())
