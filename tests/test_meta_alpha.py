"""The gradient of alpha: both modes, a hand derivation, differences, 8 devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bsce_jax import log_prior, losses, meta_alpha
from bsce_jax.errors import UserError

DEVICES, CLASSES, RATE, CE_WEIGHT = 8, 6, 0.5, 0.8
OLD = np.array([1, 1, 1, 0, 0, 0], bool)
SEEN = np.array([1, 1, 1, 1, 1, 0], bool)
COUNTS = (18.0, 18.0, 18.0, 98.0, 98.0, 0.0)
Arrays = dict[str, jax.Array]


def counts() -> jax.Array:
    """In the widest dtype that is switched on."""
    return jnp.asarray(COUNTS, jnp.result_type(float))


def total(values: jax.Array, axis_name: str | None) -> jax.Array:
    return values if axis_name is None else jax.lax.psum(values, axis_name)


def batch_norm(
    x: jax.Array, valid: jax.Array, scale: jax.Array, axis_name: str | None
) -> jax.Array:
    """Train mode, over the valid rows of all devices."""
    rows = valid[:, None, None, None]
    count = total(jnp.sum(valid), axis_name) * x.shape[1] * x.shape[2]
    mean = total(jnp.sum(x * rows, axis=(0, 1, 2)), axis_name) / count
    centred = x - mean[None, None, None, :]
    variance = total(jnp.sum(centred**2 * rows, axis=(0, 1, 2)), axis_name) / count
    return centred * (scale / jnp.sqrt(variance + 1e-5))[None, None, None, :]


def network(params: Arrays, batch: Arrays, axis_name: str | None = None) -> jax.Array:
    """Two convolutions with BatchNorm and a linear head, [batch, classes]."""
    x = batch["images"]
    for layer, stride in ((1, 1), (2, 2)):
        x = jax.lax.conv_general_dilated(
            x,
            params[f"kernel{layer}"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = batch_norm(x, batch["valid"], params[f"scale{layer}"], axis_name)
        x = jax.nn.relu(x)
    return jnp.mean(x, axis=(1, 2)) @ params["head"]


def mean(values: jax.Array, valid: jax.Array, axis_name: str | None) -> jax.Array:
    """This device's share of the mean over the valid rows of all devices."""
    return jnp.sum(values * valid) / total(jnp.sum(valid), axis_name)


def train_loss(
    params: Arrays,
    alpha: jax.Array,
    batch: Arrays,
    old: Any = OLD,
    ce_weight: Any = CE_WEIGHT,
    axis_name: str | None = None,
) -> jax.Array:
    """IL-Baseline with Eq. 5: cross-entropy and distillation."""
    logits = network(params, batch, axis_name)
    prior = log_prior.weighted(counts(), old, alpha)
    ce = losses.softmax_cross_entropy(logits, batch["labels"], prior)
    kd = losses.knowledge_distillation(logits, batch["teacher"], old)
    return mean(ce_weight * ce + (1 - ce_weight) * kd, batch["valid"], axis_name)


def validation_loss(
    params: Arrays, batch: Arrays, axis_name: str | None = None
) -> jax.Array:
    logits = network(params, batch, axis_name)
    ce = losses.softmax_cross_entropy(logits, batch["labels"], log_prior.uniform(SEEN))
    return mean(ce, batch["valid"], axis_name)


def problem(dtype: type = np.float64) -> tuple[Arrays, Arrays, Arrays]:
    """Parameters, a training batch of 13 in 16 rows and a balanced one of 5 in 8.

    Over 8 devices some have no valid row.
    """
    rng = np.random.default_rng(5)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    params = {
        "kernel1": draw(3, 3, 2, 3) * 0.4,
        "scale1": 1 + 0.1 * draw(3),
        "kernel2": draw(3, 3, 3, 4) * 0.4,
        "scale2": 1 + 0.1 * draw(4),
        "head": draw(4, CLASSES),
    }

    def batch(rows: int, valid: int) -> Arrays:
        return {
            "images": draw(rows, 6, 6, 2),
            "labels": jnp.asarray(np.arange(rows) % 5),
            "teacher": 2 * draw(rows, CLASSES),
            "valid": jnp.asarray(np.arange(rows) < valid, dtype),
        }

    return params, batch(16, 13), batch(8, 5)


@jax.jit
def value(params: Arrays, train: Arrays, held: Arrays, alpha: float) -> jax.Array:
    """The function that is differentiated."""
    inner = jax.grad(train_loss)(params, alpha, train)
    stepped = {name: params[name] - RATE * inner[name] for name in params}
    return validation_loss(stepped, held)


