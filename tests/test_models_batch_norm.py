"""Masked, global batch normalisation against float64 NumPy and itself, split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from bsce_jax.models.batch_norm import BatchNorm, normalise
from tests.step_example import jitted

EPSILON = 1e-5
MASK = np.array([1, 0, 1, 1, 0, 1.0])
NEAR = np.array([2.0, 3.0, 4.0, 0.0])  # guesses of the mean


def sample(shape=(6, 3, 2, 4), seed=0, offset=3.0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * 2 + offset).astype(dtype)


def oracle(x, valid, scale, bias):
    """PyTorch's layer on the valid rows alone: y of all rows, mean, unbiased var."""
    pixels = x[valid > 0].reshape(-1, x.shape[-1]).astype(np.float64)
    mean, var = pixels.mean(0), pixels.var(0)
    y = (x - mean) / np.sqrt(var + EPSILON) * scale + bias
    return y, mean, pixels.var(0, ddof=1)


def variables(channels=4):
    rng = np.random.default_rng(5)
    draw = lambda: rng.uniform(0.5, 2, channels).astype(np.float32)  # noqa: E731
    return {
        "params": {"scale": draw(), "bias": draw()},
        "batch_stats": {"mean": draw(), "var": draw()},
    }


@pytest.mark.parametrize("valid", [np.ones(6), MASK, np.array([0, 0, 0, 0, 0, 1.0])])
def test_train_mode_is_pytorch_s_layer_on_the_valid_rows(valid):
    x, state = sample(dtype=np.float32), variables()
    y, updated = BatchNorm().apply(
        state, x, train=True, valid=valid.astype(np.float32), mutable=["batch_stats"]
    )
    want, mean, var = oracle(x, valid, **state["params"])
    np.testing.assert_allclose(y, want, rtol=2e-5, atol=2e-5)
    stats = updated["batch_stats"]
    old = state["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.9 * old["mean"] + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 * old["var"] + 0.1 * var, rtol=1e-5)


def test_no_mask_is_a_mask_of_ones():
    x, state = sample(dtype=np.float32), variables()
    results = [
        BatchNorm().apply(state, x, train=True, valid=valid, mutable=["batch_stats"])
        for valid in (None, np.ones(6, np.float32))
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_eval_mode_uses_the_running_statistics():
    x, state = sample(dtype=np.float32), variables()
    stats, params = state["batch_stats"], state["params"]
    want = (x - stats["mean"]) / np.sqrt(stats["var"] + EPSILON)
    got = BatchNorm().apply(state, x, train=False)
    np.testing.assert_allclose(
        got, want * params["scale"] + params["bias"], rtol=1e-5, atol=1e-5
    )


def test_padding_changes_neither_the_statistics_nor_the_gradients():
    state, valid = variables(), MASK.astype(np.float32)
    cotangent = sample(seed=1, dtype=np.float32) * valid[:, None, None, None]

    def loss(params, x):
        y, updated = BatchNorm().apply(
            {**state, "params": params},
            x,
            train=True,
            valid=valid,
            mutable=["batch_stats"],
        )
        return (y * cotangent).sum(), updated

    x = sample(dtype=np.float32)
    other = np.where(valid[:, None, None, None] > 0, x, 1e4).astype(np.float32)
    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    (grads, first), (grads_other, second) = (
        gradient(state["params"], values) for values in (x, other)
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)
    jax.tree.map(np.testing.assert_array_equal, grads[0], grads_other[0])
    np.testing.assert_array_equal(grads[1][valid > 0], grads_other[1][valid > 0])
    # Padding rows move no statistic and bear no loss: their gradient is 0.
    np.testing.assert_allclose(grads[1][valid == 0], 0, atol=1e-6)


def test_a_batch_of_padding_alone_leaves_the_running_statistics():
    x, state = sample(dtype=np.float32), variables()
    y, updated = BatchNorm().apply(
        state, x, train=True, valid=np.zeros(6, np.float32), mutable=["batch_stats"]
    )
    jax.tree.map(
        np.testing.assert_array_equal, updated["batch_stats"], state["batch_stats"]
    )
    assert np.isfinite(y).all()


def naive(x, scale, bias, weights):
    """The same function left to automatic differentiation."""
    weights = weights[:, None, None, None]
    mean = (x * weights).sum((0, 1, 2))
    var = ((x - mean[None, None, None]) ** 2 * weights).sum((0, 1, 2))
    unit = (x - mean[None, None, None]) / jnp.sqrt(var + EPSILON)[None, None, None]
    return unit * scale[None, None, None] + bias[None, None, None], mean, var


@pytest.fixture
def operands(x64):
    weights = jnp.asarray(MASK / MASK.sum() / 6)
    params = (sample((4,), 2, 1.0), sample((4,), 3, 0.0))
    return (jnp.asarray(sample()), *map(jnp.asarray, params), weights)


def scalar(function, weights):
    """A scalar that depends on all three outputs, and not linearly."""
    cotangents = [jnp.asarray(sample((6, 3, 2, 4), 7)), *sample((2, 4), 8)]

    def value(x, scale, bias):
        outputs = function(x, scale, bias, weights)
        pairs = zip(outputs, cotangents, strict=True)
        return sum((jnp.tanh(0.1 * out) * ct).sum() for out, ct in pairs)

    return value


def test_first_and_second_derivatives_are_those_of_the_plain_formula(operands):
    *primals, weights = operands
    ours = scalar(lambda *args: normalise(None, EPSILON, *args, NEAR), weights)
    plain = scalar(naive, weights)
    tangents = tuple(jnp.asarray(sample(p.shape, 9)) for p in primals)

    def derivatives(function, *primals):
        gradient = jax.grad(function, argnums=(0, 1, 2))
        dot = lambda *args: sum(  # noqa: E731
            (a * b).sum() for a, b in zip(gradient(*args), tangents, strict=True)
        )
        return {
            "value": function(*primals),
            "reverse": gradient(*primals),
            "forward": jax.jvp(function, primals, tangents)[1],
            "forward over reverse": jax.jvp(gradient, primals, tangents)[1],
            "reverse over reverse": jax.grad(dot, argnums=(0, 1, 2))(*primals),
        }

    got, want = (
        jitted(functools.partial(derivatives, function), *primals)
        for function in (ours, plain)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), got, want
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11),
        got["forward over reverse"],
        got["reverse over reverse"],
    )


