"""What one machine leaves another: packed at once, unpacked safely, never backwards."""

import errno
import io
import json
import os
import pathlib
import tarfile
from unittest import mock

import numpy as np
import pytest

from bsce_jax.checkpoints import part, store
from bsce_jax.errors import UserError
from bsce_jax.reproduce import archive, bases
from tests.example_jobs import fake
from tests.example_results import make_results

ARRAYS = {
    "state": {"network": {"w": np.arange(4.0)}, "opt_state": (np.ones(4),)},
    "teacher": {"w": np.zeros(4)},
}


def run(
    output: pathlib.Path, name: str, *, steps: int, checkpoint: int = 0
) -> pathlib.Path:
    """A run with finished steps, 3 of 3: done, and checkpoints of that number and 1."""
    folder = output / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    results = make_results(finished=steps - 1)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "checkpoints").mkdir(exist_ok=True)
    for number in sorted({1, checkpoint} if checkpoint else ()):
        meta = {"step": number - 1, "finished": True, "permanent": True}
        meta["results"] = make_results(finished=0)
        store.save(folder / "checkpoints", number, ARRAYS, meta)
    return folder


def names(file: pathlib.Path) -> list[str]:
    with tarfile.open(file) as tar:
        return tar.getnames()


def compiled(folder: pathlib.Path, *files: str) -> archive.Compiled:
    folder.mkdir(parents=True, exist_ok=True)
    found = archive.Compiled(folder)
    for name in files:
        (folder / name).write_text(name)
    return found


def test_another_machine_gets_what_it_needs_to_go_on_and_no_more(tmp_path):
    here, out, there = (tmp_path / name for name in ("here", "out", "there"))
    run(here, "a0", steps=3, checkpoint=3)
    run(here, "a1", steps=2, checkpoint=2)
    (here / "old").mkdir()
    (here / "old" / "jit_before").touch()
    programs = compiled(here / "old", "jit_a-cache")
    bases.keep_networks(here, {"key": "runs/a0"}, [fake("a0", "key")])
    export = archive.Export(out, here, programs)
    export.write()
    assert sorted(file.name for file in out.iterdir()) == sorted(archive.NAMES)
    assert names(out / archive.RESULTS) == ["runs/a0/results.json"]
    assert names(out / archive.COMPILED) == ["compiled/jit_a-cache"]
    assert all("/checkpoints/2/" in name for name in names(out / archive.GOING)[:-1])
    there.mkdir()
    taken = compiled(there / "compiled")
    archive.take_over(out, there, taken)
    assert [path.name for path in taken.own()] == ["jit_a-cache"]
    assert bases.BaseSteps(there).scan() == {make_results()["base_hash"]: "bases/key"}
    again = store.restore(there / "runs/a1/checkpoints", 2, ARRAYS)
    np.testing.assert_array_equal(again.arrays["state"]["network"]["w"], np.arange(4.0))
    assert not list((there / "runs/a0").glob("checkpoints/*"))
    target = {"state": {"network": ARRAYS["state"]["network"]}}
    found = store.restore(there / "bases/key/checkpoints", 1, target)  # and no more
    assert found.meta["step"] == 0
    assert not list(there.glob(".import-*"))
    # What it exports has all of it again.
    second = archive.Export(tmp_path / "second", there, taken)
    second.write()
    for name in archive.NAMES:
        assert names(tmp_path / "second" / name) == names(out / name)


def test_only_what_has_changed_is_written_again(tmp_path):
    run(tmp_path, "a0", steps=1, checkpoint=1)
    export = archive.Export(tmp_path / "out", tmp_path, archive.Compiled(None))
    export.write()
    files = [tmp_path / "out" / name for name in (archive.GOING, archive.RESULTS)]
    before = [file.stat().st_ino for file in files if file.exists()]
    export.write()
    assert [file.stat().st_ino for file in files if file.exists()] == before
    run(tmp_path, "a0", steps=3)
    export.write()
    assert names(files[0]) == [] and names(files[1]) == ["runs/a0/results.json"]


def test_a_run_that_ends_is_not_one_that_goes_on(tmp_path):
    """Whether the folder is the same process's or an earlier one's."""
    here, out, there = (tmp_path / name for name in ("here", "out", "there"))
    run(here, "a0", steps=2, checkpoint=2)
    archive.Export(out, here, compiled(here / "programs")).write()
    old = (out / archive.GOING).read_bytes()
    run(here, "a0", steps=3)
    archive.Export(out, here, compiled(here / "programs")).write()
    assert names(out / archive.GOING) == []
    there.mkdir()
    # Killed between the two files, it leaves the run in both.
    (out / archive.GOING).write_bytes(old)
    archive.take_over(out, there, compiled(there / "programs"))
    taken = json.loads((there / "runs/a0/results.json").read_text())
    assert taken["status"] == "done"