def nested(
    params: Arrays,
    train: Arrays,
    held: Arrays,
    alpha: Any,
    old: Any = OLD,
    ce_weight: Any = CE_WEIGHT,
    mode: str = "forward",
    axis_name: str | None = None,
) -> jax.Array:
    """The gradient under test."""
    return meta_alpha.gradient(
        lambda p, a: train_loss(p, a, train, old, ce_weight, axis_name),
        lambda p: validation_loss(p, held, axis_name),
        params,
        alpha,
        RATE,
        mode,
        axis_name,
    )


# One compilation a mode for most of this file.
ours = jax.jit(nested, static_argnames=("mode", "axis_name"))


@jax.jit
def by_hand(params: Arrays, train: Arrays, held: Arrays, alpha: float) -> jax.Array:
    """-rate <v, J^T h>: h is the derivative by alpha of the logits' gradient.

    q = softmax(z + log-prior) and its Hessian give h = w / (alpha B) (q 1_P - q q_P):
    one more backward pass of the network, no nested differentiation.
    """
    logits, backward = jax.vjp(lambda p: network(p, train), params)
    prior = log_prior.weighted(counts(), OLD, alpha)
    q = jax.nn.softmax(logits + prior[None, :])
    q_old = jnp.sum(q, axis=1, where=OLD[None, :], keepdims=True)
    share = CE_WEIGHT / (alpha * jnp.sum(train["valid"])) * train["valid"][:, None]
    (u,) = backward(share * q * (OLD[None, :] - q_old))
    inner = jax.grad(train_loss)(params, alpha, train)
    stepped = {name: params[name] - RATE * inner[name] for name in params}
    v = jax.grad(validation_loss)(stepped, held)
    return -RATE * sum(jnp.vdot(v[name], u[name]) for name in params)


@pytest.mark.parametrize("alpha", [0.7, 1.3])
def test_modes_agree_with_hand_and_differences(x64: None, alpha: float) -> None:
    arguments = problem()
    forward = ours(*arguments, alpha, OLD, CE_WEIGHT, mode="forward")
    reverse = ours(*arguments, alpha, OLD, CE_WEIGHT, mode="reverse")
    hand = by_hand(*arguments, alpha)
    assert abs(float(forward)) > 1e-4
    np.testing.assert_allclose(forward, reverse, rtol=1e-12)
    np.testing.assert_allclose(forward, hand, rtol=1e-12)
    ahead, behind = (value(*arguments, alpha + e) for e in (1e-4, -1e-4))
    np.testing.assert_allclose(forward, (ahead - behind) / 2e-4, rtol=1e-6)


def test_forward_is_the_default() -> None:
    """Seen by a function that has no forward derivative."""
    square = jax.custom_vjp(lambda p: p**2)
    square.defvjp(lambda p: (p**2, p), lambda p, g: (2 * p * g,))
    arguments = (lambda p, a: a * p, square, jnp.float32(3), jnp.float32(1), 0.5)
    with pytest.raises(TypeError, match="forward-mode"):
        meta_alpha.gradient(*arguments)
    np.testing.assert_allclose(
        meta_alpha.gradient(*arguments, mode="reverse"), -2 * 2.5 * 0.5
    )


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_alpha_enters_by_the_old_classes_only(x64: None, mode: str) -> None:
    """No old class, or cross-entropy of weight 0: the derivative is exactly 0."""
    arguments = problem()
    assert ours(*arguments, 0.7, OLD, CE_WEIGHT, mode=mode) != 0
    assert ours(*arguments, 0.7, np.zeros(CLASSES, bool), CE_WEIGHT, mode=mode) == 0
    assert ours(*arguments, 0.7, OLD, 0.0, mode=mode) == 0


def test_unseen_classes_are_no_part(x64: None) -> None:
    """Finite with -1e9; unseen head columns change nothing and do not move."""
    params, train, held = problem()
    before = ours(params, train, held, 0.7, OLD, CE_WEIGHT, mode="forward")
    changed = params | {"head": params["head"].at[:, ~SEEN].add(100)}
    after = ours(changed, train, held, 0.7, OLD, CE_WEIGHT, mode="forward")
    assert np.isfinite(before)
    np.testing.assert_allclose(after, before, rtol=1e-12)
    direction = jax.jit(jax.jacfwd(jax.grad(train_loss), argnums=1))(params, 0.7, train)
    np.testing.assert_array_equal(np.asarray(direction["head"])[:, ~SEEN], 0)
    assert np.any(direction["head"][:, SEEN])


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_pmap_equals_one_device(x64: None, mode: str) -> None:
    params, train, held = problem()
    expected = ours(params, train, held, 0.7, OLD, CE_WEIGHT, mode=mode)
    split = functools.partial(
        jax.tree.map, lambda x: x.reshape(DEVICES, -1, *x.shape[1:])
    )
    mapped = jax.pmap(
        functools.partial(nested, mode=mode, axis_name="devices"),
        axis_name="devices",
        in_axes=(None, 0, 0, None),
    )
    result = np.asarray(mapped(params, split(train), split(held), 0.7))
    np.testing.assert_allclose(result, np.full(DEVICES, expected), rtol=1e-10)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_jit_over_a_mesh_equals_one_device(x64: None, mode: str) -> None:
    params, train, held = problem()
    expected = ours(params, train, held, 0.7, OLD, CE_WEIGHT, mode=mode)
    mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    result = jax.jit(functools.partial(nested, mode=mode))(
        jax.device_put(params, everywhere),
        jax.device_put(train, rows),
        jax.device_put(held, rows),
        jax.device_put(jnp.asarray(0.7), everywhere),
    )
    np.testing.assert_allclose(result, expected, rtol=1e-10)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("alpha", [1, 1.0, np.float32(1)])
