"""configs/image_folder.py from a folder of JPEGs to results, killed once on the way."""

import numpy as np
import pytest
from PIL import Image

from bsce_jax.checkpoints import store
from bsce_jax.data import prepare
from tests import runs
from tests.test_resume import deterministic, newest, start_and_wait

CLASSES, IMAGES = 4, 15
OVERRIDES = (
    "--config.data.image_size=16",
    "--config.data.resize=18",
    "--config.model.name=resnet8",
    "--config.model.width=4",
    "--config.model.conv_chunks=1",
    "--config.evaluation.batch_size=16",
    "--config.optim.batch_size=8",
    "--config.phase.incremental.epochs=6",
    "--config.phase.incremental.milestones=(4,)",
    "--config.phase.base.epochs=2",
    "--config.phase.base.milestones=()",
    "--config.meta.every=2",
    "--config.meta.batch_size=4",
    "--config.checkpoint.minutes=0",
)


def write_photos(folder):
    """Of each class one colour, in images of many sizes."""
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"bird{label}").mkdir(parents=True)
        colour = rng.integers(0, 256, 3)
        for i in range(IMAGES):
            height, width = rng.integers(20, 50, 2)
            pixels = colour + rng.normal(0, 30, (height, width, 3))
            image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
            image.save(folder / f"bird{label}" / f"{i}.jpg")


@pytest.mark.slow
def test_a_folder_is_learned_with_the_bits_of_a_run_not_killed(tmp_path):
    write_photos(tmp_path / "birds")
    data = str(tmp_path / "data")
    words = ["image_folder", "--name", "birds", "--train", str(tmp_path / "birds")]
    assert prepare.main([*words, "--data_dir", data]) == 0
    given = "data=birds,base_classes=2,steps=2,prior=meta,memory=4"
    config = f"{runs.ROOT / 'configs' / 'image_folder.py'}:{given}"
    overrides = (*OVERRIDES, f"--config.data.data_dir={data}")

    # 6 updates of the base step, its end, and then 30 of the second.
    process = start_and_wait(config, tmp_path / "killed", 10, overrides)
    process.kill()
    process.communicate()
    folder = tmp_path / "killed" / "checkpoints"
    meta = store.read_meta(folder, newest(tmp_path / "killed"))
    assert meta["step"] == 1 and not meta["finished"]
    # Not here: with eight devices there are more threads, and other roundings.
    runs.run(config, tmp_path / "killed", *overrides)
    runs.run(config, tmp_path / "whole", *overrides)
    assert deterministic(tmp_path / "killed") == deterministic(tmp_path / "whole")

    found = runs.results(tmp_path / "killed")
    assert found["config"]["data.random_resized_crop"]
    assert sorted(found["class_names"]) == [f"bird{label}" for label in range(CLASSES)]
    counts = [step["result"]["counts"] for step in found["steps"]]
    assert counts == [[12, 12], [3, 3, 11], [3, 3, 3, 11]]  # one of each is held out