def test_one_file_that_cannot_be_written_keeps_no_other(tmp_path, monkeypatch):
    here, out = tmp_path / "here", tmp_path / "out"
    run(here, "a0", steps=3)
    run(here, "a1", steps=2, checkpoint=2)
    pack = archive.pack

    def vanished(members, compress):
        if not compress:
            raise FileNotFoundError("pruned meanwhile")
        return pack(members, compress)

    monkeypatch.setattr(archive, "pack", vanished)
    export = archive.Export(out, here, archive.Compiled(None))
    with pytest.raises(UserError, match="going.tar: pruned meanwhile"):
        export.write()
    assert names(out / archive.RESULTS) == ["runs/a0/results.json"]
    monkeypatch.setattr(archive, "pack", pack)
    export.write()
    assert "runs/a1/results.json" in names(out / archive.GOING)


def test_compiled_programs_may_be_kept_on_another_disk(tmp_path, monkeypatch, caplog):
    new, kept = tmp_path / "new", tmp_path / "kept"
    (new / "autotune").mkdir(parents=True)
    (new / "jit_a-cache").write_text("a")
    replace = os.replace

    def within_a_disk(source, target):
        if pathlib.Path(source).parent != pathlib.Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(archive.os, "replace", within_a_disk)
    programs = compiled(kept)
    programs.take(new.iterdir())
    assert [path.name for path in kept.iterdir()] == ["jit_a-cache"]
    assert [path.name for path in programs.own()] == ["jit_a-cache"]
    monkeypatch.setattr(
        archive.shutil, "copyfile", mock.Mock(side_effect=OSError("no"))
    )
    programs.take(new.iterdir())  # they save time, nothing else
    assert "compiled programs are not taken over: no" in caplog.text


@pytest.mark.parametrize("key", ["../../../out", "\0", "a/b", ".."])
def test_no_base_step_has_a_name_that_leads_elsewhere(tmp_path, key):
    folder = run(tmp_path, "a0", steps=2, checkpoint=2)
    written = json.loads((folder / "results.json").read_text()) | {"base_hash": key}
    (folder / "results.json").write_text(json.dumps(written))
    assert bases.BaseSteps(tmp_path).scan() == {}


def test_a_base_step_that_cannot_be_kept_does_not_keep_the_others(tmp_path):
    run(tmp_path, "a0", steps=2)
    run(tmp_path, "b0", steps=2, checkpoint=2)
    found = {"keya": "runs/a0", "keyb": "runs/b0"}
    with pytest.raises(UserError, match="keya: .*no checkpoint of the end of step 0"):
        bases.keep_networks(tmp_path, found, [])
    assert [path.name for path in (tmp_path / "bases").iterdir()] == ["keyb"]


def test_the_optimiser_goes_with_a_base_step_where_a_job_goes_on_with_it(tmp_path):
    run(tmp_path, "a0", steps=1, checkpoint=1)
    config = {"phase.last.optimizer": "kept", "phase.last.epochs": 0}
    for key, epochs in (("without", 0), ("with", 2)):
        config["phase.last.epochs"] = epochs
        job = fake("a1", key)
        object.__setattr__(job, "config", dict(config))
        bases.keep_networks(tmp_path, {key: "runs/a0"}, [job])
    target = {"state": ARRAYS["state"]}
    store.restore(tmp_path / "bases/with/checkpoints", 1, target)
    with pytest.raises(store.CheckpointError, match="opt_state/0 is missing"):
        store.restore(tmp_path / "bases/without/checkpoints", 1, target)


def test_a_network_alone_gives_way_to_one_with_the_optimiser(tmp_path):
    """A job of a later command may go on with it, where those before did not."""
    run(tmp_path, "a0", steps=1, checkpoint=1)
    key = make_results()["base_hash"]
    bases.keep_networks(tmp_path, bases.BaseSteps(tmp_path).scan(), [])
    kept = f"bases/{key[:16]}"
    assert bases.BaseSteps(tmp_path).scan() == {key: kept}
    job = fake("a1", key)
    config = {"phase.last.optimizer": "kept", "phase.last.epochs": 2}
    object.__setattr__(job, "config", config)
    found = bases.BaseSteps(tmp_path, [job]).scan()
    assert found == {key: "runs/a0"}
    bases.keep_networks(tmp_path, found, [job])
    assert bases.BaseSteps(tmp_path, [job]).scan() == {key: kept}
    target = {"state": ARRAYS["state"]}
    store.restore(tmp_path / kept / "checkpoints", 1, target)


