"""Class folders: what is listed, which names and links are refused, the test share."""

import errno
import os
import pathlib
import socket
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from bsce_jax.data import prepare, source
from bsce_jax.data.builders import class_folders, image_folder
from bsce_jax.errors import UserError
from tests.image_files import make, scene


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_the_share_is_that_of_every_class(fraction: float) -> None:
    rng = np.random.default_rng(0)
    sizes = np.array([2, 3, 10, 57, 1300])
    labels = rng.permutation(np.repeat(np.arange(5), sizes))
    keys = rng.permutation(len(labels)).astype(np.uint64)
    held = class_folders.hold_out(labels, keys, fraction)
    expected = np.clip(np.round(fraction * sizes), 1, sizes - 1)
    np.testing.assert_array_equal(np.bincount(labels[held], minlength=5), expected)
    for label in range(5):  # those of the lowest keys
        own = labels == label
        assert keys[own & held].max() < keys[own & ~held].min()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.2, float("nan")])
def test_a_share_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match="--test_fraction=.*between 0 and 1"):
        class_folders.hold_out(np.zeros(4, int), np.arange(4), fraction)


def test_a_test_folder_of_other_classes_is_refused(tmp_path: pathlib.Path) -> None:
    make(tmp_path / "train", {"a": 2, "b": 2})
    make(tmp_path / "more", {"a": 1, "b": 1, "c": 1})
    make(tmp_path / "less", {"a": 1})
    for folder, message in (
        ("more", r"--test=.*more: 1 class \(c\) not in --train"),
        ("less", r"--test=.*less: 1 class \(b\) missing"),
    ):
        with pytest.raises(UserError, match=message):
            image_folder.prepare(
                "mine", tmp_path, tmp_path / "train", tmp_path / folder
            )


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: None, "--train=.*: no such folder"),
        (scene(".hidden/a.jpg"), "--train=.*: no class folders in it"),
        (scene("a.jpg", "b.jpg"), "--train=.*: no class folders in it"),
        (scene("a/1.jpg", "b.jpg"), r"1 image \(b.jpg\) outside of the class"),
        (scene("a/1.jpg", "b/.x"), r"1 class \(b\) without images"),
        (scene("a/1.jpg", "a/2.bmp"), r"1 file \(a/2.bmp\) not ending in .jpeg, .*"),
        (
            scene("a/1.jpg", *(f"b/{i}.webp" for i in range(1200))),
            r"1,200 files \(b/0.webp, b/1.webp, b/10.webp, \.{3}\) not .*--other_",
        ),
        (
            scene("a/1.jpg", "a/2.jpg", "b/1.jpg"),
            r"1 class \(b\) with a single image",
        ),
    ],
)
def test_a_folder_that_does_not_fit_is_one_line(
    tmp_path: pathlib.Path, write: Callable[[pathlib.Path], None], message: str
) -> None:
    write(tmp_path / "train")
    with pytest.raises(UserError, match=message) as caught:
        image_folder.prepare("mine", tmp_path / "data", tmp_path / "train")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "data").rglob("*"))


@pytest.mark.parametrize("locked", ["train", "train/a", "train/a/deep", "val/b"])
def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: pathlib.Path,
    locked: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Instead of its images being left out; refused here, since root reads all."""
    scene("train/a/1.jpg", "train/a/deep/2.jpg", "train/b/1.jpg")(tmp_path)
    scene("val/a/1.jpg", "val/b/1.jpg")(tmp_path)
    scandir = os.scandir

    def refusing(path: str | int) -> Iterator[os.DirEntry[str]]:
        if str(path) == str(tmp_path / locked):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    train, val = str(tmp_path / "train"), str(tmp_path / "val")
    words = ["image_folder", "--name", "mine", "--data_dir", str(tmp_path / "data")]
    assert prepare.main([*words, "--train", train, "--test", val]) == 2
    given = f"--train={train}" if locked.startswith("train") else f"--test={val}"
    said = f"error: {given}: {tmp_path / locked}: Permission denied\n"
    assert capsys.readouterr().err == said
    assert list((tmp_path / "data").iterdir()) == []


NAMES = ["", "My", "my-birds", "../up", "digits", "cifar100", "a\nb", "a/b", "a\udcff"]


@pytest.mark.parametrize("name", [*NAMES, "a" * 101, "a" * 300, "a" * 5000])
def test_a_name_that_cannot_be_is_refused(
    tmp_path: pathlib.Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="--name=.*expected lower-case letters"):
        image_folder.prepare(name, tmp_path, tmp_path)
    words = ["image_folder", "--name", name, "--train", "x", "--data_dir"]
    assert prepare.main([*words, str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --name=") and said.count("\n") == 1
    assert len(said) < 300
    with pytest.raises(UserError, match="--test_name=.*expected a name"):
        image_folder.prepare("mine", tmp_path, tmp_path, test_name="train")


def test_links_to_folders_are_followed_and_circles_are_not(
    tmp_path: pathlib.Path,
) -> None:
    make(tmp_path / "elsewhere", {"a": 3, "b": 2})
    (tmp_path / "train").mkdir()
    for name in ("a", "b"):
        (tmp_path / "train" / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere" / "a" / "circle").symlink_to(tmp_path / "elsewhere" / "a")
    classes, files = class_folders.list_files(tmp_path / "train", "--train")
    assert classes == ["a", "b"]
    assert list(files.names) == [f"a/{i}.jpeg" for i in range(3)] + [
        f"b/{i}.jpeg" for i in range(2)
    ]
    np.testing.assert_array_equal(files.labels, [0, 0, 0, 1, 1])


def special(folder: pathlib.Path, kind: str) -> None:
    """Puts what is no file into class "a", under an image's name."""
    path = folder / "a" / "odd.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(folder / "pipe")
        path.symlink_to(folder / "pipe")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            os.chdir(path.parent)  # the path of a socket is short
            bound.bind(path.name)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "socket", "device"])
