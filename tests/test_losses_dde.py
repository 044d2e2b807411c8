"""DDE's classification loss: formula, gradients, priors, extremes, no neighbours."""

import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsce_jax.compute.state import Batch
from bsce_jax.log_prior import EXCLUDED

dde_ce = importlib.import_module("bsce_jax.losses.dde_ce")
softmax_ce = importlib.import_module("bsce_jax.losses.softmax_ce")

B, K, C = 5, 3, 6
LABELS = np.array([4, 0, 3, 2, 1])
SEEN = np.arange(C) < 5
PRIOR = np.where(SEEN, np.log(np.arange(2.0, C + 2)), EXCLUDED)
NEAR = np.array([[1.0, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 0], [1, 1, 0]])


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def of_labels(
    logits: np.ndarray, neighbours: np.ndarray, valid: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """p_y and q_y [B]; without any neighbour q_y is p_y."""
    p = softmax(logits)[np.arange(B), LABELS]
    each = softmax(neighbours)[np.arange(B), :, LABELS]
    both = zip(each, valid, p, strict=True)
    return p, np.array([row[v > 0].mean() if v.any() else own for row, v, own in both])


def gradient_of(
    logits: np.ndarray, neighbours: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    """w (p - onehot), w = p_y / (p_y + q_y) and without any neighbour 1."""
    p, q = of_labels(logits, neighbours, valid)
    weights = np.where(valid.any(axis=1), p / (p + q), 1)
    return weights[:, None] * (softmax(logits) - np.eye(C)[LABELS])


def example(seed: int, scale: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits and those of neighbours, as different as two networks' are."""
    rng = np.random.default_rng(seed)
    return scale * rng.normal(size=(B, C)), scale * rng.normal(size=(B, K, C))


@jax.jit
def loss(
    logits: jax.Array, neighbours: jax.Array, valid: jax.Array, prior: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Values [B] and the gradients of their sum: of logits, neighbours and prior."""

    def total(logits, neighbours, prior):
        values = dde_ce.colliding_effect(logits, LABELS, neighbours, valid, prior)
        return jnp.sum(values), values

    found = jax.grad(total, (0, 1, 2), has_aux=True)
    gradients, values = found(logits, neighbours, prior)
    return values, gradients


@pytest.mark.parametrize("prior", [np.zeros(C), PRIOR])
def test_value_and_gradient(x64: None, prior: np.ndarray) -> None:
    """-log(p/2 + q/2); a prior's gradient is that of shifted logits."""
    logits, neighbours = example(0)
    values, (ours, theirs, _) = loss(logits, neighbours, NEAR, prior)
    shifted = logits + prior, neighbours + prior, NEAR
    p, q = of_labels(*shifted)
    np.testing.assert_allclose(values, -np.log(p / 2 + q / 2), rtol=1e-12)
    np.testing.assert_allclose(ours, gradient_of(*shifted), rtol=1e-11, atol=1e-15)
    np.testing.assert_array_equal(theirs, 0)
    np.testing.assert_allclose(values[3], -np.log(p[3]), rtol=1e-13)
    if prior is PRIOR:
        np.testing.assert_array_equal(np.asarray(ours)[:, ~SEEN], 0)
    else:
        none = jax.jit(dde_ce.colliding_effect)(logits, LABELS, neighbours, NEAR)
        np.testing.assert_allclose(none, values, rtol=1e-14)


def test_neighbours_alike_leave_half_of_the_cross_entropy_s_gradient(x64: None) -> None:
    """q_y = p_y: the value is that of the cross-entropy, the weight one half."""
    logits, _ = example(1)
    neighbours = np.repeat(logits[:, None], K, axis=1)
    everyone = np.ones((B, K))
    values, (ours, _, _) = loss(logits, neighbours, everyone, PRIOR)
    p = softmax(logits + PRIOR)
    np.testing.assert_allclose(values, -np.log(p[np.arange(B), LABELS]), rtol=1e-13)
    alone = p - np.eye(C)[LABELS]
    np.testing.assert_allclose(ours, alone / 2, rtol=1e-12, atol=1e-16)


def test_derivatives_in_the_prior(x64: None) -> None:
    """Meta's alpha: the first, and the mixed second, which the update goes through.

    The prior is in both halves; a row without neighbours must not spoil them.
    """
    logits, neighbours = example(2)
    old = (np.arange(C) < 3).astype(float)

    def shifted(alpha: float) -> tuple[np.ndarray, ...]:
        prior = PRIOR + old * alpha
        return logits + prior, neighbours + prior, NEAR

    def value(alpha: float) -> float:
        p, q = of_labels(*shifted(alpha))
        return float(-np.sum(np.log(p / 2 + q / 2)))

    _, (_, _, prior) = loss(logits, neighbours, NEAR, PRIOR)
    step = 1e-6
    slope = (value(step) - value(-step)) / (2 * step)
    np.testing.assert_allclose(np.sum(prior * old), slope, rtol=1e-7)
    assert abs(slope) > 1e-3

    def gradient(prior: jax.Array) -> jax.Array:
        return loss(logits, neighbours, NEAR, prior)[1][0]

    _, mixed = jax.jvp(gradient, (jnp.asarray(PRIOR),), (jnp.asarray(old),))
    ends = [gradient_of(*shifted(a)) for a in (step, -step)]
    expected = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(mixed, expected, rtol=1e-6, atol=1e-8)


numbers = st.floats(-20, 20, width=32)
rows = st.lists(numbers, min_size=B * C, max_size=B * C)
near = st.lists(numbers, min_size=B * K * C, max_size=B * K * C)


@settings(max_examples=25, deadline=None)
@given(rows, near, st.lists(st.booleans(), min_size=B * K, max_size=B * K), st.data())
def test_between_the_two_likelihoods_whatever_the_neighbours(
    logits: list, neighbours: list, there: list, data: st.DataObject
) -> None:
    """Neither their order matters, nor what stands where there is none."""
    z = np.array(logits, np.float32).reshape(B, C)
    others = np.array(neighbours, np.float32).reshape(B, K, C)
    valid = np.array(there, np.float32).reshape(B, K)
    zeros = np.zeros(C, np.float32)
    values, (ours, _, _) = loss(z, others, valid, zeros)
    p, q = of_labels(z.astype(float), others.astype(float), valid)
    low, high = -np.log(np.maximum(p, q)), -np.log(np.minimum(p, q))
    assert np.all(values >= low - 1e-5) and np.all(values <= high + 1e-4)
    assert np.all(values <= low + np.log(2) + 1e-4)
    order = np.array(data.draw(st.permutations(range(K))))
    garbage = np.where(valid[..., None] > 0, others, 1e30).astype(np.float32)
    again, (theirs, _, _) = loss(z, garbage[:, order], valid[:, order], zeros)
    np.testing.assert_allclose(again, values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("far", [1e4, 1e30])
def test_extreme_logits(dtype: type, far: float) -> None:
    """Probabilities that are 0 in float32, of the image, of its neighbours or both."""
    zeros, prior = np.zeros((B, C)), np.zeros(C, np.float32)
    low = zeros - far * np.eye(C)[LABELS]
    valid = np.ones((B, K), np.float32)
    exact = float(jnp.asarray(far, dtype))
    for ours, theirs, value, weight in (
        (low, zeros, np.log(2 * C), 0),
        (zeros, low, np.log(2 * C), 1),
        (low, low, exact, 0.5),
        (-low, low, np.log(2), 1),
    ):
        z = jnp.asarray(ours, dtype)
        others = jnp.asarray(np.repeat(theirs[:, None], K, axis=1), dtype)
        values, (gradient, *_) = loss(z, others, valid, prior)
        assert values.dtype == jnp.float32 and gradient.dtype == dtype
        np.testing.assert_allclose(values, value, rtol=1e-3)
        found = gradient.astype(float)
        assert np.isfinite(found).all()
        if far < 1e6:  # or log 2, in which one and both of the halves differ, is lost
            expected = weight * (softmax(ours) - np.eye(C)[LABELS])
            np.testing.assert_allclose(found, expected, atol=2e-3)


def test_a_label_that_is_no_class_has_neither_value_nor_gradient(x64: None) -> None:
    logits, neighbours = example(3)
    labels = np.array([-1, 0, C, 2, -7])

    def total(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = dde_ce.colliding_effect(z, labels, neighbours, NEAR)
        return jnp.sum(values), values

    gradient, values = jax.jit(jax.grad(total, has_aux=True))(logits)
    outside = (labels < 0) | (labels >= C)
    np.testing.assert_array_equal(np.asarray(values) == 0, outside)
    np.testing.assert_array_equal(np.all(np.asarray(gradient) == 0, axis=1), outside)


def test_as_a_term() -> None:
    """With neighbours the loss above, without the cross-entropy; both rescaled."""
    logits, neighbours = (x.astype(np.float32) for x in example(4))
    valid = np.array([1.0, 1, 1, 0, 1], np.float32)
    batch = Batch(None, jnp.asarray(LABELS), jnp.asarray(valid))
    prior = jnp.asarray(PRIOR, jnp.float32)
    counts = np.where(SEEN, np.arange(2.0, C + 2), 0).astype(np.float32)
    context = types.SimpleNamespace(log_prior=prior, counts=jnp.asarray(counts))
    alone = {"logits": jnp.asarray(logits)}
    beside = {"neighbour_logits": neighbours, "neighbours_valid": NEAR}
    options = ({}, {"rescale": True}, {"rescale": True, "normalised": True})

    @jax.jit
    def found(student: dict) -> list[tuple[jax.Array, jax.Array]]:
        return [dde_ce.term(student, None, batch, context, **o) for o in options]

    expected, _ = loss(logits, neighbours, NEAR, prior)
    factors = counts[SEEN].mean() / counts[LABELS]
    plain, rescaled, normalised = found(alone | beside)
    for pair, values, weights in (
        (plain, expected, valid),
        (rescaled, expected * factors, valid),
        (normalised, expected, valid * factors),
    ):
        np.testing.assert_allclose(pair[0], values, rtol=1e-5)
        np.testing.assert_allclose(pair[1], weights, rtol=1e-6)

    @jax.jit
    def theirs(student: dict) -> list[tuple[jax.Array, jax.Array]]:
        return [softmax_ce.term(student, None, batch, context, **o) for o in options]

    for pair, other in zip(found(alone), theirs(alone), strict=True):
        jax.tree.map(np.testing.assert_array_equal, pair, other)
    assert dde_ce.READS_LOG_PRIOR and dde_ce.WITHOUT_OLD_CLASSES == "softmax_ce"
    assert not hasattr(dde_ce, "NEEDS_OLD_CLASSES")