def test_any_scalar_alpha(alpha: Any, mode: str) -> None:
    """By hand: p* = p - r a^2, so the derivative of sum p*^2 is -4 r a sum p*.

    Float32 and not weak, so that the call after the first does not compile again.
    """
    params = jnp.asarray([3.0, -1.0])
    gradient = meta_alpha.gradient(
        lambda p, a: a**2 * jnp.sum(p),
        lambda p: jnp.sum(p * p),
        params,
        alpha,
        0.5,
        mode,
    )
    np.testing.assert_allclose(gradient, -4 * 0.5 * (2.5 - 1.5), rtol=1e-6)
    assert gradient.dtype == np.float32 and not gradient.weak_type


def test_parameters_may_be_any_pytree() -> None:
    """By hand: p* = p - r a x, validation w p*, so the derivative is -r w x."""
    gradient = meta_alpha.gradient(
        lambda p, a: a * (3.0 * p["a"][0] + 5.0 * p["b"]),
        lambda p: 7.0 * p["a"][0] + 11.0 * p["b"],
        {"a": (jnp.float32(1),), "b": jnp.float32(2)},
        jnp.float32(0.5),
        0.1,
    )
    np.testing.assert_allclose(gradient, -0.1 * (7 * 3 + 11 * 5), rtol=1e-6)


def test_unknown_mode() -> None:
    with pytest.raises(UserError, match="mode='sideways'"):
        meta_alpha.gradient(
            lambda p, a: a * p, lambda p: p, jnp.float32(1), 1.0, 0.1, mode="sideways"
        )


@pytest.mark.parametrize(
    ("gradient", "expected"), [(0.2, 0.9), (-0.2, 1.1), (100.0, 0.25), (-100.0, 2.0)]
)
def test_update_is_clipped_descent(gradient: float, expected: float) -> None:
    optimizer = optax.sgd(0.5)
    alpha = jnp.float32(1)
    step: Callable = jax.jit(
        lambda a, g, s: meta_alpha.update(a, g, s, optimizer, 0.25, 2.0)
    )
    new, _ = step(alpha, jnp.float32(gradient), optimizer.init(alpha))
    np.testing.assert_allclose(new, expected, rtol=1e-6)
    assert new.dtype == alpha.dtype and new.weak_type == alpha.weak_type


def test_update_carries_the_state() -> None:
    """Adam's first two steps from a constant gradient are its learning rate each."""
    optimizer = optax.adam(0.1)
    alpha = jnp.float32(1)
    state = optimizer.init(alpha)
    for expected in (0.9, 0.8):
        alpha, state = meta_alpha.update(
            alpha, jnp.float32(3), state, optimizer, 1e-3, 10.0
        )
        np.testing.assert_allclose(alpha, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [(0.2, 2 * np.exp(-0.2)), (-0.2, 2 * np.exp(0.2)), (9.0, 0.25), (-9.0, 3.0)],
)
def test_update_of_the_logarithm(gradient: float, expected: float) -> None:
    """d/d log alpha = alpha d/d alpha: at alpha = 2, rate 0.5, a factor exp(-g)."""
    optimizer = optax.sgd(0.5)
    alpha = jnp.float32(2)
    step: Callable = jax.jit(
        lambda a, g, s: meta_alpha.update(a, g, s, optimizer, 0.25, 3.0, True)
    )
    new, _ = step(alpha, jnp.float32(gradient), optimizer.init(alpha))
    np.testing.assert_allclose(new, expected, rtol=1e-6)
    assert new.dtype == alpha.dtype and new.weak_type == alpha.weak_type


def test_adam_on_the_logarithm_moves_by_factors() -> None:
    """From a constant gradient of log alpha, each step divides by exp(its rate)."""
    optimizer = optax.adam(0.1)
    alpha = jnp.float32(1)
    state = optimizer.init(alpha)
    for step in (1, 2):
        gradient = 3.0 / alpha
        alpha, state = meta_alpha.update(
            alpha, gradient, state, optimizer, 1e-3, 10.0, True
        )
        np.testing.assert_allclose(alpha, np.exp(-0.1 * step), rtol=1e-5)
