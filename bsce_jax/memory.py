"""Exemplar memory: how many images a class keeps, which, and the balanced split.

A memory is a ranking, ``[classes, width]`` int32: for each class, by its position in
the class order, the indices of its images in the source, best first, padded with -1.
A class is ranked once, at the end of the step in which it is learned; a smaller budget
later keeps a prefix. Images themselves are never stored.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray

from bsce_jax import norms
from bsce_jax.errors import UserError

_CLASSICAL_PICKS = 1000


def quota(kind: str, per_class: int, budget: int, num_seen: int) -> int:
    """Exemplars kept of each class once `num_seen` classes are learned.

    Args:
      kind: "growing", `per_class` images of every class; "fixed", `budget` images in
        all, equally divided; or "none".
      per_class: images, read by "growing".
      budget: images, read by "fixed".
      num_seen: classes learned so far.

    Returns:
      Images of each class.

    Raises:
      UserError: unknown kind, a negative number, or a budget of less than one image a
        class.
    """
    if kind == "none":
        return 0
    if kind == "growing":
        if per_class < 0:
            raise UserError(f"per_class={per_class}: must be at least 0")
        return per_class
    if kind == "fixed":
        if budget < num_seen:
            raise UserError(
                f"budget={budget}: must be at least {num_seen}, one image for each "
                "class seen"
            )
        return budget // num_seen
    raise UserError(f"kind={kind!r}: must be 'growing', 'fixed' or 'none'")


def herd(features: ArrayLike, m: int) -> jax.Array:
    """Herding: images whose running mean follows the mean of their class.

    iCaRL's selection (Rebuffi et al. 2017, Algorithm 4) as LUCIR and PODNet run it, on
    features normalised to length 1. `herd(features, k)` is the prefix of
    `herd(features, m)` for k < m.

    Args:
      features: ``[images, dimension]`` of one class.
      m: images to choose; static under jit.

    Returns:
      ``[m]`` int32 rows of `features`, in order of choice.

    Raises:
      UserError: m is not between 1 and the number of images.
    """
    features = jnp.asarray(features)
    num_images = features.shape[0]
    if not 1 <= m <= num_images:
        raise UserError(f"m={m}: must be from 1 to {num_images}, the number of images")
    return herd_padded(features, jnp.ones(num_images, bool), m)


@functools.partial(jax.jit, static_argnames=("m", "normalise"))
def herd_padded(
    features: jax.Array, valid: jax.Array, m: int, normalise: bool = True
) -> jax.Array:
    """`herd` for classes of different sizes with one compilation.

    Runs in float32, or in float64 where the features are.

    Args:
      features: ``[rows, dimension]``, the images of one class and padding.
      valid: ``[rows]`` bool, False for padding.
      m: images to choose; static.
      normalise: whether to herd features of length 1, or as they are; static. As they
        are (BiC, Wu et al. 2019, in the authors' code) image k is the one, not chosen
        before, that brings the mean of the first k nearest to the class's.

    Returns:
      ``[m]`` int32 rows in order of choice, -1 where there are fewer images than m.
    """
    points = norms.widened(features)
    if normalise:
        points = norms.normalise(points)
    points = jnp.where(valid[:, None], points, 0)
    num_valid = jnp.sum(valid, dtype=jnp.int32)
    mean = jnp.sum(points, axis=0) / jnp.maximum(num_valid, 1)

    def unfinished(state: tuple[jax.Array, ...]) -> jax.Array:
        _, count, *_ = state
        return count < jnp.minimum(m, num_valid)

    def pick(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        picks, count, chosen, ranking, direction = state
        # The classical loop may pick an image again, which only moves the direction.
        # After its 1000 picks what is missing is filled without repetition.
        again = normalise and picks < _CLASSICAL_PICKS
        allowed = valid & (again | ~chosen)
        # Not a matrix product: its blocking gives equal rows unequal sums, and so
        # breaks the ties between duplicates at random; nor is it ever TF32.
        scores = jnp.sum(points * direction[None, :], axis=1)
        if not normalise:  # the terms of |direction - point|^2 that the image decides
            scores -= jnp.sum(points**2, axis=1) / 2
        best = jnp.argmax(jnp.where(allowed, scores, -jnp.inf)).astype(jnp.int32)
        is_new = ~chosen[best]
        ranking = ranking.at[count].set(jnp.where(is_new, best, -1))
        chosen = chosen.at[best].set(True)
        direction = direction + mean - points[best]
        return picks + 1, count + is_new, chosen, ranking, direction

    start: tuple[jax.Array, ...] = (
        jnp.int32(0),
        jnp.int32(0),
        jnp.zeros(valid.shape, bool),
        jnp.full(m, -1, jnp.int32),
        mean,
    )
    *_, ranking, _ = jax.lax.while_loop(unfinished, pick, start)
    return ranking


def random_ranking(
    num_images: int, m: int, rng: np.random.Generator
) -> NDArray[np.int32]:
    """Random selection, the alternative to herding.

    Args:
      num_images: images of the class.
      m: images to choose.
      rng: advanced by a number of draws that does not depend on m.

    Returns:
      ``[m]`` int32, distinct, in ``[0, num_images)``.

    Raises:
      UserError: m is not between 1 and `num_images`.
    """
    if not 1 <= m <= num_images:
        raise UserError(f"m={m}: must be from 1 to {num_images}, the number of images")
    return rng.permutation(num_images)[:m].astype(np.int32)


def store(
    ranking: NDArray[np.int32], position: int, indices: ArrayLike
) -> NDArray[np.int32]:
    """Adds the exemplars of one class, replacing any it has.

    Args:
      ranking: ``[classes, width]`` int32.
      position: of the class in the class order.
      indices: ``[at most width]`` indices into the source, best first.

    Returns:
      A new ranking.

    Raises:
      UserError: more exemplars than the ranking is wide.
    """
    exemplars_of_class = np.asarray(indices)
    if len(exemplars_of_class) > ranking.shape[1]:
        raise UserError(
            f"indices: {len(exemplars_of_class)} exemplars do not fit a memory of "
            f"{ranking.shape[1]} a class"
        )
    ranking = ranking.copy()
    ranking[position] = -1
    ranking[position, : len(exemplars_of_class)] = exemplars_of_class
    return ranking


def exemplars(
    ranking: NDArray[np.int32], num_old: int, quota: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The images replayed: the first `quota` of every old class.

    Args:
      ranking: ``[classes, width]`` int32.
      num_old: classes learned in earlier steps.
      quota: exemplars of each class, at most the width.

    Returns:
      Indices into the source and labels (positions in the class order), each
      ``[num_old * quota]`` int32, class by class; shorter where a class has fewer.

    Raises:
      UserError: a quota wider than the ranking.
    """
    if not 0 <= quota <= ranking.shape[1]:
        raise UserError(
            f"quota={quota}: must be from 0 to {ranking.shape[1]}, the exemplars kept"
        )
    prefix = ranking[:num_old, :quota]
    labels, places = np.nonzero(prefix >= 0)
    return prefix[labels, places], labels.astype(np.int32)


def held_out_per_class(m: int, fraction: float = 0.1) -> int:
    """Images of each class in the balanced set on which alpha is learned.

    Args:
      m: exemplars of each old class.
      fraction: of them, between 0 and 1 (Jodelet et al., 10 %).

    Returns:
      ``fraction * m`` rounded to the nearest, half up, and at least 1.

    Raises:
      UserError: m below 2, or no exemplar left to train on.
    """
    if m < 2:
        raise UserError(
            f"m={m}: at least 2 exemplars a class are needed, one of them held out"
        )
    held_out = max(1, math.floor(fraction * m + 0.5))
    if not 0 < fraction < 1 or held_out >= m:
        raise UserError(
            f"fraction={fraction}: must be above 0 and leave some of {m} exemplars"
        )
    return held_out


def balanced_split(
    indices: ArrayLike, labels: ArrayLike, held_out: int, rng: np.random.Generator
) -> tuple[NDArray, NDArray]:
    """Takes a balanced held-out set out of a step's training set.

    What is drawn from a class depends on its own images and on `rng` only, not on the
    order of the images or on the other classes.

    Args:
      indices: ``[images]`` indices into the source.
      labels: ``[images]`` int, the label of each, from 0.
      held_out: images to take of every class that occurs, at least 1.
      rng: advanced by one draw.

    Returns:
      The indices to train on and the ``classes * held_out`` held out; each of
      `indices` is in one of them, and their order is kept.

    Raises:
      UserError: a class has no more than `held_out` images.
    """
    source, classes = np.asarray(indices), np.asarray(labels)
    seed = int(rng.integers(2**63))
    held = np.zeros(len(source), bool)
    for label in np.unique(classes):
        rows = np.flatnonzero(classes == label)
        if not 1 <= held_out < len(rows):
            raise UserError(
                f"held_out={held_out}: must be at least 1 and leave some of the "
                f"{len(rows)} images of class {label}"
            )
        rows = rows[np.argsort(source[rows])]
        own_rng = np.random.default_rng([seed, int(label)])
        held[own_rng.choice(rows, held_out, replace=False)] = True
    return source[~held], source[held]


def reserved(
    labels: ArrayLike, num_classes: int, count: int, seed: int
) -> NDArray[np.int32]:
    """Random images of every class, to be held out once and for all.

    What is drawn from a class depends on its own images and on the seed only.

    Args:
      labels: ``[images]`` int, from 0.
      num_classes: of which each has more than `count` images.
      count: images to take of each class.
      seed: of the draw.

    Returns:
      ``[num_classes, count]`` int32 indices into `labels`.

    Raises:
      UserError: a class has no more than `count` images.
    """
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels, minlength=num_classes)
    found = np.zeros((num_classes, count), np.int32)
    for label, rows in enumerate(np.split(order, np.cumsum(sizes)[:-1])):
        if len(rows) <= count:
            raise UserError(
                f"count={count}: must leave some of the {len(rows)} images of class "
                f"{label}"
            )
        found[label] = np.random.default_rng([seed, label]).permutation(rows)[:count]
    return found
