"""LUCIR's less-forget and margin ranking: formulas, gradients, PyTorch, invariants."""

import functools
import importlib
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import bsce_jax
from bsce_jax import losses
from bsce_jax.errors import UserError

B, C, D = 6, 7, 4
OLD = np.array([True, False, True, True, False, False, False])
SEEN = np.array([True, True, True, True, True, True, False])
NEW = SEEN & ~OLD
LABELS = np.array([0, 4, 2, 1, 3, 0])  # four of them old

less_forget_module = importlib.import_module("bsce_jax.losses.less_forget")
margin_ranking_module = importlib.import_module("bsce_jax.losses.margin_ranking")

vectors = hnp.arrays(np.float64, (B, D), elements=st.floats(-10, 10))
# A grid, so that ties between classes are frequent.
cosine_arrays = hnp.arrays(
    np.float64, (B, C), elements=st.sampled_from(np.linspace(-1, 1, 9))
)


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """What a training step makes of a term, 0 where all weights are."""
    total = jnp.sum(weights)
    return jnp.sum(values * weights) / jnp.where(total > 0, total, 1)


@functools.partial(jax.jit, static_argnames="k")
def ranking(
    cosines: jax.Array,
    labels: jax.Array,
    old: jax.Array,
    new: jax.Array,
    k: int = 2,
    margin: float = 0.5,
) -> tuple[jax.Array, jax.Array]:
    """The loss and its gradient."""
    return jax.value_and_grad(
        lambda c: weighted_mean(*losses.margin_ranking(c, labels, old, new, k, margin))
    )(cosines)


