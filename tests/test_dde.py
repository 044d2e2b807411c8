"""DDE's forward pass: neighbours first, the moving mean, its effect taken out."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsce_jax import dde, methods
from bsce_jax.compute.state import COMPANIONS, MEMORY, Batch, Network
from bsce_jax.methods import lucir_dde, podnet_dde
from bsce_jax.models import heads
from tests.test_methods import shown

B, K, D, C, PROXIES = 4, 2, 5, 6, 3
SHARE, MOMENTUM = 0.5, 0.9
METHODS = {"cosine": lucir_dde, "local_similarity": podnet_dde}
HEADS = {
    "cosine": heads.CosineHead(C),
    "local_similarity": heads.LocalSimilarityHead(C, PROXIES),
}
VALID = np.array([1.0, 1, 1, 0])
NEAR_VALID = np.array([[1.0, 1], [1, 0], [0, 0], [0, 0]])
OPTIONS = {"share": SHARE, "momentum": MOMENTUM, "pool": 0}


def unit(vectors: np.ndarray, axis: int) -> np.ndarray:
    return vectors / np.sqrt((vectors**2).sum(axis=axis, keepdims=True))


def head_of(name: str, params: dict[str, np.ndarray], f: np.ndarray) -> np.ndarray:
    """Logits [classes] of one vector, from the formulas of LUCIR and PODNet."""
    kernel, direction = unit(params["kernel"], 0), f / max(np.sqrt(f @ f), 1e-300)
    if name == "cosine":
        return params["scale"] * (direction @ kernel)
    near = np.zeros((PROXIES, C))
    for k, c in np.ndindex(PROXIES, C):
        near[k, c] = 2 * (direction @ kernel[:, k, c]) - 2
    shares = np.exp(near) / np.exp(near).sum(axis=0)
    return params["scale"] * (shares * near).sum(axis=0)


def taken_out(name: str, params: dict, f: np.ndarray, h: np.ndarray) -> np.ndarray:
    """share * cos(f, h) * head(h), the effect of the mean on one vector's logits."""
    cosine = f @ h / np.sqrt((f @ f) * (h @ h))
    return SHARE * cosine * head_of(name, params, h)


