"""Classification and distillation losses: formulas, original code, invariants."""

import types
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bsce_jax import log_prior, losses
from bsce_jax.config import terms
from bsce_jax.errors import UserError
from bsce_jax.losses import kd, softmax_ce

Parity = Callable[[str], Mapping[str, np.ndarray]]
B, C = 6, 5
LABELS = np.array([0, 4, 2, 1, 3, 0])

logits_arrays = hnp.arrays(np.float64, (B, C), elements=st.floats(-30, 30))
counts_arrays = hnp.arrays(np.int64, C, elements=st.integers(1, 1300))


def softmax(scores: np.ndarray) -> np.ndarray:
    """NumPy, float64."""
    exp = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def mean_and_gradient(
    function: Callable, logits: np.ndarray, *arguments: object
) -> tuple[jax.Array, jax.Array]:
    """Mean of a loss over the batch, and its gradient by the logits."""
    return jax.value_and_grad(lambda z: jnp.mean(function(z, *arguments)))(
        jnp.asarray(logits)
    )


@settings(max_examples=25, deadline=None)
@given(logits_arrays, counts_arrays)
def test_cross_entropy_oracle(logits: np.ndarray, counts: np.ndarray) -> None:
    """Eq. 3, -log(n_y e^z_y / sum n_k e^z_k), and its gradient q - onehot(y)."""
    with jax.enable_x64(True):
        prior = log_prior.balanced(counts.astype(np.float64))
        values = losses.softmax_cross_entropy(jnp.asarray(logits), LABELS, prior)
        _, gradient = mean_and_gradient(
            losses.softmax_cross_entropy, logits, LABELS, prior
        )
        weights = counts[None, :] * np.exp(logits)
        picked = weights[np.arange(B), LABELS]
        np.testing.assert_allclose(
            values, np.log(weights.sum(axis=1) / picked), rtol=1e-12, atol=1e-12
        )
        q = weights / weights.sum(axis=1, keepdims=True)
        expected = (q - np.eye(C)[LABELS]) / B
        np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-14)


def test_without_prior_is_plain_softmax() -> None:
    logits = np.random.default_rng(0).normal(size=(B, C)).astype(np.float32)
    expected = -np.log(softmax(logits.astype(np.float64)))[np.arange(B), LABELS]
    values = losses.softmax_cross_entropy(jnp.asarray(logits), LABELS)
    np.testing.assert_allclose(values, expected, rtol=1e-5)


VARIANTS = ("counts", "alpha0.25", "eps1", "eps0_newonly")


def variant_prior(variant: str, counts: np.ndarray) -> jax.Array:
    """The same variant by our own function, from the images a class has."""
    old = np.arange(len(counts)) < 50
    images = np.where(old, 20, 500).astype(counts.dtype)
    return {
        "counts": lambda: log_prior.balanced(counts),
        "alpha0.25": lambda: log_prior.weighted(images, old, 0.25),
        "eps1": lambda: log_prior.relaxed(images, old, 1),
        "eps0_newonly": lambda: log_prior.relaxed(images, old, 0),
    }[variant]()


