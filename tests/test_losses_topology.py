"""Topology preservation: Pearson's correlation of the cosines of valid pairs."""

import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsce_jax.compute.state import MEMORY, Batch, total_over_devices

module = importlib.import_module("bsce_jax.losses.topology")

N, D = 6, 4
ALL = np.ones(N)


def edges(vectors: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Cosines of the pairs i < j of valid rows, one after another."""
    rows = np.flatnonzero(valid)
    return np.array(
        [
            vectors[i] @ vectors[j] / np.sqrt(vectors[i] @ vectors[i])
            / np.sqrt(vectors[j] @ vectors[j])
            for i, j in itertools.combinations(rows, 2)
        ]
    )  # fmt: skip


def oracle(ours: np.ndarray, theirs: np.ndarray, valid: np.ndarray) -> float:
    """Minus the correlation, 1e-8 being added to both sums of squares."""
    a, b = (edges(x, valid) - edges(x, valid).mean() for x in (ours, theirs))
    return float(-(a @ b) / np.sqrt((a @ a + 1e-8) * (b @ b + 1e-8)))


def pair(seed: int, rows: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Features of now, and others that are not far from them."""
    rng = np.random.default_rng(seed)
    ours = rng.normal(size=(rows, D))
    return ours, 1.5 * ours + 0.7 * rng.normal(size=(rows, D))


@jax.jit
def loss(ours: jax.Array, theirs: jax.Array, valid: jax.Array) -> tuple:
    """The value, and its gradients of both."""
    return jax.value_and_grad(module.topology, (0, 1))(ours, theirs, valid)


@pytest.mark.parametrize("valid", [ALL, np.array([1.0, 0, 1, 1, 0, 1])])
def test_value_and_gradient(x64: None, valid: np.ndarray) -> None:
    ours, theirs = pair(0)
    value, (gradient, other) = loss(ours, theirs, valid)
    np.testing.assert_allclose(value, oracle(ours, theirs, valid), rtol=1e-12)
    plain = np.corrcoef(edges(ours, valid), edges(theirs, valid))[0, 1]
    np.testing.assert_allclose(value, -plain, rtol=1e-6)
    np.testing.assert_array_equal(other, 0)
    expected, step = np.zeros((N, D)), 1e-6
    for at in np.ndindex(N, D):
        moved = [ours.copy(), ours.copy()]
        moved[0][at] += step
        moved[1][at] -= step
        ends = [oracle(x, theirs, valid) for x in moved]
        expected[at] = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)
    assert np.any(gradient[0] != 0)
    np.testing.assert_array_equal(np.asarray(gradient)[valid == 0], 0)


numbers = st.integers(-8, 8)
features = st.lists(numbers, min_size=N * D, max_size=N * D)


@settings(max_examples=60, deadline=None)
@given(features, features, st.lists(st.booleans(), min_size=N, max_size=N), st.data())
def test_a_correlation_whatever_the_features(
    ours: list, theirs: list, there: list, data: st.DataObject
) -> None:
    """In [-1, 1] and finite; only directions and the set of valid images matter."""
    x, y = (np.array(v, np.float32).reshape(N, D) for v in (ours, theirs))
    valid = np.array(there, np.float32)
    value, (gradient, _) = loss(x, y, valid)
    assert -1 - 1e-5 <= value <= 1 + 1e-5
    assert np.isfinite(gradient).all()
    if valid.sum() < 3:  # at most one edge, which cannot vary
        np.testing.assert_array_equal(value, 0)
    order = np.array(data.draw(st.permutations(range(N))))
    garbage = np.where(valid[:, None] > 0, x, 100 * y + 1)
    lengths = 2.0 ** np.arange(N, dtype=np.float32)[:, None]
    again, _ = loss((garbage * lengths)[order], (y * lengths)[order], valid[order])
    np.testing.assert_allclose(again, value, atol=1e-3)