@jax.jit
def forgetting(features: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Less-forget, values [B] and the gradient of their sum."""
    values, transpose = jax.vjp(lambda f: losses.less_forget(f, teacher), features)
    return values, transpose(jnp.ones_like(values))[0]


def ranking_oracle(
    cosines: np.ndarray,
    labels: np.ndarray,
    old: np.ndarray,
    new: np.ndarray,
    k: int,
    margin: float,
) -> tuple[float, np.ndarray]:
    """Loss and gradient, as a mean over the pairs of an old sample and a new class."""
    pairs = []
    for i, y in enumerate(labels):
        ranked = sorted(np.flatnonzero(new), key=lambda j: (-cosines[i, j], j))
        pairs += [(i, y, j) for j in ranked[:k] if old[y]]
    loss, gradient = 0.0, np.zeros_like(cosines)
    for i, y, j in pairs:
        gap = cosines[i, j] - cosines[i, y] + margin
        if gap > 0:
            loss += gap / len(pairs)
            gradient[i, j] += 1 / len(pairs)
            gradient[i, y] -= 1 / len(pairs)
    return loss, gradient


@settings(max_examples=25, deadline=None)
@given(cosine_arrays, st.integers(1, 4))
def test_margin_ranking_oracle(cosines: np.ndarray, k: int) -> None:
    """Values and gradients by hand, with ties; no gap of the grid is exactly 0."""
    with jax.enable_x64(True):
        arguments = (LABELS, OLD, NEW, k, 0.55)
        loss, gradient = ranking(cosines, *arguments)
        expected, by_hand = ranking_oracle(cosines, *arguments)
        np.testing.assert_allclose(loss, expected, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(gradient, by_hand, atol=1e-14)


def test_margin_ranking_by_hand() -> None:
    """Two old samples, a new one; K = 2 and, with the same program, 1, 0 and 3 new."""
    cosines = jnp.asarray(
        [
            [0.9, 0.0, 0.7, -0.2, 0.6],  # gaps 0.3, 0.2, (-0.6)
            [0.1, 0.2, 0.9, 0.8, 0.8],  # old as well: gaps 1.2, 1.1, 1.1
            [0.5, 0.5, 0.5, 0.5, 0.5],
        ],
        jnp.float32,
    )
    labels = np.array([0, 1, 2])
    old = np.array([True, True, False, False, False])
    loss = jax.jit(lambda new: losses.margin_ranking(cosines, labels, old, new))
    for new, first, second in (
        ([0, 0, 1, 1, 1], (0.3 + 0.2) / 2, (1.2 + 1.1) / 2),
        ([0, 0, 1, 0, 0], 0.3, 1.2),
        ([0, 0, 0, 1, 0], 0.0, 1.1),
        ([0, 0, 0, 0, 0], 0.0, 0.0),
    ):
        values, weights = loss(np.array(new, bool))
        np.testing.assert_allclose(values[:2], [first, second], atol=1e-6)
        np.testing.assert_array_equal(weights, [1, 1, 0])
    assert loss._cache_size() == 1


def test_margin_ranking_of_a_tie_is_that_of_one_class() -> None:
    """Three new classes of equal cosine, K = 1 and 2: only 1 and 2 get a gradient."""
    cosines = jnp.zeros((1, 4))
    masks = (np.arange(4) < 1, np.arange(4) >= 1)
    for k in (1, 2):
        _, gradient = ranking(cosines, np.zeros(1, int), *masks, k)
        np.testing.assert_allclose(np.sort(gradient[0])[::-1][:k], 1 / k)
        assert np.count_nonzero(gradient) == k + 1
        assert gradient[0, 0] == -1


@pytest.mark.parametrize("old", [np.zeros(C, bool), OLD])
def test_margin_ranking_without_an_old_sample_is_exactly_zero(old: np.ndarray) -> None:
    cosines = jnp.asarray(np.random.default_rng(0).normal(size=(3, C)), jnp.float32)
    labels = np.array([1, 4, 5])
    loss, gradient = ranking(cosines, labels, old, SEEN & ~old)
    assert loss == 0
    np.testing.assert_array_equal(gradient, 0)


@settings(max_examples=15, deadline=None)
@given(cosine_arrays, cosine_arrays)
def test_margin_ranking_sees_new_classes_and_the_label_only(
    cosines: np.ndarray, others: np.ndarray
) -> None:
    used = NEW[None, :] | (LABELS[:, None] == np.arange(C)[None, :])
    arguments = (LABELS, OLD, NEW)
    loss, gradient = ranking(cosines, *arguments)
    assert ranking(np.where(used, cosines, others), *arguments)[0] == loss
    np.testing.assert_array_equal(np.asarray(gradient)[~used], 0)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_margin_ranking_equals_pytorch(x64: None, k: int) -> None:
    """LUCIR's recipe: topk of the new columns, MarginRankingLoss over all pairs."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(k)
    cosines = np.tanh(rng.normal(size=(32, 12)))
    labels = rng.integers(0, 12, 32)
    old = np.arange(12) < 7
    theirs = torch.tensor(cosines, requires_grad=True)
    of_label = theirs.gather(1, torch.tensor(labels)[:, None]).expand(-1, k)
    highest = theirs[:, 7:].topk(k, dim=1).values
    is_old = torch.tensor(labels) < 7
    loss = torch.nn.MarginRankingLoss(margin=0.5)(
        of_label[is_old].flatten(),
        highest[is_old].flatten(),
        torch.ones(int(is_old.sum()) * k, dtype=torch.float64),
    )
    loss.backward()
    ours, gradient = ranking(cosines, labels, old, ~old, k)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-12, atol=1e-15)


def test_margin_ranking_gradient_has_no_scatter() -> None:
    text = ranking.lower(jnp.ones((B, C)), LABELS, OLD, NEW).as_text()
    assert "reduce" in text and "scatter" not in text and "gather" not in text


@pytest.mark.parametrize("k", [0, -1])
def test_margin_ranking_refuses_no_classes(k: int) -> None:
    with pytest.raises(UserError, match=f"k={k}, allowed: at least 1"):
        losses.margin_ranking(jnp.ones((B, C)), LABELS, OLD, NEW, k)