def check_balanced_softmax(
    file: Mapping[str, np.ndarray], variant: str, dtype: type, rtol: float
) -> None:
    logits = jnp.asarray(file["in_logits"].astype(dtype))
    labels = file[f"in_labels_{variant}"]
    prior = variant_prior(variant, file[f"in_counts_{variant}"].astype(dtype))
    values = losses.softmax_cross_entropy(logits, labels, prior)
    mean, gradient = mean_and_gradient(
        losses.softmax_cross_entropy, logits, labels, prior
    )
    assert values.dtype == dtype
    np.testing.assert_allclose(values, file[f"out_none_{variant}"], rtol=rtol)
    np.testing.assert_allclose(mean, file[f"out_mean_{variant}"], rtol=rtol)
    np.testing.assert_allclose(values.sum(), file[f"out_sum_{variant}"], rtol=rtol)
    expected = file[f"grad_logits_{variant}"]
    atol = rtol * np.abs(expected).max()
    np.testing.assert_allclose(gradient, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("variant", VARIANTS)
def test_balanced_softmax_parity(parity: Parity, variant: str) -> None:
    check_balanced_softmax(parity("balanced_softmax"), variant, np.float32, 1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_balanced_softmax_parity_float64(
    parity: Parity, x64: None, variant: str
) -> None:
    check_balanced_softmax(parity("balanced_softmax"), variant, np.float64, 1e-12)


@settings(max_examples=25, deadline=None)
@given(logits_arrays, counts_arrays, st.floats(-20, 20))
def test_only_ratios_of_the_prior_matter(
    logits: np.ndarray, counts: np.ndarray, shift: float
) -> None:
    with jax.enable_x64(True):
        prior = log_prior.balanced(counts.astype(np.float64))
        plain = losses.softmax_cross_entropy(jnp.asarray(logits), LABELS, prior)
        shifted = losses.softmax_cross_entropy(
            jnp.asarray(logits), LABELS, prior + shift
        )
        np.testing.assert_allclose(shifted, plain, rtol=1e-10, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(np.float32, (B, C), elements=st.floats(-1e4, 1e4, width=32)))
def test_excluded_classes_get_no_gradient(logits: np.ndarray) -> None:
    """Exactly none, and no NaN, even where the label itself is excluded (padding)."""
    seen = np.array([True, True, True, False, False])
    prior = log_prior.uniform(seen)
    values = losses.softmax_cross_entropy(jnp.asarray(logits), LABELS, prior)
    assert np.isfinite(values).all()
    allowed = LABELS % 3  # classes 0 to 2
    _, gradient = mean_and_gradient(
        losses.softmax_cross_entropy, logits, allowed, prior
    )
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(np.asarray(gradient)[:, ~seen], 0)


@settings(max_examples=25, deadline=None)
@given(logits_arrays)
def test_relaxed_zero_is_softmax_of_new_classes(logits: np.ndarray) -> None:
    """With equal counts, Eq. 6 at epsilon 0 sees the new classes only."""
    with jax.enable_x64(True):
        old = np.arange(C) < 2
        prior = log_prior.relaxed(np.full(C, 500.0), old, 0)
        new_labels = 2 + LABELS % 3
        values = losses.softmax_cross_entropy(jnp.asarray(logits), new_labels, prior)
        expected = -np.log(softmax(logits[:, 2:]))[np.arange(B), new_labels - 2]
        np.testing.assert_allclose(values, expected, rtol=1e-10, atol=1e-12)


def test_label_outside_the_classes_is_ignored() -> None:
    logits = np.ones((2, C), np.float32)
    for label in (-1, C):
        mean, gradient = mean_and_gradient(
            losses.softmax_cross_entropy, logits, np.array([label, label])
        )
        assert mean == 0 and not np.any(gradient)


def check_distillation(
    file: Mapping[str, np.ndarray], dtype: type, rtol: float
) -> None:
    """PyCIL's code has no T^2; LUCIR's total is cross-entropy + 0.25 distillation."""
    logits = jnp.asarray(file["in_logits"].astype(dtype))
    teacher = np.full(logits.shape, 77, dtype)  # what lies beyond must not matter
    teacher[:, :50] = file["in_old_logits"]
    old = np.arange(60) < 50

    def distillation(z: jax.Array) -> jax.Array:
        return losses.knowledge_distillation(z, jnp.asarray(teacher), old, 2.0)

    def lucir(z: jax.Array) -> jax.Array:
        labels = file["in_labels"]
        return losses.softmax_cross_entropy(z, labels) + 0.25 * distillation(z)

    mean, gradient = mean_and_gradient(distillation, logits)
    _, total = mean_and_gradient(lucir, logits)
    np.testing.assert_allclose(mean, file["out_eq2"], rtol=rtol)
    np.testing.assert_allclose(mean / 4, file["out_pycil_kd"], rtol=rtol)
    for ours, theirs in (
        (gradient, file["grad_eq2"]),
        (gradient / 4, file["grad_pycil_kd"]),
        (total, file["grad_lucir_total"]),
    ):
        atol = rtol * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)


def test_distillation_parity(parity: Parity) -> None:
    check_distillation(parity("kd_t2"), np.float32, 1e-5)


def test_distillation_parity_float64(parity: Parity, x64: None) -> None:
    check_distillation(parity("kd_t2"), np.float64, 1e-12)


@settings(max_examples=25, deadline=None)
@given(logits_arrays, logits_arrays, st.sampled_from([1.0, 2.0, 5.0]))
def test_distillation_oracle(
    logits: np.ndarray, teacher: np.ndarray, temperature: float
) -> None:
    """Eq. 2 by hand on old classes that are no prefix, and T (p - q) as gradient."""
    with jax.enable_x64(True):
        old = np.array([True, False, True, True, False])
        p = softmax(logits[:, old] / temperature)
        q = softmax(teacher[:, old] / temperature)
        arguments = (jnp.asarray(teacher), old, temperature)
        values = losses.knowledge_distillation(jnp.asarray(logits), *arguments)
        expected = -(temperature**2) * (q * np.log(p)).sum(axis=1)
        np.testing.assert_allclose(values, expected, rtol=1e-10, atol=1e-12)
        _, gradient = mean_and_gradient(
            losses.knowledge_distillation, logits, *arguments
        )
        np.testing.assert_allclose(
            np.asarray(gradient)[:, old], temperature * (p - q) / B, atol=1e-12
        )
        np.testing.assert_array_equal(np.asarray(gradient)[:, ~old], 0)


def test_distillation_is_zero_without_old_classes() -> None:
    logits = np.random.default_rng(1).normal(size=(B, C)).astype(np.float32)
    mean, gradient = mean_and_gradient(
        losses.knowledge_distillation,
        logits,
        jnp.asarray(logits[::-1]),
        np.zeros(C, bool),
    )
    assert mean == 0
    np.testing.assert_array_equal(gradient, 0)


def test_no_gradient_into_the_teacher() -> None:
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(B, C)), jnp.float32)
    gradient = jax.grad(
        lambda t: jnp.sum(losses.knowledge_distillation(logits, t, np.ones(C, bool)))
    )(logits + 1)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_computed_in_float32(dtype: type) -> None:
    """Half-precision logits, large ones too, lose nothing but their own rounding."""
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(B, C)) * 1000, dtype)
    teacher = logits[::-1]
    counts = np.array([500, 20, 20, 500, 1])
    old = counts < 500
    exact = logits.astype(jnp.float32), teacher.astype(jnp.float32)
    prior = log_prior.balanced(counts)
    for ours, expected in (
        (
            losses.softmax_cross_entropy(logits, LABELS),
            losses.softmax_cross_entropy(exact[0], LABELS),
        ),
        (
            losses.softmax_cross_entropy(logits, LABELS, prior),
            losses.softmax_cross_entropy(exact[0], LABELS, prior),
        ),
        (
            losses.knowledge_distillation(logits, teacher, old),
            losses.knowledge_distillation(*exact, old),
        ),
    ):
        assert ours.dtype == jnp.float32
        assert np.isfinite(ours).all()
        np.testing.assert_array_equal(ours, expected)
    _, gradient = mean_and_gradient(losses.knowledge_distillation, logits, teacher, old)
    assert gradient.dtype == dtype and np.isfinite(gradient.astype(np.float32)).all()