def test_derivatives_agree_with_finite_differences(operands):
    *primals, weights = operands
    function = lambda *args: normalise(None, EPSILON, *args, weights, NEAR)  # noqa: E731
    check_grads(jax.jit(function), tuple(primals), order=2, modes=("fwd", "rev"))


def test_bfloat16_activations_keep_float32_statistics():
    # 100 + noise: a bfloat16 sum or mean would lose the deviation altogether.
    x = jnp.asarray(sample((6, 8, 8, 4), offset=100.0), jnp.bfloat16)
    state = variables()
    state["batch_stats"]["mean"] += 98  # as in training, near the batch's
    y, updated = BatchNorm(dtype=jnp.bfloat16).apply(
        state, x, train=True, mutable=["batch_stats"]
    )
    assert y.dtype == jnp.bfloat16
    want, mean, var = oracle(np.asarray(x, np.float64), np.ones(6), **state["params"])
    stats = updated["batch_stats"]
    assert stats["mean"].dtype == stats["var"].dtype == jnp.float32
    old = state["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.9 * old["mean"] + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 * old["var"] + 0.1 * var, rtol=1e-4)
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=1e-2, atol=2e-2)


def test_a_variance_far_smaller_than_the_mean_is_exact_near_the_running_mean():
    """Without the running mean float32 would keep no digit of a deviation of 1."""
    x = sample((6, 8, 8, 4), offset=0.0).astype(np.float32) / 2 + np.float32(5000)
    near = np.float32([4999, 5000, 5001.5, 4998])
    ones, zeros = np.ones(4, np.float32), np.zeros(4, np.float32)
    weights = np.full(6, 1 / x[..., 0].size, np.float32)
    y, mean, var = normalise(None, EPSILON, x, ones, zeros, weights, near)
    pixels = x.reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(var, pixels.var(0), rtol=5e-3)
    lost = normalise(None, EPSILON, x, ones, zeros, weights, zeros)[2]
    assert np.abs(lost / pixels.var(0) - 1).max() > 0.5


def test_devices_exchange_both_sums_at_once():
    def layer(x):
        weights = jnp.full(1, 0.1)
        pair = jnp.ones(4), jnp.zeros(4)
        return normalise("data", EPSILON, x, *pair, weights, pair[1])[0].sum()

    x = jnp.ones((1, 3, 2, 4))
    for function, sums in ((layer, 1), (jax.grad(layer), 2)):
        jaxpr = jax.make_jaxpr(function, axis_env=[("data", 2)])(x)
        assert str(jaxpr).count("psum") == sums


def test_pytorch_s_layer_agrees():
    torch = pytest.importorskip("torch")
    x, state = sample(dtype=np.float32), variables()
    layer = torch.nn.BatchNorm2d(4)
    params, stats = state["params"], state["batch_stats"]
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(params["scale"]))
        layer.bias.copy_(torch.from_numpy(params["bias"]))
        layer.running_mean.copy_(torch.from_numpy(stats["mean"]))
        layer.running_var.copy_(torch.from_numpy(stats["var"]))
        want = layer(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    y, updated = BatchNorm().apply(state, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, want.transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-5)
    stats = updated["batch_stats"]
    np.testing.assert_allclose(stats["mean"], layer.running_mean.numpy(), rtol=1e-6)
    np.testing.assert_allclose(stats["var"], layer.running_var.numpy(), rtol=1e-6)
