"""Heads: the authors' own outputs, NumPy oracles, derivatives, zero vectors, inits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsce_jax import norms
from bsce_jax.errors import UserError
from bsce_jax.models import heads

COSINES = ("cosine", "local_similarity")
SHARES = np.array([1.0, -2.0, 3.0, 0.5], np.float32)  # of the heads of SPB-M


def apply(name, params, features):
    """Logits and the dict of a head, sizes taken from its kernel."""
    *_, proxies, classes = (1, *params["kernel"].shape)
    module = heads.create(name, classes, proxies)
    logits, out = jax.jit(module.apply)({"params": params}, features)
    if name == "perspectives":  # all heads, told apart by their weights
        every = out.pop("perspectives")
        logits = (every * SHARES[None, :, None]).sum(axis=1)
    return logits, out


def example(name, dtype=np.float64, batch=3, size=5, proxies=3, classes=4, seed=0):
    """Random parameters of a head and features."""
    rng = np.random.default_rng(seed)
    middle = {"local_similarity": (proxies,), "perspectives": (4,)}.get(name, ())
    params = {"kernel": rng.normal(size=(size, *middle, classes)).astype(dtype)}
    if name == "linear":
        params["bias"] = rng.normal(size=classes).astype(dtype)
    else:
        scale = [1.7, 0.6, 2.5, 1.1] if name == "perspectives" else 1.7
        params["scale"] = np.asarray(scale, dtype)
    return params, rng.normal(size=(batch, size)).astype(dtype)


def cosine(a, b):
    lengths = np.maximum(np.sqrt((a @ a) * (b @ b)), 1e-24)
    return (a @ b) / lengths


def oracle(name, params, features):
    """The formulas, a class and an example at a time: logits, similarities."""
    kernel = params["kernel"]
    if name == "linear":
        return features @ kernel + params["bias"], None
    if name == "perspectives":
        each = [
            oracle("cosine", {"kernel": kernel[:, b], "scale": scale}, features)
            for b, scale in enumerate(params["scale"])
        ]
        shared = sum(share * z for share, (z, _) in zip(SHARES, each, strict=True))
        return shared, each[0][1]
    scores = np.zeros((len(features), kernel.shape[-1]))
    for i, j in np.ndindex(scores.shape):
        if name == "cosine":
            scores[i, j] = cosine(features[i], kernel[:, j])
        else:
            # -||f/|f| - w/|w|||^2 of every proxy.
            near = np.array([2 * cosine(features[i], w) - 2 for w in kernel[..., j].T])
            weights = np.exp(near) / np.exp(near).sum()
            scores[i, j] = weights @ near
    return params["scale"] * scores, scores


def gradients(name, params, features, cotangent):
    def total(params, features):
        return (apply(name, params, features)[0] * cotangent).sum()

    return jax.jit(jax.grad(total, argnums=(0, 1)))(params, features)


close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12)


def test_lucir_s_head(x64, parity):
    data = parity("lucir_head")
    kernel = np.concatenate([data["in_fc1"], data["in_fc2"]]).T
    params = {"kernel": kernel, "scale": data["in_sigma"][0]}
    logits, out = apply("cosine", params, data["in_x"])
    close(logits, data["out_logits"])
    close(out["similarities"], data["out_logits"] / data["in_sigma"])
    close(out["scale"], 7.3)
    grads, grad_x = gradients("cosine", params, data["in_x"], data["in_cotangent"])
    close(grad_x, data["grad_x"])
    close(grads["kernel"].T[:50], data["grad_fc1"])
    close(grads["kernel"].T[50:], data["grad_fc2"])
    close(grads["scale"], data["grad_sigma"][0])


def test_podnet_s_head(x64, parity):
    data = parity("lsc_logits_k10")
    variant = "neg_stable_cosine_distance_s1"
    features, cotangent = data["in_features"], data["in_cotangent"]
    # 12 classes of 10 proxies, class-major there.
    ours = lambda rows: rows.reshape(12, 10, 64).transpose(2, 1, 0)  # noqa: E731
    params = {"kernel": ours(data["in_proxies"]), "scale": np.asarray(1.0)}
    logits, out = apply("local_similarity", params, features)
    close(logits, data[f"out_logits_{variant}"])
    close(out["similarities"], data[f"out_logits_{variant}"])
    grads, grad_features = gradients("local_similarity", params, features, cotangent)
    close(grad_features, data[f"grad_features_{variant}"])
    close(grads["kernel"], ours(data[f"grad_proxies_{variant}"]))
    # With one proxy a class, the class scores are the raw similarities.
    params["kernel"] = data["in_proxies"].T[:, None, :]
    _, out = apply("local_similarity", params, features)
    close(out["similarities"], data[f"out_raw_{variant}"])


@pytest.mark.parametrize("name", heads.NAMES)
def test_a_head_and_its_gradient_equal_the_formula(x64, name):
    params, features = example(name)
    cotangent = np.random.default_rng(1).normal(size=(3, 4))
    logits, out = apply(name, params, features)
    want, similarities = oracle(name, params, features)
    close(logits, want)
    if name == "linear":
        assert out == {}
    else:
        assert sorted(out) == ["scale", "similarities"]
        close(out["similarities"], similarities)
        close(out["scale"], np.ravel(params["scale"])[0])
    leaves, tree = jax.tree.flatten((params, features))
    sizes = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def total(flat):
        parts = np.split(flat, sizes)
        new = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=1)]
        return (oracle(name, *tree.unflatten(new))[0] * cotangent).sum()

    flat = np.concatenate([leaf.ravel() for leaf in leaves])
    steps = 1e-5 * np.eye(len(flat))
    differences = [(total(flat + step) - total(flat - step)) / 2e-5 for step in steps]
    got = jax.tree.leaves(gradients(name, params, features, cotangent))
    got = np.concatenate([np.ravel(leaf) for leaf in got])
    np.testing.assert_allclose(got, differences, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", heads.NAMES)
def test_forward_over_reverse_equals_reverse_over_reverse(x64, name):
    params, features = example(name)
    cotangent = np.random.default_rng(1).normal(size=(3, 4))
    directions, _ = example(name, seed=2)

    def loss(params):
        return jnp.sin(apply(name, params, features)[0] * cotangent).sum()

    def slope(params):
        products = jax.tree.map(jnp.multiply, jax.grad(loss)(params), directions)
        return sum(leaf.sum() for leaf in jax.tree.leaves(products))

    forward = jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (directions,))[1])
    jax.tree.map(close, forward(params), jax.jit(jax.grad(slope))(params))


def test_normalise_is_pytorch_s_at_and_about_zero(x64):
    x = np.array([[3.0, 4.0], [0.0, 0.0], [2e-12, 0.0], [0.0, 5e-13]])
    got = jax.jit(norms.normalise, static_argnums=1)(x, 1)
    want = [[0.6, 0.8], [0.0, 0.0], [1.0, 0.0], [0.0, 0.5]]
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=0)
    np.testing.assert_allclose(norms.normalise(x.T, 0).T, want, rtol=1e-12, atol=0)
    derivative = jax.jacobian(lambda v: norms.normalise(v[None], 1)[0])
    np.testing.assert_allclose(derivative(x[1]), 1e12 * np.eye(2), rtol=1e-12)


@pytest.mark.parametrize("name", COSINES)
def test_zero_vectors_give_finite_values_and_derivatives(name):
    params, features = example(name, np.float32)
    features[1], params["kernel"][..., 2] = 0, 0
    logits, out = apply(name, params, features)
    # A zero vector is at a right angle to every other.
    nothing = 0 if name == "cosine" else -2
    np.testing.assert_allclose(out["similarities"][1], nothing, rtol=1e-6)
    np.testing.assert_allclose(out["similarities"][:, 2], nothing, rtol=1e-6)
    want, _ = oracle(name, params, features)
    np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-6)

    def loss(params, features):
        return jnp.sin(apply(name, params, features)[0]).sum()

    arguments, directions = (params, features), example(name, np.float32, seed=2)
    gradient = jax.grad(loss, argnums=(0, 1))
    for tree in jax.jit(lambda *a: jax.jvp(gradient, a, directions))(*arguments):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", heads.NAMES)
def test_a_class_depends_on_its_own_weights_only(name):
    params, features = example(name, np.float32)
    seen = np.array([True, True, False, True])
    other = params | {"kernel": np.where(seen, params["kernel"], 1e6)}
    got, want = (apply(name, p, features)[0] for p in (other, params))
    np.testing.assert_array_equal(got[:, seen], want[:, seen])
    assert (got[:, ~seen] != want[:, ~seen]).all()
    cotangent = np.tile(seen.astype(np.float32), (3, 1))
    grads, grad_features = gradients(name, params, features, cotangent)
    np.testing.assert_array_equal(grads["kernel"][..., ~seen], 0)
    assert (grads["kernel"][..., seen] != 0).all()
    _, got = gradients(name, other, features, cotangent)
    np.testing.assert_array_equal(got, grad_features)


@pytest.mark.parametrize("name", COSINES)
def test_lengths_do_not_matter(x64, name):
    params, features = example(name)
    factors = np.random.default_rng(3).uniform(0.1, 10, params["kernel"].shape[1:])
    longer = params | {"kernel": params["kernel"] * factors}
    close(apply(name, longer, 7 * features)[0], apply(name, params, features)[0])


def test_no_distance_is_negative():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(256, 64)).astype(np.float32)
    params = {"kernel": features.T, "scale": np.float32(1)}
    cosines = np.diag(apply("cosine", params, features)[0])
    assert (cosines > 1).any()
    params["kernel"] = features.T[:, None, :]
    scores = np.diag(apply("local_similarity", params, features)[0])
    assert (scores <= 0).all()
    np.testing.assert_allclose(scores, 0, atol=1e-6)


def initialised(name):
    state = heads.create(name, 200, 10).init(jax.random.key(0), jnp.ones((2, 64)))
    return jax.tree.map(np.asarray, state["params"])


def test_cosine_embeddings_start_as_lucir_s():
    params = initialised("cosine")
    assert sorted(params) == ["kernel", "scale"]
    kernel = params["kernel"]
    assert kernel.shape == (64, 200)
    assert 0.99 / 8 < np.abs(kernel).max() <= 1 / 8
    assert kernel.std() == pytest.approx(1 / 8 / np.sqrt(3), rel=0.02)
    assert abs(kernel.mean()) < 3 * kernel.std() / np.sqrt(kernel.size)
    assert params["scale"].shape == () and params["scale"] == 1


def test_proxies_start_as_podnet_s():
    params = initialised("local_similarity")
    assert sorted(params) == ["kernel", "scale"]
    kernel = params["kernel"]
    assert kernel.shape == (64, 10, 200)
    assert kernel.std() == pytest.approx(1 / 8, rel=0.01)
    assert abs(kernel.mean()) < 3 * kernel.std() / np.sqrt(kernel.size)
    # A truncated normal never leaves 2 deviations (5 per cent of a normal does).
    assert (abs(kernel) > 2.5 / 8).mean() == pytest.approx(0.0124, rel=0.1)
    assert params["scale"].shape == () and params["scale"] == 1


@pytest.mark.parametrize("name", heads.NAMES)
def test_everything_has_the_type_of_the_features(x64, name):
    for dtype in ("float32", "float64"):
        features = jax.ShapeDtypeStruct((2, 64), dtype)
        made = jax.eval_shape(
            heads.create(name, 200).init_with_output, jax.random.key(0), features
        )
        assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype(dtype)}


def test_an_unknown_head_is_one_clear_line():
    line = "head='square' is unknown; allowed: linear, cosine, local_similarity"
    line += ", perspectives"
    with pytest.raises(UserError, match=f"^{line}$"):
        heads.create("square", 10)
