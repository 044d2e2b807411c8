"""Nearest neighbours by cosine: exact, ties, pools, pieces, one compile."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsce_jax import dde, neighbours
from bsce_jax.telemetry import compiles

D, K = 4, 3
# Pieces of 4 vectors and of 5 of the pool: sets of the tests have several of both.
in_pieces = mock.patch.multiple(neighbours, QUERIES=4, POOL=5)
# Directions whose cosines are exact in float32, and often the same.
OTHERS = [[1, 1, 1, 1], [1, 1, -1, -1], [-1, 1, -1, 1], [0, 0, 0, 0]]
DIRECTIONS = np.concatenate([np.eye(D), -np.eye(D), OTHERS])


def brute_force(features: np.ndarray, pool: np.ndarray, count: int) -> np.ndarray:
    """One vector and one candidate after another, in float64."""
    found = np.full((len(features), count), -1)
    for i, vector in enumerate(features):
        near = []
        for j, other in enumerate(features):
            if pool[j] and j != i:
                lengths = np.sqrt(vector @ vector) * np.sqrt(other @ other)
                near.append((-(vector @ other) / max(lengths, 1e-300), j))
        chosen = [j for _, j in sorted(near)[:count]]
        found[i, : len(chosen)] = chosen
    return found


@in_pieces
@settings(max_examples=80, deadline=None)
@given(st.integers(1, 20), st.integers(0, 2**16), st.floats(0, 1))
def test_ties_and_pools_as_by_brute_force(size: int, seed: int, share: float) -> None:
    """Of equal ones the first; never itself; -1 where the pool has too few."""
    rng = np.random.default_rng(seed)
    features = DIRECTIONS[rng.integers(0, len(DIRECTIONS), size)]
    features = features * 2.0 ** rng.integers(-3, 4, (size, 1))
    pool = rng.random(size) < share
    found = neighbours.nearest(features, pool, K)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, brute_force(features, pool, K))


@in_pieces
@pytest.mark.parametrize("size", [3, 19, 20])
def test_vectors_in_general_position(size: int) -> None:
    """Distances of vectors of length 1 give the same; lengths have no effect."""
    rng = np.random.default_rng(size)
    features = rng.normal(size=(size, D))
    features *= np.exp(4 * rng.normal(size=(size, 1)))
    pool = np.arange(size) % 4 != 1
    found = neighbours.nearest(features.astype(np.float32), pool, K)
    np.testing.assert_array_equal(found, brute_force(features, pool, K))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    away = np.linalg.norm(unit[:, None] - unit[None], axis=2)
    away[:, ~pool] = away[np.arange(size), np.arange(size)] = np.inf
    expected = np.argsort(away, axis=1, kind="stable")[:, :K]
    missing = np.isinf(np.take_along_axis(away, expected, axis=1))
    np.testing.assert_array_equal(found, np.where(missing, -1, expected))


def test_cosines_that_differ_little_are_told_apart() -> None:
    """More than an accelerator's usual precision, 1e-3, would."""
    angles = np.array([0.0, 0.1003, 0.1002, 0.1, 0.1001])
    features = np.zeros((5, D))
    features[:, :2] = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found = neighbours.nearest(features, np.ones(5, bool), 4)
    np.testing.assert_array_equal(found[0], [3, 4, 2, 1])


@in_pieces
def test_one_compile_whatever_the_set() -> None:
    counts = compiles.compile_counter()
    for size in (1, 4, 5, 11, 20):
        for pool in (np.zeros(size, bool), np.arange(size) > 2, np.ones(size, bool)):
            neighbours.nearest(np.ones((size, D + 1)), pool, K)
    assert dict(counts) == {"_merge": 1}


@in_pieces
def test_companions_are_new_images_among_the_first_places() -> None:
    """For old classes' images too; one that cannot be read neither has nor is any."""
    rng = np.random.default_rng(0)
    features, size = rng.normal(size=(18, D)).astype(np.float32), 18
    labels = rng.integers(0, 5, size)
    labels[[2, 3]] = -1, 4
    for pool in (0, 7, 100):
        allowed = (labels >= 2) & (np.arange(size) < (pool or size))
        found = dde.companions(features, labels, 2, K, pool)
        expected = brute_force(features.astype(float), allowed, K)
        expected[2] = -1
        np.testing.assert_array_equal(found, expected)
        assert 3 in found and 2 not in found
        assert np.all(found[(labels == 0) | (labels == 1)][:, 0] >= 0)
