"""Neural gas: the rule of Martinetz and Schulten, and the images nearest to it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsce_jax import neural_gas
from bsce_jax.methods import tpcil_like
from tests.test_methods import shown


def oracle(vectors: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """The rule written out, one vertex after another."""
    n = len(vectors)
    vertices = [vectors[i].astype(float) for i in rng.permutation(n)[:count]]
    updates = 10 * n
    for t in range(updates):
        if t % n == 0:
            order = rng.permutation(n)
        v, progress = vectors[order[t % n]].astype(float), t / (updates - 1)
        step, reach = 0.1 * 0.1**progress, 10 * 0.01**progress
        far = [np.linalg.norm(v - w) for w in vertices]
        for w, away in zip(vertices, far, strict=True):
            rank = sum(other < away for other in far)
            w += step * np.exp(-rank / reach) * (v - w)
    return np.array(vertices)


@pytest.mark.parametrize(("n", "count"), [(9, 4), (5, 5), (2, 1)])
def test_the_rule(n: int, count: int) -> None:
    vectors = np.random.default_rng(n).normal(size=(n, 3)).astype(np.float32)
    found = neural_gas.fit(vectors, count, np.random.default_rng(1))
    expected = oracle(vectors, count, np.random.default_rng(1))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)


sizes = st.integers(1, 9)


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, st.integers(0, 2**16))
def test_vertices_stay_among_their_vectors(n: int, count: int, seed: int) -> None:
    """Within their bounds, no more than they are; only the random numbers decide."""
    vectors = np.random.default_rng(seed).integers(-4, 5, (n, 2)).astype(float)
    before = vectors.copy()
    found, again = (
        neural_gas.fit(vectors, count, np.random.default_rng(seed)) for _ in range(2)
    )
    np.testing.assert_array_equal(found, again)
    np.testing.assert_array_equal(vectors, before)
    assert found.shape == (min(count, n), 2)
    assert np.all(found >= vectors.min(axis=0) - 1e-12)
    assert np.all(found <= vectors.max(axis=0) + 1e-12)
    chosen = neural_gas.representatives(vectors, found)
    assert len(set(chosen.tolist())) == len(found) and set(chosen) <= set(range(n))


@pytest.mark.parametrize("seed", range(4))
def test_vertices_spread_over_clusters(seed: int) -> None:
    """One goes to each, wherever they start."""
    rng = np.random.default_rng(seed)
    middles = np.array([[0.0, 0], [9, 0], [0, 9]])
    vectors = np.repeat(middles, 20, axis=0) + 0.3 * rng.normal(size=(60, 2))
    found = neural_gas.fit(vectors, 3, rng)
    away = np.linalg.norm(found[:, None] - middles[None], axis=2)
    np.testing.assert_array_equal(np.sort(np.argmin(away, axis=1)), range(3))
    assert away.min(axis=1).max() < 2
    other = neural_gas.fit(vectors, 3, rng)
    assert np.any(other != found)


def test_representatives_are_the_nearest_none_twice() -> None:
    """A vertex of more vectors chooses first; what is taken is taken."""
    vectors = np.array([[0.0], [1], [2], [10], [11], [20]])
    far = np.array([[20.4], [10.6], [1.2]])
    found = neural_gas.representatives(vectors, far)
    np.testing.assert_array_equal(found, [1, 4, 5])
    near = np.array([[0.9], [1.3]])
    np.testing.assert_array_equal(neural_gas.representatives(vectors, near), [1, 0])
    everyone = neural_gas.representatives(vectors, vectors[::-1])
    np.testing.assert_array_equal(everyone, range(6)[::-1])


def test_exemplars_are_images_near_the_vertices_of_their_class() -> None:
    """On directions; of the images that can be read, no more than there are."""
    table = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    new = [np.arange(10, 22), np.arange(30, 34)]

    def features(groups):  # the first image of every class cannot be read
        return [(group[1:], table[group[1:]]) for group in groups]

    def chosen(scale: float = 1.0) -> list[list[int]]:
        step, *_ = shown(
            {},
            new=new,
            features=lambda groups: [(i, scale * f) for i, f in features(groups)],
            rng=np.random.default_rng(5),
        )
        return [found.tolist() for found in tpcil_like.exemplars(step, 5)]

    first, second = chosen()
    assert len(set(first)) == 5 and set(first) <= set(range(11, 22))
    assert sorted(second) == [31, 32, 33]
    assert chosen(4.0) == [first, second]
    rng = np.random.default_rng(5)
    directions = table[11:22].astype(float)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    vertices = neural_gas.fit(directions, 5, rng)
    found = neural_gas.representatives(directions, vertices)
    assert first == (11 + found).tolist()
