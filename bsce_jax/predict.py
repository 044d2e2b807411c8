"""Classifies new images with a trained run: python -m bsce_jax.predict."""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

from bsce_jax.checkpoints import store
from bsce_jax.compute import inference, parallel, steps
from bsce_jax.compute.state import Batch, Network, StepContext
from bsce_jax.config import recorded
from bsce_jax.errors import UserError, field_error, printable
from bsce_jax.report.results import FILE_NAME, read
from bsce_jax.run import dataset, programs
from bsce_jax.run.context import test_context
from bsce_jax.run.progress import finished_checkpoint

# Of a run's configuration; a name with a dot at its end is a section.
_NEEDED = (
    *("method", "model.", "scenario.", "memory.", "optim.", "evaluation.batch_size"),
    *("data.mean", "data.std", "data.padding", "data.flip", "data.brightness"),
    *("prior", "meta.fraction"),
)

SHOWN = 3  # classes of an image
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


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
        out = inference.outputs_of(program, network, batch, context)
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
    from bsce_jax.data import decode

    height, width, channels = shape
    try:
        encoded = epath.Path(path).read_bytes()
        if resize >= 0:
            return decode.test_crop(encoded, height, resize=resize, channels=channels)
        return decode.averaged(decode.whole(encoded, channels), height, width)
    except Exception as error:  # of any file system, too
        raise UserError(f"image {path!r} cannot be read: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table of predictions, or JSON; returns the exit status.

    0, or 2 after a mistake; of several images all that can be read are predicted.
    """
    given = _parser().parse_intermixed_args(arguments)
    try:
        predictor = load(given.workdir, given.step)
        if given.images:
            paths = [path for image in given.images for path in _files(image)]
            found = _of_files(predictor, paths)
        else:
            paths, found = _of_test_images(given.workdir, predictor)
        show = _show_json if given.json else _show_table
        unread = show(predictor, paths, found)
    except UserError as error:
        print(f"bsce_jax: {error}", file=sys.stderr)
        return 2
    return 2 if unread else 0


def _parser() -> argparse.ArgumentParser:
    parser = terminal.Arguments(prog="python -m bsce_jax.predict", description=__doc__)
    parser.add_argument("workdir", help="folder of a run")
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="image files, or folders of them; none: some test images of the run's "
        "data set, whose class is known",
    )
    parser.add_argument("--step", type=int, default=-1, help="step (default: newest)")
    parser.add_argument(
        "--json",
        action="store_true",
        help=f"a list of {{file, class, probability, best: the {SHOWN} likeliest}}",
    )
    return parser


class Classified(NamedTuple):
    """An image that was shown to the network.

    Attributes:
      file: its name.
      probabilities: float32 [classes seen].
      true: its class, where that is known.
    """

    file: str
    probabilities: np.ndarray
    true: str = ""


def _files(path: str) -> list[str]:
    """The file, or all images in a folder and in its folders, in order.

    Raises:
      UserError: there are none.
    """
    folder = epath.Path(path)
    if not folder.is_dir():
        return [path]
    found = sorted(
        os.fspath(where / name)
        for where, _, names in folder.walk()
        for name in names
        if epath.Path(name).suffix.lower() in SUFFIXES
    )
    if not found:
        raise UserError(f"no image in the folder {path!r}: {', '.join(SUFFIXES)}")
    return found


def _of_files(
    predictor: Predictor, paths: Sequence[str]
) -> Iterator[Classified | UserError]:
    """Predictions of image files, or why a file cannot be read, in order."""
    for first in range(0, len(paths), predictor.batch_size):
        read: list[np.ndarray | UserError] = []
        for path in paths[first : first + predictor.batch_size]:
            try:
                read.append(read_image(path, predictor.image_shape, predictor.resize))
            except UserError as error:
                read.append(error)
        images = [image for image in read if isinstance(image, np.ndarray)]
        rows = iter(predictor(np.stack(images)).probabilities if images else ())
        for path, image in zip(paths[first:], read, strict=False):
            if isinstance(image, UserError):
                yield image
            else:
                yield Classified(path, next(rows))


def _of_test_images(
    workdir: str, predictor: Predictor, count: int = 10
) -> tuple[list[str], Iterator[Classified | UserError]]:
    """Names and predictions of test images of the run's data set, spread evenly.

    Raises:
      UserError: the data set is not here, or another.
    """
    results = read(workdir)
    config = recorded.nested(results["config"], (*_NEEDED, "data.", "seed"))
    data = dataset.load(config)
    if changed := dataset.difference(results["data"], dataset.facts(data)):
        raise UserError(f"{workdir}: its data set has changed: {changed}")
    seen = np.flatnonzero(data.test_labels < len(predictor.class_names))
    chosen = seen[np.linspace(0, len(seen) - 1, min(count, len(seen))).astype(int)]
    names = [f"{data.test.name} {record}" for record in data.test.records[chosen]]
    images = dataset.test_images(config, data, chosen)
    found = predictor(images).probabilities
    true = [predictor.class_names[label] for label in data.test_labels[chosen]]
    return names, map(Classified, names, found, true)


def _show_table(
    predictor: Predictor, paths: Sequence[str], found: Iterable[Classified | UserError]
) -> int:
    """Prints a line as soon as an image is predicted; returns how many are unread."""
    names = [printable(name) for name in predictor.class_names]
    wide = max(len("class"), *map(len, names))
    file_wide = max(len("file"), *(len(printable(path)) for path in paths))
    unread, header = 0, False
    for one in found:
        if isinstance(one, UserError):
            sys.stdout.flush()
            print(f"bsce_jax: {one}", file=sys.stderr)
            unread += 1
            continue
        if not header:
            true = f"{'true':{wide}}  " if one.true else ""
            ranks = f"{'class':{wide}}  probability"
            more = [f"{name:{wide + 6}}" for name in ("second", "third")]
            line = f"{'file':{file_wide}}  {true}{'  '.join([ranks, *more])}"
            print(line.rstrip())
            header = True
        best = _best(one)
        first = f"{names[best[0]]:{wide}}  {one.probabilities[best[0]]:11.3f}"
        more = [f"{names[i]:{wide}} {one.probabilities[i]:.3f}" for i in best[1:]]
        true = f"{printable(one.true):{wide}}  " if one.true else ""
        line = f"{printable(one.file):{file_wide}}  {true}{'  '.join([first, *more])}"
        print(line.rstrip(), flush=True)
    return unread


def _show_json(
    predictor: Predictor, paths: Sequence[str], found: Iterable[Classified | UserError]
) -> int:
    """Prints a JSON list, an image a line; returns how many images are unread."""
    del paths
    names, unread, separator = predictor.class_names, 0, "["
    for one in found:
        if isinstance(one, UserError):
            print(f"bsce_jax: {one}", file=sys.stderr)
            unread += 1
            continue
        best = [
            {"class": names[i], "probability": round(float(one.probabilities[i]), 6)}
            for i in _best(one)
        ]
        true = {"true": one.true} if one.true else {}
        shown = {"file": one.file, **true, **best[0], "best": best}
        print(separator, json.dumps(shown), end="", flush=True)
        separator = ",\n "
    print("[]" if separator == "[" else "]")
    return unread


def _best(one: Classified) -> list[int]:
    """The likeliest classes, in order."""
    order = np.argsort(-one.probabilities, kind="stable")
    return [int(i) for i in order[:SHOWN]]


if __name__ == "__main__":
    terminal.run(main)
