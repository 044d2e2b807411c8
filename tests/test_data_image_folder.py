"""Folders of class folders: what is stored, in which split, and what is refused."""

import io
import os
import pathlib
import resource
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from bsce_jax.data import prepare, records, source
from bsce_jax.data.builders import image_folder, shards
from bsce_jax.errors import UserError
from tests.image_files import encode, make

MODES = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "L", "RGBA", "P")}


def stored(root: pathlib.Path, name: str, split: str) -> dict[str, tuple[bytes, str]]:
    """file_name -> (bytes, class name) of a prepared split."""
    pairs, _ = source.open_encoded(name, split, str(root))
    names = source.class_names(name, str(root))
    return {pairs.name(i): (p[0], names[p[1]]) for i, p in enumerate(pairs)}


def on_disk(folder: pathlib.Path) -> dict[str, tuple[bytes, str]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    relative = [path.relative_to(folder) for path in files]
    return {
        str(name): (path.read_bytes(), name.parts[0])
        for name, path in zip(relative, files, strict=True)
    }


def test_files_are_stored_as_they_are(tmp_path: pathlib.Path) -> None:
    """Every kind of JPEG and PNG, in any case of ending, at any depth."""
    train = tmp_path / "train"
    seed = 0
    for kind, modes in MODES.items():
        for mode in modes:
            folder = train / mode.lower() / "deep" / "er"
            folder.mkdir(parents=True, exist_ok=True)
            for ending in ("jpeg", "JPG") if kind == "JPEG" else ("png", "PNG"):
                seed += 1
                (folder / f"é {seed}.{ending}").write_bytes(encode(seed, kind, mode))
    expected = on_disk(train)
    (train / "rgb" / ".hidden.txt").write_text("x")
    (train / ".git").mkdir()
    (train / "l" / ".thumbs").mkdir()
    (train / "l" / ".thumbs" / "a.jpg").write_bytes(b"")
    (train / "README.txt").write_text("outside of the class folders")
    image_folder.prepare("mine", tmp_path / "data", train, test_fraction=0.5)
    assert "tensorflow" not in sys.modules
    found = [stored(tmp_path / "data", "mine", split) for split in ("train", "test")]
    assert found[0] | found[1] == expected
    assert not found[0].keys() & found[1].keys()
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine"]
    decoded, info = source.open_split("mine", "train", str(tmp_path / "data"))
    assert decoded[0]["image"].dtype == np.uint8 and info.name == "mine"


def test_labels_follow_the_sorted_names_and_are_indexed(tmp_path: pathlib.Path) -> None:
    make(tmp_path / "train", {"zebra": 5, "Ant": 3, "bee": 4})
    folder = image_folder.prepare("mine", tmp_path, tmp_path / "train")
    assert source.class_names("mine", str(tmp_path)) == ("Ant", "bee", "zebra")
    for split in ("train", "test"):
        pairs, _ = source.open_encoded("mine", split, str(tmp_path))
        index = np.load(folder / f"labels-{split}.npy", allow_pickle=False)
        np.testing.assert_array_equal(index, [label for _, label in pairs])


def test_order_and_split_depend_on_names_and_seed_alone(tmp_path: pathlib.Path) -> None:
    make(tmp_path / "one", {"a": 20, "b": 30})
    for path in sorted((tmp_path / "one").rglob("*.jpeg"), reverse=True):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(path.read_bytes())

    def order(folder: str, seed: int) -> list[list[str]]:
        root = tmp_path / f"{folder}-{seed}"
        image_folder.prepare("mine", root, tmp_path / folder, seed=seed)
        return [list(stored(root, "mine", split)) for split in ("train", "test")]

    first = order("one", 0)
    assert first == order("two", 0) != order("one", 1)
    classes = "".join(name[0] for name in first[0])
    assert "ab" in classes and "ba" in classes  # mixed, so that a part has all classes
    assert first[0] != sorted(first[0])


def test_a_test_folder_is_a_split_of_its_own(tmp_path: pathlib.Path) -> None:
    make(tmp_path / "train", {"n01": 3, "n02": 3})
    make(tmp_path / "val", {"n02": 2, "n01": 1}, "PNG")
    root = tmp_path / "data"
    for name, given, split in (
        ("imagenet2012", "", "validation"),
        ("imagenet2012", "held", "held"),
        ("mine", "", "test"),
    ):
        image_folder.prepare(
            name, root, tmp_path / "train", tmp_path / "val", test_name=given
        )
        assert stored(root, name, "train") == on_disk(tmp_path / "train")
        assert stored(root, name, split) == on_disk(tmp_path / "val")
        shutil.rmtree(root)


def test_other_files_can_be_left_out(tmp_path: pathlib.Path) -> None:
    make(tmp_path / "train", {"a": 3, "b": 3})
    expected = on_disk(tmp_path / "train")
    (tmp_path / "train" / "a" / "Thumbs.db").write_bytes(b"x")
    image_folder.prepare("mine", tmp_path, tmp_path / "train", skip_others=True)
    found = [stored(tmp_path, "mine", split) for split in ("train", "test")]
    assert found[0] | found[1] == expected


def damaged(train: pathlib.Path) -> dict[str, str]:
    """Puts files that are no whole images into class "a"; name -> what is said."""
    jpeg, png = encode(5), encode(5, "PNG")
    webp = io.BytesIO()
    Image.new("RGB", (8, 8)).save(webp, "WEBP")
    bad = {
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "headless.jpg": (jpeg[:10], "truncated"),
        "cut.png": (png[:-30], "truncated"),
        "text.jpg": (b"<html>404</html>", "neither JPEG nor PNG"),
        "empty.png": (b"", "neither JPEG nor PNG"),
        "really.jpg": (webp.getvalue(), "neither JPEG nor PNG"),
    }
    for name, (data, _) in bad.items():
        (train / "a" / name).write_bytes(data)
    (train / "a" / "gone.jpg").symlink_to(train / "nowhere")
    said = {f"a/{name}": reason for name, (_, reason) in bad.items()}
    return said | {"a/gone.jpg": "No such file"}


def test_damaged_files_are_all_named_or_left_out(tmp_path: pathlib.Path) -> None:
    train, root = tmp_path / "train", tmp_path / "data"
    make(train, {"a": 30, "b": 4})
    expected = on_disk(train)
    bad = damaged(train)
    with pytest.raises(UserError, match=r"^no whole JPEG .*: 7 files \(a/.*, \.\.\.\)"):
        image_folder.prepare("mine", root, train)
    assert list(root.iterdir()) == []
    folder = image_folder.prepare("mine", root, train, skip_corrupt=True)
    found = [stored(root, "mine", split) for split in ("train", "test")]
    assert found[0] | found[1] == expected
    lines = (folder / image_folder.LEFT_OUT).read_text().splitlines()
    assert {line.partition(" ")[0] for line in lines} == bad.keys()
    for line in lines:
        name, _, reason = line.partition(" ")
        assert bad[name].lower() in reason.lower(), line
    assert len(source.labels("mine", "train", str(root))) == len(found[0])


def test_a_class_of_damaged_files_is_refused(tmp_path: pathlib.Path) -> None:
    make(tmp_path / "train", {"a": 2, "b": 2})
    for path in (tmp_path / "train" / "b").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"1 class \(b\) without a whole image in tr"):
        image_folder.prepare("mine", tmp_path, tmp_path / "train", skip_corrupt=True)


