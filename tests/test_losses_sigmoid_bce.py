"""iCaRL's binary cross-entropies: authors' port, formula, extremes, padding."""

import importlib
import types
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bsce_jax.compute.state import Batch
from bsce_jax.errors import UserError

module = importlib.import_module("bsce_jax.losses.sigmoid_bce")
function = jax.jit(module.sigmoid_binary_cross_entropy)

Parity = Callable[[str], Mapping[str, np.ndarray]]
B, C = 5, 7
SEEN = np.arange(C) < 6
OLD = np.arange(C) < 4
LABELS = np.array([0, 5, 3, 4, 4])
arrays = hnp.arrays(np.float64, (B, C), elements=st.floats(-20, 20))
fractions = hnp.arrays(np.float64, (B, C), elements=st.floats(0, 1))


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def loss_and_gradient(
    student: dict, teacher: dict | None, labels: np.ndarray, valid: np.ndarray, **masks
) -> tuple[jax.Array, jax.Array]:
    batch = Batch(None, jnp.asarray(labels), jnp.asarray(valid))
    context = types.SimpleNamespace(**{k: jnp.asarray(v) for k, v in masks.items()})

    def loss(logits: jax.Array) -> jax.Array:
        values, weights = module.term({"logits": logits}, teacher, batch, context)
        return jnp.sum(values * weights) / jnp.sum(weights)

    return jax.jit(jax.value_and_grad(loss))(student["logits"])


@pytest.mark.parametrize("dtype,rtol", [(np.float64, 1e-13), (np.float32, 1e-5)])
@pytest.mark.parametrize("stage", ["step0", "incremental"])
def test_the_authors_port(parity: Parity, stage: str, dtype: type, rtol: float) -> None:
    """All 60 classes seen, of 64; also with 40 columns more that nobody has seen."""
    file = parity("icarl_bce")
    classes = file["in_logits"].shape[1]
    old = file["in_old_logits"].shape[1] if stage == "incremental" else 0
    extra = np.full((len(file["in_labels"]), 40), 3.0)
    logits = np.concatenate([file["in_logits"], extra], axis=1).astype(dtype)
    teacher = None
    if old:
        theirs = np.full_like(logits, -2)
        theirs[:, :old] = file["in_old_logits"]
        teacher = {"logits": theirs}
    position = np.arange(logits.shape[1])
    with jax.enable_x64(dtype == np.float64):
        loss, gradient = loss_and_gradient(
            {"logits": jnp.asarray(logits)},
            teacher,
            file["in_labels"],
            np.ones(len(logits), dtype),
            old=position < old,
            seen=position < classes,
        )
    assert loss.dtype == dtype
    np.testing.assert_allclose(loss, file[f"out_{stage}"], rtol=rtol)
    expected = file[f"grad_logits_{stage}"]
    np.testing.assert_allclose(gradient[:, :classes], expected, rtol=rtol, atol=1e-9)
    np.testing.assert_array_equal(gradient[:, classes:], 0)


derivatives = jax.jit(jax.grad(lambda z, t: jnp.sum(function(z, t, SEEN)), (0, 1)))


@settings(max_examples=25, deadline=None)
@given(arrays, fractions)
def test_oracle(logits: np.ndarray, targets: np.ndarray) -> None:
    p = sigmoid(logits)
    each = targets * np.logaddexp(0, -logits) + (1 - targets) * np.logaddexp(0, logits)
    with jax.enable_x64(True):
        values = function(logits, targets, SEEN)
        np.testing.assert_allclose(values, each[:, SEEN].mean(axis=1), rtol=1e-12)
        gradient, by_targets = derivatives(logits, targets)
        expected = np.where(SEEN[None, :], (p - targets) / SEEN.sum(), 0)
        np.testing.assert_allclose(gradient, expected, atol=1e-14)
        np.testing.assert_array_equal(by_targets, 0)


def test_large_logits_and_no_class() -> None:
    logits = jnp.asarray([[0.0, 200.0, -200.0, 1e4, -30.0]])
    targets = jnp.asarray([[0.25, 1.0, 0.0, 0.0, 0.0]])
    seen = jnp.ones(5, bool)
    expected = [np.log(2), 0, 0, 1e4, np.exp(-30.0)]
    for i, value in enumerate(expected):
        only = np.arange(5) == i
        np.testing.assert_allclose(function(logits, targets, only)[0], value, rtol=1e-5)
    derivative = jax.grad(lambda z: jnp.sum(function(z, targets, seen)))
    both = jax.jit(lambda z: jax.jvp(derivative, (z,), (jnp.ones_like(z),)))
    gradient, second = both(logits)
    np.testing.assert_allclose(gradient[0, :4] * 5, [0.25, 0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(second[0] * 5, [0.25, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(function(logits, targets, ~seen), 0)


def test_unseen_classes_and_padding_rows_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    logits, theirs = rng.normal(size=(2, B, C)).astype(np.float32)
    valid = np.array([1, 1, 1, 0, 0], np.float32)
    masks = {"old": OLD, "seen": SEEN}
    found = []
    for garbage in (False, True):
        student, teacher, labels = logits.copy(), theirs.copy(), LABELS.copy()
        if garbage:
            student[:, 6], teacher[:, 4:] = 1e6, -1e6
            student[3:], teacher[4], labels[3:] = -1e6, 0, [-1, C]
        found.append(
            loss_and_gradient(
                {"logits": student}, {"logits": teacher}, labels, valid, **masks
            )
        )
    jax.tree.map(np.testing.assert_array_equal, *found)
    loss, gradient = found[0]
    targets = np.where(OLD[None, :], sigmoid(theirs), np.eye(C)[LABELS])
    p = sigmoid(logits)
    each = -targets * np.log(p) - (1 - targets) * np.log(1 - p)
    np.testing.assert_allclose(loss, each[:3, SEEN].mean(), rtol=1e-5)
    assert np.any(gradient[:3]) and not np.any(gradient[3:])


def test_the_authors_divide_by_all_classes() -> None:
    rng = np.random.default_rng(5)
    batch = Batch(None, jnp.asarray(LABELS), jnp.ones(B))
    context = types.SimpleNamespace(old=jnp.asarray(OLD), seen=jnp.asarray(SEEN))
    student = {"logits": jnp.asarray(rng.normal(size=(B, C)))}
    seen, _ = module.term(student, None, batch, context)
    found, _ = module.term(student, None, batch, context, outputs="all")
    np.testing.assert_allclose(found, seen * 6 / 7, rtol=1e-6)
    with pytest.raises(UserError, match="outputs='new', allowed: seen, all"):
        module.term(student, None, batch, context, outputs="new")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_computed_in_float32(dtype: type) -> None:
    """The teacher's probabilities too, which half precision would round."""
    rng = np.random.default_rng(1)
    outputs = [{"logits": jnp.asarray(rng.normal(size=(B, C)), dtype)} for _ in "ab"]
    batch = Batch(None, jnp.asarray(LABELS), jnp.ones(B))
    context = types.SimpleNamespace(old=jnp.asarray(OLD), seen=jnp.asarray(SEEN))
    values, _ = module.term(*outputs, batch, context)
    assert values.dtype == jnp.float32
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), outputs)
    np.testing.assert_array_equal(values, module.term(*exact, batch, context)[0])


def test_runs_in_the_base_step() -> None:
    assert not hasattr(module, "NEEDS_OLD_CLASSES")
    assert not hasattr(module, "CLASSIFICATION")
