"""LUCIR (Hou et al. 2019, section 3): new rows of the cosine head are imprinted."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bsce_jax.nearest_mean import normalised

HEADS = ("cosine",)


def begin(
    head: dict[str, NDArray],
    features: Sequence[NDArray],
    first: int,
    rng: np.random.Generator,
) -> dict[str, NDArray]:
    """Imprints the new classes, as the authors' code does.

    A new row is the mean of the class's normalised features, normalised, times the
    mean length of the old rows.

    Args:
      head: "kernel" [D, C] and "scale" [].
      features: of each new class, [images, D].
      first: position of the first new class; the old ones are before it.
      rng: not used.

    Returns:
      The head with new rows; float32.
    """
    kernel = np.array(head["kernel"], np.float64)
    length = np.linalg.norm(kernel[:, :first], axis=0).mean()
    for position, of_class in enumerate(features, start=first):
        mean = normalised(of_class).mean(axis=0)
        kernel[:, position] = length * normalised(mean)
    return {**head, "kernel": kernel.astype(np.float32)}
