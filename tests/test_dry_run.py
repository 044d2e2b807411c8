"""The dry run's time of an update: images included, their reader's start not."""

import io
import time

import numpy as np
import pytest
from PIL import Image

from bsce_jax.config.fields import default_config
from bsce_jax.config.files import method_module
from bsce_jax.config.resolve import resolve
from bsce_jax.data import streaming
from bsce_jax.run import dry_run, progress, setup
from bsce_jax.run.loop import make_training
from bsce_jax.run.phases import planned
from tests import datasets, runs

BATCH = 16
START, IMAGE = 1.0, 0.005  # seconds to start a stream, and to decode an image


@pytest.fixture
def run(tmp_path):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 10, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    split = [file.getvalue()] * 48, [i % 3 for i in range(48)]
    datasets.write(tmp_path, "slow", {"train": split, "test": split})
    c = default_config()
    method_module(str(runs.ROOT / "configs" / "x.py"), "il_baseline").configure(
        c, "digits"
    )
    c.data.name, c.data.data_dir, c.data.loading = "slow", str(tmp_path), "streaming"
    c.data.image_size = 8
    c.scenario.base_classes, c.scenario.steps = 2, 1
    c.memory.per_class, c.model.width, c.optim.batch_size = 3, 4, BATCH
    for phase in c.phase.values():
        phase.milestones = ()
    return setup.prepare(resolve(c), tmp_path)


@pytest.mark.slow
def test_an_update_takes_as_long_as_its_images_in_one_stream(run, monkeypatch):
    """Two threads decode: however many images are ready once the update compiled."""
    read, crop, opened = streaming.read, streaming.Reader.crop, []

    def slow_crop(self, *arguments):
        time.sleep(IMAGE)
        return crop(self, *arguments)

    def counted_read(reader, plan, rows, start, **options):
        opened.append((len(plan) - start) * len(rows))
        time.sleep(START)
        return read(reader, plan, rows, start, **options)

    monkeypatch.setattr(streaming, "available_cores", lambda: 2)
    monkeypatch.setattr(streaming.Reader, "crop", slow_crop)
    monkeypatch.setattr(streaming, "read", counted_read)
    monkeypatch.setattr(dry_run, "STREAMED", 30)
    training = make_training(run.config, planned(run.config, run.dataset)[0])
    seconds, _ = dry_run._measure(run, progress.initial(run), training)
    assert len(opened) == 2 and opened[0] == BATCH  # one batch to compile with
    assert 0.9 * BATCH * IMAGE / 2 < seconds < START / 3
