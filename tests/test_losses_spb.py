"""SPB's losses and BiC's penalty: formulas, gradients, masks, padding, devices."""

import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsce_jax import log_prior
from bsce_jax.compute.state import Batch, total_over_devices
from bsce_jax.errors import UserError
from bsce_jax.log_prior import EXCLUDED

columns_ce = importlib.import_module("bsce_jax.losses.columns_ce")
feature_mse = importlib.import_module("bsce_jax.losses.feature_mse")
rotation_ce = importlib.import_module("bsce_jax.losses.rotation_ce")
shift_l2 = importlib.import_module("bsce_jax.losses.shift_l2")

B, C, D, R = 6, 8, 5, 4
OLD = np.array([True, False, True, True, False, False, False, False])
SEEN = np.arange(C) < 7
NEW = SEEN & ~OLD
LABELS = np.array([4, 1, 0, 6, 5, 1])  # the third is of an old class
VALID = np.array([1.0, 1, 1, 1, 0, 0])


def log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def cross_entropy(
    logits: np.ndarray, labels: np.ndarray, chosen: np.ndarray
) -> np.ndarray:
    """On the chosen columns cut out; 0 for a label that is not among them."""
    places = np.flatnonzero(chosen)
    scores = log_softmax(logits[:, places])
    return np.array(
        [
            -scores[i, np.flatnonzero(places == y)[0]] if chosen[y] else 0
            for i, y in enumerate(labels)
        ]
    )


def context(old: np.ndarray = OLD) -> types.SimpleNamespace:
    """With a log-prior of no meaning, which only softmax_ce may read."""
    prior = jnp.where(SEEN, jnp.arange(C), EXCLUDED)
    return types.SimpleNamespace(
        old=jnp.asarray(old), seen=jnp.asarray(SEEN), log_prior=prior
    )


def batch(labels: np.ndarray = LABELS) -> Batch:
    return Batch(None, jnp.asarray(labels), jnp.asarray(VALID))


def mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sum(values * weights) / jnp.sum(weights)


@pytest.mark.parametrize("columns", ["new", "seen"])
@pytest.mark.parametrize("heads", [0, R])
def test_columns_ce(x64: None, columns: str, heads: int) -> None:
    """Value and gradient; the mean over the heads; old samples only under "seen"."""
    logits = 3 * np.random.default_rng(0).normal(size=(B, max(heads, 1), C))
    chosen = NEW if columns == "new" else SEEN
    student = {"perspectives": logits} if heads else {"logits": logits[:, 0]}
    if heads:
        student["logits"] = np.zeros((B, C))
    values, weights = jax.jit(
        lambda outputs: columns_ce.term(
            outputs, None, batch(), context(), columns=columns
        )
    )(student)
    each = [cross_entropy(logits[:, r], LABELS, chosen) for r in range(logits.shape[1])]
    np.testing.assert_allclose(values, np.mean(each, axis=0), rtol=1e-12)
    np.testing.assert_array_equal(weights, VALID * chosen[LABELS])
    if heads:
        return
    gradient = jax.jit(
        jax.grad(
            lambda z: jnp.sum(
                columns_ce.columns_cross_entropy(z, LABELS, jnp.asarray(chosen))
            )
        )
    )(logits[:, 0])
    p = np.exp(log_softmax(np.where(chosen, logits[:, 0], EXCLUDED)))
    expected = np.where(chosen[LABELS][:, None], p - np.eye(C)[LABELS], 0)
    np.testing.assert_allclose(gradient, expected, atol=1e-13)
    np.testing.assert_array_equal(np.asarray(gradient)[:, ~chosen], 0)


def test_columns_ce_without_old_classes_is_the_softmax_cross_entropy() -> None:
    softmax_ce = importlib.import_module("bsce_jax.losses.softmax_ce")
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(B, C)), jnp.float32)
    base = context(np.zeros(C, bool))
    base.log_prior = log_prior.uniform(jnp.asarray(SEEN))
    expected, _ = softmax_ce.term({"logits": logits}, None, batch(), base)
    for columns in ("new", "seen"):
        values, weights = columns_ce.term(
            {"logits": logits}, None, batch(), base, columns=columns
        )
        np.testing.assert_array_equal(values, expected)
        np.testing.assert_array_equal(weights, VALID)


def test_columns_ce_by_default_and_by_mistake() -> None:
    student = {"logits": jnp.ones((B, C))}
    default, _ = columns_ce.term(student, None, batch(), context())
    np.testing.assert_allclose(default[0], np.log(NEW.sum()), rtol=1e-6)
    plain = columns_ce.columns_cross_entropy(student["logits"], LABELS, NEW)
    np.testing.assert_array_equal(default, plain)
    with pytest.raises(UserError, match="columns='old', allowed: new, seen"):
        columns_ce.term(student, None, batch(), context(), columns="old")
    for flag in ("CLASSIFICATION", "WITHOUT_OLD_CLASSES", "NEEDS_OLD_CLASSES"):
        assert not hasattr(columns_ce, flag)


def test_feature_mse(x64: None) -> None:
    """2 - 2 cos, and its gradient -2 (t - cos f) / |features|."""
    x, y = np.random.default_rng(2).normal(size=(2, B, D))
    length = np.linalg.norm(x, axis=1, keepdims=True)
    f, t = x / length, y / np.linalg.norm(y, axis=1, keepdims=True)
    cosine = (f * t).sum(axis=1, keepdims=True)
    function = jax.jit(feature_mse.feature_mse)
    np.testing.assert_allclose(function(x, y), 2 - 2 * cosine[:, 0], atol=1e-14)
    gradients = jax.jit(jax.grad(lambda a, b: jnp.sum(function(a, b)), (0, 1)))
    ours, theirs = gradients(x, y)
    np.testing.assert_allclose(ours, -2 * (t - cosine * f) / length, atol=1e-13)
    np.testing.assert_array_equal(theirs, 0)
    np.testing.assert_allclose(function(x, x), 0, atol=1e-30)
    np.testing.assert_allclose(function(-x, x), 4, rtol=1e-14)