@settings(max_examples=25, deadline=None)
@given(vectors, vectors)
def test_less_forget_oracle(features: np.ndarray, teacher: np.ndarray) -> None:
    """1 - cos, and its gradient -(t - cos f) / |features| with f and t of length 1."""
    features[:, 0] += np.where(features[:, 0] < 0, -1, 1)  # away from zero
    teacher[:, 0] += np.where(teacher[:, 0] < 0, -1, 1)
    length = np.sqrt((features**2).sum(axis=1, keepdims=True))
    f = features / length
    t = teacher / np.sqrt((teacher**2).sum(axis=1, keepdims=True))
    cosine = (f * t).sum(axis=1, keepdims=True)
    with jax.enable_x64(True):
        values, gradient = forgetting(features, teacher)
        np.testing.assert_allclose(values, 1 - cosine[:, 0], atol=1e-14)
        np.testing.assert_allclose(gradient, -(t - cosine * f) / length, atol=1e-13)
        assert (values > -1e-14).all() and (values < 2 + 1e-14).all()
        for same in ((3 * features, teacher / 7), (teacher, features)):
            np.testing.assert_allclose(forgetting(*same)[0], values, atol=1e-14)


def test_less_forget_extremes(x64: None) -> None:
    features = jnp.asarray(np.random.default_rng(1).normal(size=(B, D)))
    for factor, expected in ((2.0, 0.0), (-0.5, 2.0), (0.0, 1.0)):
        values = losses.less_forget(features, factor * features)
        np.testing.assert_allclose(values, expected, atol=1e-14)


def test_less_forget_second_derivatives(x64: None) -> None:
    """Forward over reverse, as the meta gradient takes it, by differences."""
    features, teacher, tangent = np.random.default_rng(2).normal(size=(3, B, D))
    gradient = jax.jit(jax.grad(lambda f: jnp.sum(losses.less_forget(f, teacher))))
    found = jax.jvp(gradient, (features,), (tangent,))[1]
    ends = [gradient(features + step * tangent) for step in (1e-5, -1e-5)]
    expected = (ends[0] - ends[1]) / 2e-5
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_less_forget_is_finite_next_to_zero(dtype: type) -> None:
    """Values, gradients and their directional derivatives, for both being tiny too."""
    tangent = jnp.asarray(np.random.default_rng(3).normal(size=(B, D)), dtype)

    @jax.jit
    def everything(features: jax.Array, teacher: jax.Array) -> tuple:
        gradient = jax.grad(lambda f: jnp.sum(losses.less_forget(f, teacher)))
        values = losses.less_forget(features, teacher)
        return values, *jax.jvp(gradient, (features,), (tangent,))

    for size in (0.0, 1e-30, 1e-13, 1e-12, 2e-12, 1e-6):
        features = jnp.full((B, D), size, dtype)
        for teacher in (features, tangent):
            for found in everything(features, teacher):
                assert np.isfinite(np.asarray(found, np.float32)).all(), size


def test_less_forget_of_zero_is_one() -> None:
    zero, other = jnp.zeros((B, D)), jnp.ones((B, D))
    for arguments in ((zero, other), (other, zero), (zero, zero)):
        np.testing.assert_array_equal(losses.less_forget(*arguments), 1)


def test_less_forget_equals_pytorch(x64: None) -> None:
    """Down to a row of zeros, where `normalize` divides by 1e-12."""
    torch = pytest.importorskip("torch")
    features, teacher = np.random.default_rng(4).normal(size=(2, B, D))
    features[0] = 0
    theirs = torch.tensor(features, requires_grad=True)
    normalize = torch.nn.functional.normalize
    values = 1 - (normalize(theirs) * normalize(torch.tensor(teacher))).sum(dim=1)
    values.sum().backward()
    ours, gradient = forgetting(features, teacher)
    np.testing.assert_allclose(ours, values.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-11, atol=1e-14)