def test_a_damaged_checkpoint_is_not_copied(tmp_path):
    folder = run(tmp_path, "a0", steps=1, checkpoint=1)
    (folder / "checkpoints/1/manifest/data.json").write_text("{}")
    (tmp_path / "copy").mkdir()
    with pytest.raises(store.DamagedError):
        part.copy(folder / "checkpoints", 1, tmp_path / "copy", ("state/",))


@pytest.mark.parametrize(
    ("here", "there", "steps"),
    [
        ((1, 1), (2, 2), 2),  # further there
        ((2, 2), (1, 1), 2),  # further here
        ((1, 1), (3, 0), 3),  # done there
        ((3, 0), (1, 1), 3),  # done here
    ],
)
def test_a_run_is_taken_over_where_it_is_further(tmp_path, here, there, steps):
    for name, (done, number) in (("here", here), ("there", there)):
        run(tmp_path / name, "a0", steps=done, checkpoint=number)
    nothing = archive.Compiled(None)
    archive.Export(tmp_path / "out", tmp_path / "there", nothing).write()
    archive.take_over(tmp_path / "out", tmp_path / "here", nothing)
    folder = tmp_path / "here" / "runs" / "a0"
    assert len(json.loads((folder / "results.json").read_text())["steps"]) == steps
    newest = max(store.numbers(folder / "checkpoints"), default=0)
    assert newest == (max(here[1], there[1]) if here[0] < 3 else 0)


def test_a_run_of_another_configuration_is_not_taken_over(tmp_path):
    run(tmp_path / "here", "a0", steps=1, checkpoint=1)
    folder = run(tmp_path / "there", "a0", steps=3)
    changed = json.loads((folder / "results.json").read_text()) | {
        "config_hash": "0" * 64
    }
    (folder / "results.json").write_text(json.dumps(changed))
    nothing = archive.Compiled(None)
    archive.Export(tmp_path / "out", tmp_path / "there", nothing).write()
    with pytest.raises(UserError, match="a run of another configuration"):
        archive.take_over(tmp_path / "out", tmp_path / "here", nothing)


def member(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (member("../outside"), "outside"),
        (member("/tmp/outside"), "outside"),
        (member("runs/../../outside"), "outside"),
        (member("runs", type=tarfile.SYMTYPE, linkname="/"), "'runs' is no regular"),
        (member("a", type=tarfile.LNKTYPE, linkname="b"), "'a' is no regular file"),
        (member("a", type=tarfile.FIFOTYPE), "'a' is no regular file"),
        (member("a\x1b[2J", type=tarfile.CHRTYPE), "no regular file"),
    ],
)
def test_a_tar_file_of_somebody_else_leads_nowhere(tmp_path, info, message):
    (tmp_path / "in").mkdir()
    (tmp_path / "output").mkdir()
    with tarfile.open(tmp_path / "in" / archive.GOING, "w") as tar:
        tar.addfile(info, io.BytesIO())
    before = set(tmp_path.rglob("*"))
    nothing = archive.Compiled(None)
    if info.name.startswith("/"):  # without its slash it is a name like others
        archive.take_over(tmp_path / "in", tmp_path / "output", nothing)
    else:
        with pytest.raises(UserError, match=message) as error:
            archive.take_over(tmp_path / "in", tmp_path / "output", nothing)
        assert len(str(error.value).splitlines()) == 1
    assert set(tmp_path.rglob("*")) == before
    assert not os.path.exists("/tmp/outside")


@pytest.mark.parametrize("content", [b"", b"no tar", b"\x1f\x8b\x08broken"])
def test_no_tar_file_is_one_line(tmp_path, content):
    (tmp_path / archive.RESULTS).write_bytes(content)
    with pytest.raises(UserError, match="results.tar.gz cannot be unpacked"):
        archive.take_over(tmp_path, tmp_path, archive.Compiled(None))


def test_an_empty_folder_is_no_export(tmp_path):
    with pytest.raises(UserError, match="a folder that --export has made"):
        archive.take_over(tmp_path, tmp_path, archive.Compiled(None))