def test_feature_mse_is_finite_at_zero() -> None:
    zero, other = jnp.zeros((B, D)), jnp.ones((B, D))

    @jax.jit
    def everything(x: jax.Array, y: jax.Array) -> tuple:
        gradient = jax.grad(lambda x: jnp.sum(feature_mse.feature_mse(x, y)))
        return feature_mse.feature_mse(x, y), *jax.jvp(gradient, (x,), (other,))

    for pair, value in (((zero, other), 1), ((other, zero), 1), ((zero, zero), 0)):
        values, *derivatives = everything(*pair)
        np.testing.assert_allclose(values, value, rtol=1e-6)
        for found in derivatives:
            assert np.isfinite(found).all()


def test_feature_mse_of_views(x64: None) -> None:
    """The mean over the rotations; "features" are not looked at then."""
    ours, theirs = np.random.default_rng(3).normal(size=(2, B, R, D))
    one = [
        feature_mse.term({"features": ours[:, r]}, {"features": theirs[:, r]}, b, None)
        for r, b in enumerate([batch()] * R)
    ]
    values, weights = feature_mse.term(
        {"views": ours, "features": ours[:, 1]},
        {"views": theirs, "features": theirs[:, 2]},
        batch(),
        None,
    )
    np.testing.assert_allclose(values, np.mean([v for v, _ in one], axis=0), rtol=1e-13)
    cosines = (ours * theirs).sum(-1)
    cosines /= np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    np.testing.assert_allclose(values, 2 - 2 * cosines.mean(axis=1), rtol=1e-12)
    np.testing.assert_array_equal(weights, VALID)
    assert feature_mse.NEEDS_OLD_CLASSES


def test_rotation_ce(x64: None) -> None:
    logits = 3 * np.random.default_rng(4).normal(size=(B, R, R))
    values, transpose = jax.vjp(rotation_ce.rotation_cross_entropy, logits)
    each = log_softmax(logits)
    expected = -(sum(each[:, r, r] for r in range(R))) / R
    np.testing.assert_allclose(values, expected, rtol=1e-13)
    gradient = (np.exp(each) - np.eye(R)[None]) / R
    np.testing.assert_allclose(
        transpose(jnp.ones_like(values))[0], gradient, atol=1e-15
    )
    values, weights = rotation_ce.term({"rotations": logits}, None, batch(), None)
    np.testing.assert_allclose(values, expected, rtol=1e-13)
    np.testing.assert_array_equal(weights, VALID)
    assert not hasattr(rotation_ce, "NEEDS_OLD_CLASSES")


def test_padding_rows_do_not_matter() -> None:
    rng = np.random.default_rng(5)
    shapes = {"logits": (B, C), "features": (B, D), "rotations": (B, R, R)}
    student, teacher = (
        {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
        for _ in range(2)
    )
    garbage = {k: np.copy(x) for k, x in student.items()}
    for x in garbage.values():
        x[4], x[5] = 0, 1e6
    labels = np.where(VALID > 0, LABELS, [0] * 4 + [-1, C])

    def losses(student: dict, labels: np.ndarray) -> tuple[jax.Array, list[jax.Array]]:
        each = [
            mean(*module.term(student, teacher, batch(labels), context()))
            for module in (columns_ce, feature_mse, rotation_ce)
        ]
        return sum(each), each

    gradients = jax.jit(jax.grad(losses, has_aux=True))
    expected, found = gradients(student, LABELS), gradients(garbage, labels)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all(loss > 0 for loss in found[1])
    for gradient in found[0].values():  # each loss has an output of its own
        assert np.any(gradient[:4]) and not np.any(gradient[4:])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_computed_in_float32(dtype: type) -> None:
    rng = np.random.default_rng(6)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * 9, dtype)

    theirs = random(B, D)
    for function, x in (
        (lambda z: columns_ce.columns_cross_entropy(z, LABELS, NEW), random(B, C)),
        (lambda f: feature_mse.feature_mse(f, theirs), random(B, D)),
        (rotation_ce.rotation_cross_entropy, random(B, R, R)),
        (shift_l2.shift_l2, random()),
    ):
        values = jax.jit(function)(x)
        assert values.dtype == jnp.float32
        exact = jax.jit(function)(x.astype(jnp.float32))
        np.testing.assert_array_equal(values, exact)


def test_shift_l2_on_one_device_and_on_eight() -> None:
    """Half the square, once, whatever the number of devices; its gradient the shift."""

    def share(shift: jax.Array, axis: str | None) -> jax.Array:
        values, weights = shift_l2.term({"shift": shift}, None, None, None)
        total = total_over_devices(jnp.sum(weights), axis)
        return jnp.sum(values * weights) / total

    one = jax.jit(jax.value_and_grad(share), static_argnums=1)
    value, gradient = one(jnp.float32(-3), None)
    assert (value, gradient) == (4.5, -3)
    step = jax.pmap(lambda s: jax.value_and_grad(share)(s, "d"), "d")
    shares, gradients = step(jnp.full(8, -3.0))
    np.testing.assert_allclose(np.sum(np.asarray(shares)), 4.5, rtol=1e-6)
    np.testing.assert_allclose(np.sum(np.asarray(gradients)), -3, rtol=1e-6)
