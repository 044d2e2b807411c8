"""Predictions, features and exemplar selection over whole sets of images."""

from collections.abc import Callable

import numpy as np

from bsce_jax import memory, parallel
from bsce_jax.programs import Programs
from bsce_jax.state import Images, PyTree, Rows


def predict(
    programs: Programs,
    params: PyTree,
    batch_stats: PyTree,
    seen: np.ndarray,
    data: Images,
    indices: np.ndarray,
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classifies images by the highest logit among the seen classes.

    Args:
      programs: compiled functions.
      params: of the network, on the devices.
      batch_stats: of the network, on the devices.
      seen: [C] bool, on the devices.
      data: images and labels on the devices.
      indices: int [N], images to classify.
      batch_size: images a call.

    Returns:
      int32 [N], predicted positions in the class order; bool [N], whether the label
      is among the five highest logits; float32 [N, D], features.
    """
    arguments = (params, batch_stats, seen, data)
    predicted, top5, found = _over_batches(
        programs, programs.evaluate, arguments, indices, batch_size
    )
    return predicted, top5, found


def features(
    programs: Programs,
    params: PyTree,
    batch_stats: PyTree,
    data: Images,
    indices: np.ndarray,
    batch_size: int,
    mirrored: bool = False,
) -> np.ndarray:
    """Features of the test transform, float32 [N, D]; arguments as for predict.

    With `mirrored` those of the images flipped from left to right.
    """
    flip = parallel.replicate(programs.parallel, np.bool_(mirrored))
    arguments = (params, batch_stats, data, flip)
    return _over_batches(programs, programs.features, arguments, indices, batch_size)[0]


def _over_batches(
    programs: Programs,
    program: Callable,
    arguments: tuple,
    indices: np.ndarray,
    batch_size: int,
) -> tuple[np.ndarray, ...]:
    """Runs a program over [1, B] rows; outputs joined along the images."""
    pending, sizes = [], []
    for first in range(0, len(indices), batch_size):
        chosen = indices[first : first + batch_size]
        row = np.zeros((1, batch_size), np.int32)
        row[0, : len(chosen)] = chosen
        valid = (np.arange(batch_size) < len(chosen))[None].astype(np.float32)
        rows = Rows(row, valid, np.arange(batch_size, dtype=np.int32)[None])
        pending.append(program(*arguments, parallel.shard(programs.parallel, rows)))
        sizes.append(len(chosen))
    fetched = [
        parallel.unshard(programs.parallel, outputs, size)
        for outputs, size in zip(pending, sizes, strict=True)
    ]
    return tuple(
        np.concatenate([out[0] for out in outs]) for outs in zip(*fetched, strict=True)
    )


def select_exemplars(
    programs: Programs,
    params: PyTree,
    batch_stats: PyTree,
    data: Images,
    by_class: list[np.ndarray],
    how: str,
    count: int,
    most: int,
    longest: int,
    batch_size: int,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Ranks exemplars of classes, with the network just trained on them.

    Args:
      programs: compiled functions.
      params: of the network, on the devices.
      batch_stats: of the network, on the devices.
      data: training images on the devices.
      by_class: for each class the int indices of its training images.
      how: "herding" or "random".
      count: exemplars of each class.
      most: the largest count of the experiment, and
      longest: images of its largest class: one compiled size.
      batch_size: images a call.
      rng: for random selection.

    Returns:
      For each class `count` indices, in order of choice.
    """
    if count == 0:
        return [indices[:0] for indices in by_class]
    if how == "random":
        return [i[memory.random_ranking(len(i), count, rng)] for i in by_class]
    joined = features(
        programs, params, batch_stats, data, np.concatenate(by_class), batch_size
    )
    parts = np.split(joined, np.cumsum([len(i) for i in by_class])[:-1])
    chosen = []
    for indices, part in zip(by_class, parts, strict=True):
        padded = np.zeros((longest, part.shape[1]), np.float32)
        padded[: len(part)] = part
        order = memory.herd_padded(padded, np.arange(longest) < len(part), most)
        chosen.append(indices[np.asarray(order)[:count]])
    return chosen