def test_terms() -> None:
    """A term is its function, weighted by the valid rows."""
    rng = np.random.default_rng(4)
    student = {"logits": jnp.asarray(rng.normal(size=(B, C)), jnp.float32)}
    teacher = {"logits": jnp.asarray(rng.normal(size=(B, C)), jnp.float32)}
    batch = types.SimpleNamespace(
        labels=LABELS, valid=jnp.asarray([1, 1, 1, 1, 0, 0], jnp.float32)
    )
    old = np.arange(C) < 3
    prior = log_prior.weighted(np.full(C, 20), old, 0.5)
    context = types.SimpleNamespace(log_prior=prior, old=old)
    values, weights = softmax_ce.term(student, None, batch, context)
    expected = losses.softmax_cross_entropy(student["logits"], LABELS, prior)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(weights, batch.valid)
    for options in ({}, {"temperature": 3.0}):
        values, weights = kd.term(student, teacher, batch, context, **options)
        expected = losses.knowledge_distillation(
            student["logits"], teacher["logits"], old, options.get("temperature", 2.0)
        )
        np.testing.assert_array_equal(values, expected)
        np.testing.assert_array_equal(weights, batch.valid)


# Table 6: loss rescaling and the separated softmax.


def test_loss_rescaling_weighs_samples_by_their_class() -> None:
    """w_y = (sum of counts / classes) / n_y; the mean over the batch or sum(w)."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(B, C)).astype(np.float32)
    counts = np.array([20, 20, 500, 500, 0], np.float32)
    labels = np.array([0, 2, 2, 1, 3, 0])
    valid = np.array([1, 1, 1, 1, 1, 0], np.float32)
    batch = types.SimpleNamespace(labels=labels, valid=valid)
    prior = np.where(counts > 0, 0, log_prior.EXCLUDED).astype(np.float32)
    context = types.SimpleNamespace(log_prior=prior, counts=counts)
    z = logits.astype(float)[:, :4]
    ce = np.log(np.exp(z).sum(axis=1)) - z[np.arange(B), labels]
    w = (1040 / 4) / counts[labels]
    for normalised, expected in (
        (False, (ce * w)[:5].mean()),
        (True, (ce * w)[:5].sum() / w[:5].sum()),
    ):
        values, weights = softmax_ce.term(
            {"logits": logits},
            None,
            batch,
            context,
            rescale=True,
            normalised=normalised,
        )
        found = float((values * weights).sum() / weights.sum())
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    # An epoch over the training set has a mean weight of 1.
    rescaled = np.asarray(softmax_ce.rescaling(jnp.asarray(counts)))
    np.testing.assert_allclose((rescaled * counts).sum() / counts.sum(), 1, rtol=1e-6)


def test_separated_softmax_oracle(x64: None) -> None:
    """CE over the old columns for old labels, over the new ones for new labels."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(7, C))
    labels = np.array([0, 1, 2, 3, 1, 2, 4])
    old, new = np.arange(C) < 2, (np.arange(C) >= 2) & (np.arange(C) < 4)
    values = losses.separated_softmax_cross_entropy(
        jnp.asarray(logits), labels, old, new
    )
    expected = []
    for z, y in zip(logits, labels, strict=True):
        group = old if old[y] else new
        inside = np.log(np.exp(z[group]).sum()) - z[y]
        expected.append(inside if old[y] or new[y] else 0.0)
    np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-12)
    gradient = jax.grad(
        lambda z: losses.separated_softmax_cross_entropy(z, labels, old, new).sum()
    )(jnp.asarray(logits))
    for row, y in zip(np.asarray(gradient), labels, strict=True):
        other = new if old[y] else old
        np.testing.assert_array_equal(row[other], 0)  # they do not compete
        assert np.any(row) == (old[y] or new[y])