def test_the_same_and_the_opposite_topology(x64: None) -> None:
    ours, _ = pair(1)
    value, (gradient, _) = loss(ours, ours, ALL)
    np.testing.assert_allclose(value, -1, rtol=1e-7)
    np.testing.assert_allclose(gradient, 0, atol=1e-7)
    turned, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(D, D)))
    np.testing.assert_allclose(loss(ours @ turned, ours, ALL)[0], -1, rtol=1e-7)
    # The first two images, once the nearest of three, are now the farthest.
    angles = np.array([[0.0, 1.4, 0.7], [0.0, 0.1, 1.4]])
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=2)
    now, before = np.pad(circle, ((0, 0), (0, N - 3), (0, D - 2)))
    valid = (np.arange(N) < 3).astype(float)
    found = loss(now, before, valid)[0]
    np.testing.assert_allclose(found, oracle(now, before, valid), rtol=1e-10)
    assert found > 0.9


def test_edges_that_do_not_vary_and_dead_features() -> None:
    """Value 0, and derivatives that are finite, also those that Meta takes."""
    ours, theirs = (x.astype(np.float32) for x in pair(3))
    same, valid = np.ones((N, D), np.float32), ALL.astype(np.float32)
    dead = ours * (np.arange(N) > 1)[:, None]

    @jax.jit
    def second(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.jvp(lambda v: loss(v, y, valid)[1][0], (x,), (theirs,))[1]

    for x, y in ((same, theirs), (ours, same), (0 * ours, theirs), (0 * ours, same)):
        value, (gradient, _) = loss(x, y, valid)
        np.testing.assert_allclose(value, 0, atol=1e-2)
        assert np.isfinite(gradient).all() and np.isfinite(second(x, y)).all()
    value, (gradient, _) = loss(dead, theirs, valid)
    assert abs(value) > 0.1
    assert np.isfinite(gradient).all() and np.isfinite(second(dead, theirs)).all()
    value, (gradient, _) = loss(ours, theirs, 0 * valid)
    assert value == 0 and not np.any(gradient)


def test_half_precision_is_correlated_in_float32() -> None:
    ours, theirs = (jnp.asarray(x, jnp.bfloat16) for x in pair(4))
    value, (gradient, _) = loss(ours, theirs, ALL.astype(np.float32))
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    wide = (x.astype(jnp.float32) for x in (ours, theirs))
    exact, _ = loss(*wide, ALL.astype(np.float32))
    np.testing.assert_allclose(value, exact, rtol=1e-6)


def share(
    ours: jax.Array, theirs: jax.Array, valid: jax.Array, axis: str | None
) -> jax.Array:
    """A device's share of the term, as a training step adds it up."""
    memory = Batch(None, None, valid, axis)
    batch = Batch(None, None, jnp.zeros(1), axis, {MEMORY: memory})
    student, teacher = {"vertices": ours}, {"vertices": theirs}
    values, weights = module.term(student, teacher, batch, None)
    total = total_over_devices(jnp.sum(weights), axis)
    return jnp.sum(values * weights) / total


def test_eight_devices_are_one(x64: None) -> None:
    """Value and gradient, with rows that fill up on several devices and one of them."""
    ours, theirs = pair(5, 16)
    valid = (np.arange(16) < 13).astype(float)
    valid[[2, 6, 7]] = 0  # the fourth device and the last have no valid row
    ours[valid == 0] = 1e3
    one = jax.jit(jax.value_and_grad(functools.partial(share, axis=None)))
    value, gradient = one(ours, theirs, valid)
    np.testing.assert_allclose(value, oracle(ours, theirs, valid), rtol=1e-12)
    parts = [x.reshape(8, 2, *x.shape[1:]) for x in (ours, theirs, valid)]
    step = jax.pmap(jax.value_and_grad(functools.partial(share, axis="d")), "d")
    shares, gradients = step(*parts)
    np.testing.assert_allclose(np.sum(np.asarray(shares)), value, rtol=1e-12)
    found = np.asarray(gradients).reshape(ours.shape)
    np.testing.assert_allclose(found, gradient, rtol=1e-9, atol=1e-13)
    np.testing.assert_array_equal(np.any(found != 0, axis=1), valid > 0)
    assert module.NEEDS_OLD_CLASSES and module.NEEDS_TEACHER