def test_only_regular_files_are_read(
    tmp_path: pathlib.Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who opens a pipe waits for ever, and a device may have no end."""
    monkeypatch.chdir(tmp_path)
    train = tmp_path / "train"
    make(train, {"a": 2, "b": 2})
    os.rename(train / "b" / "0.jpeg", tmp_path / "elsewhere.jpeg")
    (train / "b" / "0.jpeg").symlink_to(tmp_path / "elsewhere.jpeg")
    special(train, kind)
    with pytest.raises(
        UserError, match=r"1 file \(a/odd.jpg\) being a pipe, socket or"
    ):
        class_folders.list_files(train, "--train")
    _, files = class_folders.list_files(train, "--train", skip_others=True)
    assert files.names == ["a/0.jpeg", "a/1.jpeg", "b/0.jpeg", "b/1.jpeg"]
    image_folder.prepare("mine", tmp_path / "data", train, skip_others=True)


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("train/a/up", "train"),
        ("train/a/deep/up", "."),
        ("train/a/up", "/"),
        ("train/a/other", "train/b"),
        ("train/b/other", "train/a"),
        ("train/a/inner", "train/b/deep"),
        ("train/c", "train/a"),
        ("train/c", "."),
    ],
)
def test_a_link_to_images_of_another_class_is_refused(
    tmp_path: pathlib.Path, link: str, target: str
) -> None:
    """In whichever order the classes are looked at."""
    make(tmp_path / "train", {"a": 1, "a/deep": 1, "b": 1, "b/deep": 1})
    (tmp_path / link).symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=r"--train=.* is the folder .*remove the") as e:
        class_folders.list_files(tmp_path / "train", "--train")
    assert "\n" not in str(e.value)


def test_links_that_lead_nowhere_are_named(tmp_path: pathlib.Path) -> None:
    make(tmp_path / "train", {"a": 2, "b": 2})
    (tmp_path / "train" / "a" / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "train" / "a" / "gone.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(UserError, match="2 files .*(No such file|Too many levels)"):
        image_folder.prepare("mine", tmp_path / "data", tmp_path / "train")


def test_a_file_s_name_of_two_lines_is_shown_in_one(tmp_path: pathlib.Path) -> None:
    train, root = tmp_path / "train", tmp_path / "data"
    make(train, {"a": 2, "b": 2})
    (train / "a" / "x\ny\udcff.jpg").write_bytes(b"none")
    with pytest.raises(UserError, match=r"\(a/x\\ny\\udcff.jpg \(neither JPEG") as e:
        image_folder.prepare("mine", root, train)
    assert "\n" not in str(e.value)
    folder = image_folder.prepare("mine", root, train, skip_corrupt=True)
    listed = (folder / image_folder.LEFT_OUT).read_text().splitlines()
    assert listed == ["a/x\\ny\\udcff.jpg (neither JPEG nor PNG)"]


def test_a_class_of_one_image_is_named(tmp_path: pathlib.Path) -> None:
    make(tmp_path / "train", {"a": 2, "single": 1, "z": 1})
    with pytest.raises(UserError, match=r"2 classes \(single, z\) with a single image"):
        image_folder.prepare("mine", tmp_path / "data", tmp_path / "train")


ODD = [
    " ",
    "a ",
    " a",
    "a\n",
    "a\nb",
    "a\rb",
    "\t",
    "\x1f",
    "a\u2028",
    "\x85",
    "\udcff",
]


@pytest.mark.parametrize("name", ODD, ids=repr)
def test_a_class_whose_name_would_be_lost_is_refused(
    tmp_path: pathlib.Path, name: str
) -> None:
    make(tmp_path / "train", {"a": 2, "b": 2})
    os.rename(tmp_path / "train" / "b", tmp_path / "train" / name)
    with pytest.raises(UserError, match="does not give back|would not give") as caught:
        image_folder.prepare("mine", tmp_path / "data", tmp_path / "train")
    assert f"1 class ({name!r})" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "data").iterdir())


LETTERS = st.sampled_from(" \n\r\ta\x1f\x85\udcff") | st.characters()


@settings(max_examples=30, deadline=None)
@given(st.sets(st.text(LETTERS, min_size=1, max_size=3), min_size=1, max_size=4))
def test_names_are_what_is_read_or_refused(names: set[str]) -> None:
    """Of any text: kept to the letter, or an error that names it."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        try:
            image_folder.check_class_names(sorted(names), path, "--train=x")
        except UserError as error:
            lost = [name for name in names if not kept(name)]
            assert lost and f"{len(lost)} class" in str(error)
            assert str(error).isprintable()
        else:
            label = path / "label.labels.txt"
            found = tfds.features.ClassLabel(names_file=label).names
            assert found == sorted(names)


def kept(name: str) -> bool:
    """Whether a line of a file gives a name back; surrogates are no text in it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return name.strip() == name != "" and not {"\n", "\r"} & set(name)


def test_names_of_any_script_are_kept(tmp_path: pathlib.Path) -> None:
    names = ["Bläuling", "a b", "a\tb", "日本", "🦉", "‏עברית", "#1", "'x'"]
    make(tmp_path / "train", dict.fromkeys(names, 2))
    image_folder.prepare("mine", tmp_path / "data", tmp_path / "train")
    found = source.class_names("mine", str(tmp_path / "data"))
    assert list(found) == sorted(names)