def network(name: str, mean: np.ndarray) -> Network:
    """One gain before the head, which the running mean sees as well."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(D, *((PROXIES,) if name != "cosine" else ()), C))
    head = {"kernel": kernel, "scale": np.float64(3.0)}
    return Network(
        {"gain": np.ones(D), "head": head}, {"mean": np.zeros(D)}, {"h": mean}
    )


def forward(
    name: str, before: Network, given: Batch, train: bool = True
) -> tuple[dict[str, jax.Array], Network, list[tuple]]:
    """A method's forward on a model without layers, and what its passes were given.

    The running mean moves like that of a BatchNorm.
    """
    passes = []

    def apply(network: Network, images: Any, valid: Any) -> tuple[dict, Network]:
        passes.append((network.batch_stats["mean"], images, valid))
        features = images * network.params["gain"][None]
        head = {"params": network.params["head"]}
        logits, _ = HEADS[name].apply(head, features)
        if train:
            now = jnp.sum(features * valid[:, None], axis=0) / jnp.sum(valid)
            moved = 0.9 * network.batch_stats["mean"] + 0.1 * now
            network = network.replace(batch_stats={"mean": moved})
        return {"logits": logits, "features": features}, network

    return *METHODS[name].forward(apply, before, given, None, **OPTIONS), passes


run = jax.jit(forward, static_argnums=(0, 3))


def batch() -> Batch:
    """Images that are the features; garbage where there is no image."""
    rng = np.random.default_rng(1)
    images, others = rng.normal(size=(B, D)), rng.normal(size=(B * K, D))
    images[VALID == 0] = 1e6
    others[NEAR_VALID.ravel() == 0] = -1e6
    near = Batch(others, np.zeros(B * K, np.int32), NEAR_VALID.ravel())
    return Batch(images, np.zeros(B, np.int32), VALID, None, {COMPANIONS: near})


@pytest.mark.parametrize("name", METHODS)
def test_the_passes_and_what_they_give(x64: None, name: str) -> None:
    """The neighbours' first: the batch's finds the statistics that it has moved."""
    h = np.random.default_rng(2).normal(size=D)
    before, given = network(name, h), batch()
    near = given.beside[COMPANIONS]
    out, after, (first, second) = run(name, before, given)
    there, own = near.images[near.valid > 0], given.images[VALID > 0]
    for found, expected in (
        (first, (np.zeros(D), near.images, near.valid)),
        (second, (0.1 * there.mean(axis=0), given.images, VALID)),
    ):
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    moved = 0.09 * there.mean(axis=0) + 0.1 * own.mean(axis=0)
    np.testing.assert_allclose(after.batch_stats["mean"], moved, rtol=1e-12)
    # Of both passes the logits; what the mean explains is subtracted in prediction.
    head = before.params["head"]
    others = np.array([head_of(name, head, f) for f in near.images])
    np.testing.assert_allclose(
        out["neighbour_logits"], others.reshape(B, K, C), rtol=1e-11
    )
    np.testing.assert_array_equal(out["neighbours_valid"], NEAR_VALID)
    logits = np.array([head_of(name, head, f) for f in given.images])
    np.testing.assert_allclose(out["logits"], logits, rtol=1e-11)
    effect = [taken_out(name, head, f, h) for f in given.images]
    np.testing.assert_allclose(out["scores"], logits - effect, rtol=1e-11, atol=1e-13)
    # The mean moves by the batch's valid rows alone.
    assert after.extra.keys() == {"h"}
    np.testing.assert_allclose(after.extra["h"], 0.9 * h + own.mean(axis=0), rtol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)


def test_without_companions(x64: None) -> None:
    """As in evaluation, of the teacher and in fine-tuning: one pass, no neighbours."""
    before = network("cosine", np.random.default_rng(3).normal(size=D))
    given = batch()
    alone = given.replace(beside={MEMORY: given.beside[COMPANIONS]})
    out, after, passes = run("cosine", before, alone, False)
    assert len(passes) == 1 and out.keys() == {"logits", "features", "scores"}
    np.testing.assert_array_equal(after.batch_stats["mean"], 0)
    with_them, moved, _ = run("cosine", before, given)
    np.testing.assert_allclose(out["scores"], with_them["scores"], rtol=1e-13)
    np.testing.assert_allclose(after.extra["h"], moved.extra["h"], rtol=1e-13)


@pytest.mark.parametrize("name", METHODS)
def test_only_the_direction_of_the_mean_matters(x64: None, name: str) -> None:
    """Of 0, which the base step leaves it, nothing is taken out."""
    h = np.random.default_rng(4).normal(size=D)
    zero, plain, *scaled = (
        run(name, network(name, scale * h), batch())[0]["scores"]
        for scale in (0.0, 1.0, 1e-6, 1e6)
    )
    for other in scaled:
        np.testing.assert_allclose(other, plain, rtol=1e-9, atol=1e-12)
    out, *_ = run(name, network(name, dde.initial(D)["h"].astype(float)), batch())
    np.testing.assert_array_equal(zero, out["logits"])
    assert np.all(np.asarray(plain != zero))


def test_no_gradient_through_the_neighbours_and_the_mean(x64: None) -> None:
    """The gradient of everything is that of the batch's own pass."""
    before = network("cosine", np.random.default_rng(5).normal(size=D))
    given = batch()
    given = given.replace(images=np.where(VALID[:, None] > 0, given.images, 1.0))

    def total(params: dict, names: tuple[str, ...], near: bool) -> jax.Array:
        shown = given if near else given.replace(beside={})
        out, after, _ = forward("cosine", before.replace(params=params), shown)
        found = out | {"h": after.extra["h"], "mean": after.batch_stats["mean"]}
        parts = [found[name].ravel() for name in names]
        return sum(jnp.dot(jnp.cos(jnp.arange(part.size)), part) for part in parts)

    gradient = jax.jit(jax.grad(total), static_argnums=(1, 2))
    still = gradient(before.params, ("neighbour_logits", "h"), True)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(still))
    moving = ("logits", "features", "mean")
    ours, alone = (gradient(before.params, moving, near) for near in (True, False))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(ours))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
    jax.tree.map(close, ours, alone)


def test_the_mean_of_half_precision_features_is_kept_in_float32() -> None:
    """A batch without a valid row leaves only the momentum."""
    plain = network("cosine", np.ones(D))
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), plain.params)
    before = plain.replace(params=half, extra={"h": np.ones(D, np.float32)})
    alone = batch().replace(beside={}, valid=VALID.astype(np.float32))
    given = alone.replace(images=jnp.asarray(alone.images, jnp.bfloat16))
    out, after, _ = run("cosine", before, given, False)
    assert out["features"].dtype == jnp.bfloat16
    assert after.extra["h"].dtype == jnp.float32
    own = np.asarray(given.images, np.float64)[VALID > 0].mean(axis=0)
    np.testing.assert_allclose(after.extra["h"], 0.9 + own, rtol=1e-5)
    none = given.replace(valid=np.zeros(B, np.float32))
    _, after, _ = run("cosine", before, none, False)
    np.testing.assert_allclose(after.extra["h"], 0.9, rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_begins_with_a_mean_of_zero(name: str) -> None:
    """And with new rows, as LUCIR's and PODNet's do."""
    sizes = methods.Sizes(classes=C, features=D, image=(8, 8, 1), new=2, exemplars=4)
    own = METHODS[name].initial(sizes, **METHODS[name].OPTIONS)
    assert own.params == {}
    head = network(name, np.ones(D)).params["head"]
    features = np.random.default_rng(6).normal(size=(8, D))
    step, *_ = shown(
        head,
        extra={"h": np.ones(D)},
        num_old=2,
        new=[np.arange(8)],
        features=lambda groups: [(group, features) for group in groups],
    )
    after = METHODS[name].begin(step)
    for extra in (own.extra, after.extra):
        assert extra.keys() == {"h"} and extra["h"].dtype == np.float32
        np.testing.assert_array_equal(extra["h"], np.zeros(D))
    ours, theirs = (n.params["head"]["kernel"] for n in (after, step.network))
    moved = np.any(np.abs(ours - theirs).reshape(-1, C) > 1e-5, axis=0)
    np.testing.assert_array_equal(moved, np.arange(C) == 2)
