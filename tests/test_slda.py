"""Streaming LDA: the authors' code, a loop over samples, chunks, shrinkage."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from bsce_jax import slda

Parity = Callable[[str], Mapping[str, np.ndarray]]
State = tuple[np.ndarray, np.ndarray, np.ndarray, int]


def one_at_a_time(
    covariance: np.ndarray,
    means: np.ndarray,
    counts: np.ndarray,
    n: int,
    features: np.ndarray,
    labels: np.ndarray,
) -> State:
    """The authors' update, literally."""
    covariance, means, counts = covariance.copy(), means.copy(), counts.copy()
    for x, y in zip(features, labels, strict=True):
        away = x - means[y]
        delta = np.outer(away, away) * n / (n + 1)
        covariance = (n * covariance + delta) / (n + 1)
        means[y] += away / (counts[y] + 1)
        counts[y] += 1
        n += 1
    return covariance, means, counts, n


def start(rng: np.random.Generator, size: int, n: int) -> State:
    """Six classes, of which the last three are new."""
    factor = rng.normal(size=(size, size))
    means, counts = np.zeros((6, size)), np.zeros(6, np.int64)
    if n:
        means[:3], counts[:3] = 2 + rng.normal(size=(3, size)), (3, 1, n - 4)
    return factor @ factor.T / size, means, counts, n


@pytest.mark.parametrize("chunk", [1, 7, 64, 8192])
@pytest.mark.parametrize("n", [0, 40])
def test_stream_is_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, chunk: int, n: int
) -> None:
    monkeypatch.setattr(slda, "_CHUNK", chunk)
    rng = np.random.default_rng(chunk + n)
    state = start(rng, 9, n)
    features = 5 + rng.normal(size=(300, 9)) * 3
    labels = rng.choice(6, 300, p=[0.4, 0.1, 0, 0.3, 0.19, 0.01])
    found = slda.stream(*state, features, labels)
    expected = one_at_a_time(*state, features, labels)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(found[2], expected[2])
    assert found[3] == expected[3] == n + 300


def test_the_order_counts_and_parts_make_a_whole() -> None:
    rng = np.random.default_rng(1)
    state = start(rng, 4, 12)
    features, labels = rng.normal(size=(50, 4)) + 3, rng.integers(0, 6, 50)
    whole = slda.stream(*state, features, labels)
    parts = slda.stream(
        *slda.stream(*state, features[:17], labels[:17]), features[17:], labels[17:]
    )
    for ours, theirs in zip(parts, whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    backwards = slda.stream(*state, features[::-1], labels[::-1])
    np.testing.assert_allclose(backwards[1], whole[1], rtol=1e-12)
    assert np.abs(backwards[0] - whole[0]).max() > 1e-3


def test_arguments_stay_as_they_are() -> None:
    rng = np.random.default_rng(2)
    state = start(rng, 4, 12)
    features, labels = rng.normal(size=(5, 4)).astype(np.float32), np.arange(5)
    before = [np.copy(x) for x in (*state, features, labels)]
    found = slda.stream(*state, features, labels)
    for ours, theirs in zip((*state, features, labels), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert found[0].dtype == found[1].dtype == np.float64
    for known in (state, (*state[:3], 0)):
        again = slda.stream(*known, features[:0], labels[:0])
        for ours, theirs in zip(again, known, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-15)


def test_the_authors_code(parity: Parity) -> None:
    """Base covariance (theirs passes through float32), stream of two new classes."""
    file = parity("slda")
    x, y = file["in_base_x"], file["in_base_y"]
    classes = len(file["out_means"])
    means, counts = np.zeros((classes, x.shape[1])), np.bincount(y, minlength=classes)
    for c in np.flatnonzero(counts):
        means[c] = x[y == c].mean(axis=0)
    assert (counts == 0).sum() == 2
    covariance = slda.shrunk_covariance(x - means[y])
    np.testing.assert_allclose(covariance, file["out_base_sigma"], atol=6e-8)
    learned = slda.stream(
        file["out_base_sigma"],
        means,
        counts,
        len(x),
        file["in_stream_x"],
        file["in_stream_y"],
    )
    np.testing.assert_allclose(learned[0], file["out_sigma"], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(learned[1], file["out_means"], rtol=1e-12, atol=1e-13)
    weights, biases = slda.classifier(*learned[:2])
    scores = file["in_test_x"] @ weights + biases
    np.testing.assert_allclose(scores, file["out_scores"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("samples,size", [(5, 12), (200, 12), (3, 1), (2, 4)])
def test_shrinkage_is_that_of_scikit_learn(samples: int, size: int) -> None:
    covariance = pytest.importorskip("sklearn.covariance")
    centred = np.random.default_rng(3).normal(size=(samples, size))
    centred *= np.arange(1, size + 1)
    expected = covariance.OAS(assume_centered=True).fit(centred).covariance_
    np.testing.assert_allclose(slda.shrunk_covariance(centred), expected, rtol=1e-12)


def test_shrinkage_by_hand() -> None:
    """diag(2, 0), two samples: alpha = 1, mu = 1, weight (1 + 1) / (3 / 2), so 1."""
    np.testing.assert_allclose(slda.shrunk_covariance([[2, 0], [0, 0]]), np.eye(2))
    np.testing.assert_array_equal(slda.shrunk_covariance(np.zeros((3, 2))), 0)
    many = np.tile([[2, 0], [-2, 0]], (50, 1))  # diag(4, 0): weight 8 / (101 * 2)
    weight = 8 / 202
    expected = np.diag([4 - 2 * weight, 2 * weight])
    np.testing.assert_allclose(slda.shrunk_covariance(many), expected, rtol=1e-13)


@pytest.mark.parametrize("rank", [5, 2])
def test_classifier(rank: int) -> None:
    """Scores from the formula, also of a covariance that has no inverse."""
    rng = np.random.default_rng(rank)
    factor = rng.normal(size=(5, rank))
    covariance, means, x = factor @ factor.T, *rng.normal(size=(2, 7, 5))
    weights, biases = slda.classifier(covariance, means, 0.01)
    assert weights.shape == (5, 7) and biases.shape == (7,)
    inverse = np.linalg.inv(0.99 * covariance + 0.01 * np.eye(5))
    for k, mean in enumerate(means):
        expected = x @ inverse @ mean - 0.5 * mean @ inverse @ mean
        np.testing.assert_allclose(x @ weights[:, k] + biases[k], expected, rtol=1e-9)
    default = slda.classifier(covariance, means)
    np.testing.assert_array_equal(
        default[0], slda.classifier(covariance, means, 1e-4)[0]
    )


def test_it_learns() -> None:
    """Three Gaussians far apart along directions of low variance, streamed."""
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 3, 400)
    spread = np.array([5.0, 0.2, 0.2])
    centres = np.array([[0.0, 1, 0], [0, -1, 0], [0, 0, 1]])
    x = centres[labels] + rng.normal(size=(400, 3)) * spread
    learned = slda.stream(
        np.eye(3), np.zeros((3, 3)), np.zeros(3, int), 0, x[:300], labels[:300]
    )
    weights, biases = slda.classifier(*learned[:2])
    right = np.argmax(x[300:] @ weights + biases, axis=1) == labels[300:]
    assert right.mean() > 0.97