def test_no_gradient_into_the_teacher() -> None:
    features, teacher = jnp.ones((B, D)), jnp.arange(B * D, dtype=jnp.float32)
    gradient = jax.grad(
        lambda t: jnp.sum(losses.less_forget(features, t.reshape(B, D)))
    )(teacher)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_computed_in_float32(dtype: type) -> None:
    """Half precision loses nothing but its own rounding."""
    rng = np.random.default_rng(5)
    features, teacher = jnp.asarray(rng.normal(size=(2, B, D)) * 300, dtype)
    cosines = jnp.asarray(np.tanh(rng.normal(size=(B, C))), dtype)
    for function, arguments in (
        (losses.less_forget, (features, teacher)),
        (lambda c: losses.margin_ranking(c, LABELS, OLD, NEW)[0], (cosines,)),
        (lambda c: losses.margin_ranking(c, LABELS, OLD, NEW)[1], (cosines,)),
    ):
        ours = function(*arguments)
        assert ours.dtype == jnp.float32
        exact = function(*(x.astype(jnp.float32) for x in arguments))
        np.testing.assert_array_equal(ours, exact)


def outputs(rng: np.random.Generator) -> dict[str, jax.Array]:
    return {
        "features": jnp.asarray(rng.normal(size=(B, D)), jnp.float32),
        "similarities": jnp.asarray(np.tanh(rng.normal(size=(B, C))), jnp.float32),
    }


def test_terms() -> None:
    """A term is its function, weighted by the valid rows."""
    rng = np.random.default_rng(6)
    student, teacher = outputs(rng), outputs(rng)
    valid = jnp.asarray([1, 1, 1, 0, 0, 0], jnp.float32)
    batch = types.SimpleNamespace(labels=jnp.asarray(LABELS), valid=valid)
    context = types.SimpleNamespace(old=jnp.asarray(OLD), seen=jnp.asarray(SEEN))
    values, weights = less_forget_module.term(student, teacher, batch, context)
    expected = losses.less_forget(student["features"], teacher["features"])
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(weights, valid)
    for options in ({}, {"k": 1, "margin": 0.1}):
        values, weights = margin_ranking_module.term(
            student, None, batch, context, **options
        )
        expected, _ = losses.margin_ranking(
            student["similarities"], LABELS, OLD, NEW, **options
        )
        np.testing.assert_array_equal(values, expected)
        np.testing.assert_array_equal(weights, [1, 0, 1, 0, 0, 0])
        pairs = ranking_oracle(
            np.asarray(student["similarities"])[:3],
            LABELS[:3],
            OLD,
            NEW,
            options.get("k", 2),
            options.get("margin", 0.5),
        )
        np.testing.assert_allclose(weighted_mean(values, weights), pairs[0], rtol=1e-5)


@pytest.mark.parametrize("name", ["less_forget", "margin_ranking"])
def test_padding_rows_do_not_matter(name: str) -> None:
    rng = np.random.default_rng(7)
    student, teacher = outputs(rng), outputs(rng)
    term: Callable = importlib.import_module(f"bsce_jax.losses.{name}").term
    context = types.SimpleNamespace(old=OLD, seen=SEEN)
    valid = jnp.asarray([1, 1, 1, 1, 0, 0], jnp.float32)

    def loss(student: dict, labels: np.ndarray) -> jax.Array:
        batch = types.SimpleNamespace(labels=labels, valid=valid)
        return weighted_mean(*term(student, teacher, batch, context))

    garbage = jax.tree.map(lambda x: x.at[4].set(0).at[5].set(1e6), student)
    labels = np.where(valid > 0, LABELS, [0] * 4 + [-1, C])
    loss_and_gradient = jax.jit(jax.value_and_grad(loss))
    expected = loss_and_gradient(student, LABELS)
    found = loss_and_gradient(garbage, labels)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    used = {"less_forget": "features", "margin_ranking": "similarities"}[name]
    assert expected[0] > 0 and np.any(found[1][used][:4])
    np.testing.assert_array_equal(found[1][used][4:], 0)


@pytest.mark.parametrize("name", ["less_forget", "margin_ranking"])
def test_the_attribute_is_the_function_and_the_import_the_module(name: str) -> None:
    module = importlib.import_module(f"bsce_jax.losses.{name}")
    assert isinstance(module, types.ModuleType) and module.NEEDS_OLD_CLASSES
    assert getattr(bsce_jax.losses, name) is getattr(module, name)
    assert name in losses.__all__