def test_rescaling_weighs_every_classification_loss_alike() -> None:
    rng = np.random.default_rng(2)
    counts = np.array([20, 20, 500, 500, 0], np.float32)
    seen, old = counts > 0, np.arange(C) < 2
    batch = types.SimpleNamespace(
        labels=np.array([0, 2, 2, 1, 3, 0]), valid=np.array([1, 1, 1, 1, 1, 0.0])
    )
    prior = np.where(seen, 0, log_prior.EXCLUDED).astype(np.float32)
    context = types.SimpleNamespace(log_prior=prior, counts=counts, seen=seen, old=old)
    z = rng.normal(size=(B, C)).astype(np.float32)
    student = {"logits": z, "similarities": z, "scale": np.float32(1)}
    for name in ("softmax_ce", "separated_softmax_ce", "nca"):
        term = terms.module(name).term
        plain, _ = term(student, None, batch, context)
        values, weights = term(student, None, batch, context, rescale=True)
        by_hand = plain * (1040 / 4 / counts[batch.labels])
        np.testing.assert_allclose(values, by_hand, rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(weights, batch.valid)
        values, weights = term(
            student, None, batch, context, rescale=True, normalised=True
        )
        np.testing.assert_allclose(values, plain, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(
            weights, batch.valid * (1040 / 4 / counts[batch.labels]), rtol=1e-6
        )


def test_labels_that_are_no_vector_are_refused():
    logits = jnp.zeros((4, 3))
    for labels in (jnp.eye(4, 3), jnp.zeros((4, 1), jnp.int32)):
        with pytest.raises(UserError, match="labels have shape"):
            losses.softmax_cross_entropy(logits, labels)
