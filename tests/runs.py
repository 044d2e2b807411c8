"""Whole runs, here or in processes of their own, on small data sets made here."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
from unittest import mock

import jax
import numpy as np

from bsce_jax import predict
from bsce_jax.checkpoints import store
from bsce_jax.compute import parallel
from bsce_jax.data import resident
from bsce_jax.run import programs
from tests import datasets
from tests import small as small_main

ROOT = pathlib.Path(__file__).resolve().parent.parent

CONFIG = """
from bsce_jax.config import default_config, method_module

def get_config():
    c = default_config()
    method_module({method_file!r}, {method!r}).configure(c, "digits")
    c.data.name, c.data.data_dir = "blobs", {data_dir!r}
    c.data.mean, c.data.std, c.data.padding, c.data.flip = (0.5,), (0.5,), 1, False
    c.scenario.class_order = "seed1993"
    c.scenario.base_classes, c.scenario.steps = {base}, {steps}
    c.memory.per_class = 3
    c.model.width = 4
    c.model.conv_chunks = 1
    c.optim.batch_size = 16
    for phase in c.phase.values():
        if phase.images == "training":
            phase.epochs = 2 if phase.steps == "base" else {epochs}
            phase.milestones = (1,)
        else:
            phase.epochs = min(phase.epochs, 6)
    c.meta.every, c.meta.batch_size, c.meta.inner_learning_rate = 2, 8, 0.0
    c.evaluation.batch_size = 64
    c.compile_cache = False  # conftest.py has one for all
    return c
"""


def blobs(folder: pathlib.Path, classes: int, train: int = 8, test: int = 4) -> None:
    """Prepares a data set "blobs": each class a pattern of 8x8 pixels with noise."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (classes, 8, 8, 1))

    def split(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(classes), count)
        noise = rng.normal(0, 40, (len(labels), 8, 8, 1))
        return np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8), labels

    datasets.write(folder, "blobs", {"train": split(train), "test": split(test)})


def config_file(
    folder: pathlib.Path,
    *,
    classes: int,
    base: int,
    steps: int,
    epochs: int = 1,
    method: str = "il_baseline",
) -> pathlib.Path:
    """Prepares the data and writes a configuration file for it."""
    blobs(folder / "data", classes)
    path = folder / "config.py"
    path.write_text(
        CONFIG.format(
            method_file=str(ROOT / "configs" / "x.py"),
            data_dir=str(folder / "data"),
            method=method,
            base=base,
            steps=steps,
            epochs=epochs,
        )
    )
    return path


def command(
    config: pathlib.Path | str,
    workdir: pathlib.Path,
    *overrides: str,
    small: bool = True,
) -> list[str]:
    """Of a run, with a network of one convolution unless it must be the real one."""
    return [
        sys.executable,
        "-m",
        "tests.small" if small else "bsce_jax.main",
        f"--config={config}",
        f"--workdir={workdir}",
        *overrides,
    ]


def environment(devices: int = 1) -> dict[str, str]:
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }


def run(
    config: pathlib.Path,
    workdir: pathlib.Path,
    *overrides: str,
    status: int = 0,
    devices: int = 1,
    small: bool = True,
) -> subprocess.CompletedProcess:
    """Runs to the end and checks the exit status."""
    done = subprocess.run(
        command(config, workdir, *overrides, small=small),
        cwd=ROOT,
        env=environment(devices),
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def small_network() -> contextlib.AbstractContextManager:
    """Builds a network of one convolution whatever a configuration names."""
    return mock.patch.object(programs, "build_model", small_main.build_model)


def test_images(workdir: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """The test images of a run on "blobs", and their positions in the class order."""
    fields = results(workdir)
    config = fields["config"]
    images, labels, _ = resident.load("blobs", "test", config["data.data_dir"], 0)
    return images, np.argsort(fields["class_order"])[labels]


def here(
    config: pathlib.Path | str,
    workdir: pathlib.Path,
    *overrides: str,
    status: int = 0,
    devices: int = 1,
) -> None:
    """Runs to the end in this process, which is several times as fast.

    Args:
      config: as on the command line.
      workdir: of the run.
      *overrides: of the configuration.
      status: the exit status to expect.
      devices: how many of the eight there are here.
    """
    from bsce_jax import main

    make, own = parallel.create, jax.devices()[:devices]
    with (
        mock.patch.object(
            parallel, "create", lambda mode, devices=None: make(mode, own)
        ),
        small_network(),
    ):
        assert main.main(command(config, workdir, *overrides)[2:]) == status


def load(workdir: pathlib.Path, **options) -> predict.Predictor:
    """Loads a network that `here` has trained."""
    with small_network():
        return predict.load(workdir, **options)


def cut(workdir: pathlib.Path, copy: pathlib.Path, number: int) -> dict:
    """Copies a run as it was when it was killed after its checkpoint `number`.

    The run has kept all checkpoints. Returns the JSON of that one.
    """
    shutil.copytree(workdir, copy)
    (copy / "results.json").unlink()
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name) > number:
            shutil.rmtree(folder)
    return store.read_meta(copy / "checkpoints", number)


def results(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "results.json").read_text())
