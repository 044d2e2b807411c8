"""Log-priors against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bsce_jax import log_prior
from bsce_jax.log_prior import EXCLUDED

COUNTS = (20.0, 18.0, 500.0, 0.0, 3.0, 0.0)
OLD = np.array([True, True, False, False, True, True])


def counts(dtype: type = np.float64) -> np.ndarray:
    """A new array each time.

    JAX gives back the float64 constant of an earlier program for the same array, also
    where float64 is off by now.
    """
    return np.array(COUNTS, dtype)


def test_uniform() -> None:
    prior = log_prior.uniform(np.array([True, False, True]))
    np.testing.assert_array_equal(prior, np.array([0, EXCLUDED, 0], np.float32))


def test_balanced(x64: None) -> None:
    expected = [np.log(20), np.log(18), np.log(500), EXCLUDED, np.log(3), EXCLUDED]
    np.testing.assert_allclose(log_prior.balanced(counts()), expected, rtol=1e-15)


@pytest.mark.parametrize("alpha", [0.1, 0.25, 1.0, 3.0])
def test_weighted(x64: None, alpha: float) -> None:
    """Eq. 5: the weight of an old class is alpha n_i."""
    prior = np.asarray(log_prior.weighted(counts(), OLD, alpha))
    weights = np.where(OLD, alpha * counts(), counts())
    used = weights > 0
    np.testing.assert_allclose(prior[used], np.log(weights[used]), rtol=1e-14)
    np.testing.assert_array_equal(prior[~used], EXCLUDED)


@pytest.mark.parametrize("epsilon", [0.2, 1, 2.6])
def test_relaxed(x64: None, epsilon: float) -> None:
    """Eq. 6: epsilon for every old class, with images or without."""
    prior = np.asarray(log_prior.relaxed(counts(), OLD, epsilon))
    e = np.log(epsilon)
    np.testing.assert_allclose(
        prior, [e, e, np.log(500), EXCLUDED, e, e], rtol=1e-14, atol=1e-15
    )


def test_nothing_for_old_classes_excludes_them() -> None:
    for prior in (
        log_prior.relaxed(counts(), OLD, 0),
        log_prior.weighted(counts(), OLD, 0),
    ):
        assert (np.asarray(prior)[OLD] <= EXCLUDED).all()
        assert np.isfinite(prior).all()
        np.testing.assert_allclose(prior[2], np.log(500), rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    hnp.arrays(np.float32, 5, elements=st.floats(0, 1e6, width=32)),
    hnp.arrays(bool, 5),
)
def test_alpha_one_changes_no_bit(images: np.ndarray, old: np.ndarray) -> None:
    """Traced as well: one compiled program serves every prior."""
    prior = log_prior.balanced(images)
    compiled = jax.jit(log_prior.with_alpha)(prior, old, jnp.float32(1))
    assert np.asarray(compiled).tobytes() == np.asarray(prior).tobytes()


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_weighted_is_balanced_with_alpha(alpha: float) -> None:
    used = counts() > 0
    weighted = log_prior.weighted(counts(), OLD, alpha)
    added = log_prior.with_alpha(log_prior.balanced(counts()), OLD, alpha)
    np.testing.assert_array_equal(np.asarray(weighted)[used], np.asarray(added)[used])


def test_derivative_by_alpha(x64: None) -> None:
    """1 / alpha on the old classes, nothing on the others, and never NaN."""
    prior = log_prior.balanced(counts())
    derivative = jax.jacobian(log_prior.with_alpha, argnums=2)(prior, OLD, 0.4)
    np.testing.assert_allclose(derivative, OLD / 0.4, rtol=1e-15)
    at_zero = jax.jacobian(log_prior.with_alpha, argnums=2)(prior, OLD, 0.0)
    assert np.isfinite(at_zero).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float16, np.float32])
def test_float32_by_default(dtype: type) -> None:
    given = counts(dtype)
    for prior in (
        log_prior.uniform(OLD),
        log_prior.balanced(given),
        log_prior.weighted(given, OLD, 0.5),
        log_prior.relaxed(given, OLD, 1.0),
        log_prior.with_alpha(given, OLD, 0.5),
    ):
        assert prior.dtype == np.float32 and not prior.weak_type


def test_float64_is_kept(x64: None) -> None:
    for prior in (
        log_prior.balanced(counts()),
        log_prior.weighted(counts(), OLD, 0.5),
        log_prior.relaxed(counts(), OLD, 1.0),
        log_prior.with_alpha(counts(np.float32), OLD, np.float64(0.5)),
    ):
        assert prior.dtype == np.float64


def test_traced_equals_eager() -> None:
    for function, arguments in (
        (log_prior.uniform, (OLD,)),
        (log_prior.balanced, (counts(),)),
        (log_prior.weighted, (counts(), OLD, 0.25)),
        (log_prior.relaxed, (counts(), OLD, 1.0)),
    ):
        eager, traced = function(*arguments), jax.jit(function)(*arguments)
        np.testing.assert_allclose(traced, eager, rtol=1e-6)
