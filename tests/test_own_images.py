"""The commands of docs/own_images.md, as they stand there, on small images."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from PIL import Image

from tests import image_files, runs

PAGE = runs.ROOT / "docs" / "own_images.md"
BIRDS = tuple(f"bird {letter}" for letter in "abcdefghij")
NEW = ("first.jpg", "second.jpg")


def commands() -> list[str]:
    return re.findall(r"^```sh\n(.*?)\n```", PAGE.read_text(), re.M | re.S)


@pytest.fixture
def photographs(tmp_path) -> pathlib.Path:
    """A folder with what the page expects: configs, photos and new."""
    (tmp_path / "configs").symlink_to(runs.ROOT / "configs")
    image_files.make(tmp_path / "photos", dict.fromkeys(BIRDS, 15))
    (tmp_path / "new").mkdir()
    for seed, name in enumerate(NEW):
        (tmp_path / "new" / name).write_bytes(image_files.encode(seed))
    return tmp_path


def shell(command: str, folder: pathlib.Path) -> str:
    """What a command prints that runs in a folder, with this Python as `python`."""
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "PYTHONPATH": str(runs.ROOT), "TFDS_DATA_DIR": str(folder)}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=runs.environment() | own,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_run_is_the_plan_without_its_last_line():
    _, plan, train, _ = commands()
    assert plan == train + " \\\n    --config.print_plan"


@pytest.mark.slow
def test_four_commands_from_photographs_to_predictions(photographs):
    prepare, plan, train, predict = commands()
    short = " --config.short=100"  # an epoch a phase, the only thing that is not there
    assert "my_birds is prepared in" in shell(prepare, photographs)

    found = shell(plan + short, photographs)
    assert re.search(r"\d+ updates of 32 images, .* at [\d.]+ ms: about", found)
    workdir = photographs / "runs" / "my_birds"
    assert not (workdir / "results.json").exists()

    assert "average incremental accuracy: top-1" in shell(train + short, photographs)
    results = runs.results(workdir)
    seen = [record["result"]["num_seen"] for record in results["steps"]]
    assert seen == [5, 6, 7, 8, 9, 10]
    assert results["steps"][-1]["result"]["counts"] == [10] * 9 + [12]
    assert sorted(results["class_names"]) == sorted(BIRDS)
    for name in ("curves.png", "confusion.png"):
        Image.open(workdir / name).verify()

    lines = shell(predict, photographs).splitlines()
    for name in NEW:
        (line,) = (line for line in lines if name in line)
        assert any(bird in line for bird in BIRDS)