@pytest.mark.parametrize("end", [b"\0\0\0\0", b"\n<!-- from a camera -->"])
def test_bytes_after_the_end_of_an_image_do_no_harm(end: bytes) -> None:
    assert image_folder.problem(encode(1) + end) == ""
    assert image_folder.problem(encode(1, "PNG") + end) == ""


def test_a_jpeg_without_an_end_marker_is_refused() -> None:
    """As training would refuse it; Pillow takes bytes of any kind for the end."""
    assert image_folder.problem(encode(1)[:-2] + bytes(20)).startswith("truncated")


def test_damage_in_the_middle_is_found_by_decoding(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also below the square in the middle of a tall image."""
    make(tmp_path / "train", {"a": 2, "b": 2})
    pixels = np.random.default_rng(0).integers(0, 256, (300, 40, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    data = file.getvalue()
    (tmp_path / "train" / "a" / "cut.jpg").write_bytes(data[:-2000] + data[-2:])
    (tmp_path / "train" / "b" / "whole.jpg").write_bytes(data)
    words = ["image_folder", "--name", "mine", "--train", str(tmp_path / "train")]
    words += ["--test_fraction", "0.5", "--data_dir"]
    assert prepare.main([*words, str(tmp_path / "full"), "--check", "full"]) == 2
    said = capsys.readouterr().err
    assert "1 file (a/cut.jpg (damaged JPEG: " in said and said.count("\n") == 1
    skip = ["--check", "full", "--corrupt", "skip"]
    assert prepare.main([*words, str(tmp_path / "full"), *skip]) == 0
    assert prepare.main([*words, str(tmp_path / "ends"), "--check", "ends"]) == 0
    for folder, count in (("full", 5), ("ends", 6)):
        splits = [stored(tmp_path / folder, "mine", s) for s in ("train", "test")]
        assert sum(len(split) for split in splits) == count


def test_many_shards_are_one_split(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 5000)
    make(tmp_path / "train", {"a": 40, "b": 40})
    folder = image_folder.prepare("mine", tmp_path, tmp_path / "train")
    _, info = source.open_encoded("mine", "train", str(tmp_path))
    lengths = info.splits["train"].shard_lengths
    assert len(lengths) > 4 and sum(lengths) == 64
    count = len(lengths)
    names = sorted(path.name for path in folder.glob("mine-train*"))
    assert names == [
        f"mine-train.array_record-{i:05d}-of-{count:05d}" for i in range(count)
    ]
    found = [stored(tmp_path, "mine", split) for split in ("train", "test")]
    assert found[0] | found[1] == on_disk(tmp_path / "train")


def test_few_files_are_in_memory_at_once() -> None:
    """However slowly they are written."""
    from concurrent.futures import ThreadPoolExecutor

    begun = []
    with ThreadPoolExecutor(8) as pool:
        results = image_folder._ahead(pool, lambda i: begun.append(i) or i, range(1000))
        for written, result in enumerate(results):
            assert result == written
            assert len(begun) <= written + image_folder.AHEAD + 1


def test_a_full_disk_leaves_nothing_behind(tmp_path: pathlib.Path) -> None:
    make(tmp_path / "train", {"a": 60, "b": 60}, "PNG")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write mine to .*File too large"):
            image_folder.prepare("mine", tmp_path / "data", tmp_path / "train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "data").iterdir()) == []


def test_the_command(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "train", {"a": 40, "b": 4})
    (tmp_path / "train" / "a" / "bad.jpg").write_bytes(b"x")
    root = tmp_path / "data"
    words = ["image_folder", "--name", "mine", "--data_dir", str(root)]
    words += ["--train", str(tmp_path / "train")]
    assert prepare.main(words) == 2
    said = capsys.readouterr().err
    assert "error: no whole JPEG or PNG image: 1 file (a/bad.jpg (neither " in said
    assert said.count("\n") == 1 and "--corrupt skip" in said
    both = ["--test", str(tmp_path / "train"), "--test_fraction", "0.3"]
    assert prepare.main([*words, *both]) == 2
    assert "--test_fraction: not allowed beside --test" in capsys.readouterr().err
    more = ["--corrupt", "skip", "--test_fraction", "0.5", "--test_name", "held"]
    assert prepare.main([*words, *more]) == 0
    folder = root / "mine" / "1.0.0"
    said = capsys.readouterr()
    assert said.out == (
        f"mine is prepared in {folder}, without the files in {folder}/left_out.txt\n"
    )
    assert said.err == ""  # not a terminal: no progress bar
    counts = np.bincount(source.labels("mine", "held", str(root)))
    assert counts[0] in (19, 20) and counts[1] == 2  # of 41 files, and of 4
    before = os.stat(folder / "dataset_info.json").st_mtime_ns
    assert prepare.main([*words, "--train", "nowhere"]) == 0
    assert f"was prepared before in {folder}: nothing" in capsys.readouterr().out
    assert os.stat(folder / "dataset_info.json").st_mtime_ns == before


def test_real_photographs(shared: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """ImageNet's, gray ones among them, by the folders as they are distributed."""
    sample = shared / "data" / "imagenet_sample"
    words = ["image_folder", "--name", "imagenet2012", "--data_dir", str(tmp_path)]
    words += ["--train", str(sample / "train"), "--test", str(sample / "val")]
    assert prepare.main(words) == 0
    for split, folder, count in (("train", "train", 60), ("validation", "val", 20)):
        found = stored(tmp_path, "imagenet2012", split)
        assert found == on_disk(sample / folder)
        counts = np.bincount(source.labels("imagenet2012", split, str(tmp_path)))
        np.testing.assert_array_equal(counts, [count] * 10)
    _, info = source.open_encoded("imagenet2012", "train", str(tmp_path))
    assert records.size(info, "train[:10%]") < 0.11 * records.size(info, "train")
    assert source.channels("imagenet2012", str(tmp_path)) == 3
