"""Classifies new images with a trained run: python -m bsce_jax.predict."""

import argparse
import functools
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bsce_jax import terminal

if __name__ == "__main__":
    terminal.start()  # before what takes seconds

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn
from ml_collections import ConfigDict
from PIL import Image

from bsce_jax.checkpoints import store
from bsce_jax.compute import parallel, steps
from bsce_jax.compute.state import Batch, Network, StepContext
from bsce_jax.config import recorded
from bsce_jax.errors import UserError, field_error
from bsce_jax.report.results import FILE_NAME, read
from bsce_jax.run import programs
from bsce_jax.run.context import test_context
from bsce_jax.run.progress import finished_checkpoint

# Of a run's configuration; a name with a dot at its end is a section.
_NEEDED = (
    *("method", "model.", "scenario.", "memory.", "optim.", "evaluation.batch_size"),
    *("data.mean", "data.std", "data.padding", "data.flip", "data.brightness"),
)


class Prediction(NamedTuple):
    """Class names (N strings) and probabilities, float32 [N, classes seen]."""

    names: tuple[str, ...]
    probabilities: np.ndarray


class Predictor(NamedTuple):
    """A trained network as a function of images.

    Attributes:
      class_names: names of the classes seen, in the order of the probabilities.
      image_shape: (height, width, channels) that images must have.
      predict: uint8 [N, H, W, channels] -> Prediction.
      resize: how files become images, see `read_image`.
      batch_size: images a call in the run's evaluation: no more are known to fit.
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    predict: Callable[[np.ndarray], Prediction]
    resize: int = -1
    batch_size: int = 256

    def __call__(self, images: np.ndarray) -> Prediction:
        """Calls `predict`."""
        return self.predict(images)


def load(workdir: epath.PathLike, step: int = -1) -> Predictor:
    """Loads the network of a finished step of a run.

    Args:
      workdir: of the run.
      step: which step; -1 is the newest finished one.

    Returns:
      A function of images that gives class names and probabilities: the softmax, over
      the classes seen, of the scores that predict (the logits where the method has no
      others; no log-prior at test time).

    Raises:
      UserError: no such run or step, or a damaged checkpoint.
    """
    folder = epath.Path(workdir)
    results = read(folder)
    known = [record["step"] for record in results["steps"]]
    if not -len(known) <= step < len(known):
        raise UserError(f"step={step}: finished steps of {folder} are {known}")
    step = known[step]
    try:
        config, model, target = _network(results)
    except UserError as error:
        raise UserError(f"{folder / FILE_NAME}: {error}") from None
    shape = tuple(results["image_shape"])
    checkpoints = folder / store.FOLDER
    found = store.restore(
        checkpoints,
        finished_checkpoint(checkpoints, step),
        {"state": {"network": target}},
        partial=True,
    )
    network = found.arrays["state"]["network"]
    seen = [record["result"]["num_seen"] for record in results["steps"][: step + 1]]
    names = tuple(results["class_names"][: seen[-1]])
    program = programs.test_program(config, model)
    probabilities = _probabilities(program, network, seen)

    def predict(images: np.ndarray) -> Prediction:
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != shape or images.ndim != 4:
            raise UserError(
                f"images are {images.dtype}{list(images.shape)}: expected uint8 "
                f"[N, {', '.join(map(str, shape))}]"
            )
        found = np.asarray(probabilities(images))
        best = tuple(names[i] for i in found.argmax(axis=1))
        return Prediction(best, found)

    data = config.data
    streamed = data.get("loading", "resident") == "streaming"
    resize = data.resize if streamed else -1
    return Predictor(names, shape, predict, resize, config.evaluation.batch_size)


def _network(results: Mapping[str, Any]) -> tuple[ConfigDict, nn.Module, Network]:
    """Of a run: its configuration, its model, and shapes and dtypes of its network.

    Raises:
      UserError: the configuration is that of no run, or of no run with such images.
    """
    flat, shape = results["config"], tuple(results["image_shape"])
    if not any(name.startswith("phase.") for name in flat):
        raise UserError("made by a version before 0.2: train it again")
    streamed = flat.get("data.loading") == "streaming"
    config = recorded.nested(flat, [*_NEEDED, *["data.resize"] * streamed])
    for name in ("mean", "std"):
        if len(config.data[name]) != shape[2]:
            allowed = f"{shape[2]} numbers, one a channel of the images"
            raise field_error(f"data.{name}", config.data[name], allowed)
    devices = parallel.create("jit", jax.local_devices()[:1])
    model = programs.build_model(config, devices, len(results["class_names"]))
    return config, model, programs.network_shapes(config, model, shape)


def _probabilities(
    program: steps.Program, network: Network, seen: Sequence[int]
) -> Callable[[np.ndarray], jax.Array]:
    """uint8 images -> probabilities; `seen` are the classes seen after each step."""
    context = test_context(program.model.num_classes, seen)

    @jax.jit
    def probabilities(
        network: Network, context: StepContext, images: jax.Array
    ) -> jax.Array:
        nothing = jnp.zeros(len(images), jnp.int32)
        ones = jnp.ones(len(images), jnp.float32)
        batch = Batch(program.test_images(images), nothing, ones)
        out = steps.outputs_of(program, network, batch, context)
        found = jax.nn.softmax(steps.scores(out, context.seen), axis=-1)
        return found[:, : seen[-1]]

    return functools.partial(probabilities, network, context)


def read_image(path: str, shape: tuple[int, int, int], resize: int = -1) -> np.ndarray:
    """Reads an image file as uint8 [H, W, channels] of a given shape.

    Args:
      path: of the file.
      shape: the result's.
      resize: shorter side before the centre crop, as in the evaluation of streamed
        images (0 = that of the crop); -1 resizes all of the image.

    Raises:
      UserError: it is missing or not an image.
    """
    height, width, channels = shape
    try:
        if resize >= 0:
            from bsce_jax.data import decode

            encoded = epath.Path(path).read_bytes()
            return decode.test_crop(encoded, height, resize=resize, channels=channels)
        with warnings.catch_warnings():
            # Of a size that decode.py takes; what it refuses, Pillow refuses too.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                converted = image.convert("L" if channels == 1 else "RGB")
    # Whatever a damaged file leads the readers of Pillow to.
    except Exception as error:
        raise UserError(f"image {path!r} cannot be read: {error}") from None
    if converted.size != (width, height):
        converted = converted.resize((width, height), Image.Resampling.BOX)
    return np.asarray(converted, np.uint8).reshape(shape)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints `path: class (probability)` for each image; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bsce_jax.predict", description=__doc__
    )
    parser.add_argument("workdir", help="folder of a run")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image file")
    parser.add_argument("--step", type=int, default=-1, help="step (default: newest)")
    given = parser.parse_args(arguments)
    try:
        predictor = load(given.workdir, given.step)
        size = predictor.batch_size
        for first in range(0, len(given.images), size):
            _print_classes(predictor, given.images[first : first + size])
    except UserError as error:
        print(f"bsce_jax: {error}", file=sys.stderr)
        return 2
    return 0


def _print_classes(predictor: Predictor, paths: Sequence[str]) -> None:
    images = [
        read_image(path, predictor.image_shape, predictor.resize) for path in paths
    ]
    found = predictor(np.stack(images))
    for path, name, row in zip(paths, found.names, found.probabilities, strict=True):
        print(f"{path}: {name} ({row.max():.3f})", flush=True)


if __name__ == "__main__":
    terminal.run(main)
