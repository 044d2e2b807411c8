"""PODNet's losses: the authors' NCA, formulas, gradients, PyTorch and invariants."""

import functools
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

import bsce_jax
from bsce_jax import log_prior, losses

Parity = Callable[[str], Mapping[str, np.ndarray]]
B, C = 5, 6
LABELS = np.array([0, 4, 2, 1, 3])
SHAPES = ((B, 4, 3, 2), (B, 2, 2, 5))

nca_module = importlib.import_module("bsce_jax.losses.nca")
pod_flat_module = importlib.import_module("bsce_jax.losses.pod_flat")
pod_spatial_module = importlib.import_module("bsce_jax.losses.pod_spatial")

similarity_arrays = hnp.arrays(np.float64, (B, C), elements=st.floats(-2, 2))
map_arrays = hnp.arrays(np.float64, SHAPES[0], elements=st.floats(-10, 10))


def log_sum_exp(scores: np.ndarray) -> np.ndarray:
    top = scores.max(axis=1, keepdims=True)
    return top[:, 0] + np.log(np.exp(scores - top).sum(axis=1))


def check_second_derivatives(function: Callable, x: object, seed: int) -> None:
    """Forward over reverse, as the meta gradient takes it, by differences."""
    rng = np.random.default_rng(seed)
    tangent = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), x)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(function(x))))
    ends = [
        gradient(jax.tree.map(lambda a, t, h=step: a + h * t, x, tangent))
        for step in (1e-5, -1e-5)
    ]
    by_difference = jax.tree.map(lambda a, b: (a - b) / 2e-5, *ends)
    found = jax.jvp(gradient, (x,), (tangent,))[1]
    for ours, expected in zip(
        jax.tree.leaves(found), jax.tree.leaves(by_difference), strict=True
    ):
        assert np.any(ours)
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-8)


def nca_oracle(
    similarities: np.ndarray,
    labels: np.ndarray,
    scale: float,
    margin: float,
    exact: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, and their gradients by the similarities and by the scale."""
    rows, classes = similarities.shape
    onehot = np.eye(classes)[labels]
    of_label = similarities[np.arange(rows), labels]
    others = np.where(onehot > 0, -np.inf, scale * similarities)
    top = np.argmax(scale * similarities, axis=1)
    if exact:
        denominator = log_sum_exp(others)
        values = denominator - scale * (of_label - margin)
    else:
        extra = (scale * similarities)[np.arange(rows), top]
        denominator = log_sum_exp(np.concatenate([others, extra[:, None]], axis=1))
        values = denominator - scale * of_label
    by_scores = np.exp(others - denominator[:, None]) - onehot
    if not exact:  # through the maximum
        by_scores[np.arange(rows), top] += np.exp(extra - denominator)
    by_scale = (by_scores * similarities).sum(axis=1) + (margin if exact else 0)
    active = values > 0 if exact else np.ones(rows, bool)
    return (
        np.where(active, values, 0),
        np.where(active[:, None], scale * by_scores, 0),
        np.where(active, by_scale, 0),
    )


@functools.partial(jax.jit, static_argnames="exact")
def nca_and_gradients(
    similarities: jax.Array,
    labels: jax.Array,
    scale: float,
    margin: float = 0.6,
    exact: bool = False,
    seen: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values [B], and gradients of their mean by similarities and scale."""

    def mean(s: jax.Array, eta: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = losses.nca(s, labels, eta, margin, exact, seen)
        return jnp.mean(values), values

    scale = jnp.asarray(scale, similarities.dtype)
    gradients, values = jax.grad(mean, (0, 1), has_aux=True)(similarities, scale)
    return values, *gradients


@jax.jit
def pod_and_gradient(maps: list, teacher: list) -> tuple[jax.Array, list]:
    """Values [B], and the gradient of their sum by the maps."""
    values, transpose = jax.vjp(lambda m: losses.pod_spatial(m, teacher), maps)
    return values, transpose(jnp.ones_like(values))[0]


def check_parity(file: Mapping[str, np.ndarray], dtype: type, rtol: float) -> None:
    similarities = file["in_similarities"].astype(dtype)
    labels = file["in_labels"]
    for margin in (0.6, 0.0):
        for scale in (1.0, 5.0):
            case = f"m{margin}_s{scale}"
            values, by_similarities, by_scale = nca_and_gradients(
                similarities, labels, scale, margin
            )
            assert values.dtype == dtype
            for ours, theirs in (
                (jnp.mean(values), file[f"out_{case}"]),
                (by_similarities, file[f"grad_sim_{case}"]),
                (by_scale, file[f"grad_scale_{case}"]),
            ):
                atol = rtol * np.abs(theirs).max()
                np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)
    values = nca_and_gradients(similarities, labels, 5.0)[0]
    first = np.mean(values[:8])
    np.testing.assert_allclose(
        first, file["out_m0.6_s5.0_class_rows_correct"], rtol=rtol
    )
    # The hinge of the authors' code comes after the same loss, which is never negative.
    np.testing.assert_allclose(
        np.mean(np.maximum(values, 0)), file["out_hinge_m0.6_s5.0"], rtol=rtol
    )
    entropy = losses.softmax_cross_entropy(jnp.asarray(5 * similarities), labels)
    np.testing.assert_allclose(values[:8], entropy[:8], rtol=rtol)
    np.testing.assert_allclose(
        np.mean(entropy[:8]), file["out_cross_entropy_rows_correct"], rtol=rtol
    )
    assert (np.asarray(values[8:]) > np.asarray(entropy[8:])).any()


def test_nca_parity(parity: Parity) -> None:
    check_parity(parity("nca"), np.float32, 1e-5)


def test_nca_parity_float64(parity: Parity, x64: None) -> None:
    check_parity(parity("nca"), np.float64, 1e-12)


@pytest.mark.parametrize("exact", [False, True])
@settings(max_examples=15, deadline=None)
@given(similarity_arrays, st.floats(0.1, 8), st.floats(0, 1))
def test_nca_oracle(
    exact: bool, similarities: np.ndarray, scale: float, margin: float
) -> None:
    """The coded and the printed formula, and their gradients by hand."""
    similarities = similarities + 1e-3 * np.arange(C)[None, :]  # hardly ever a tie
    ordered = np.sort(similarities, axis=1)
    if (ordered[:, -1] - ordered[:, -2]).min() < 1e-9:
        return
    with jax.enable_x64(True):
        found = nca_and_gradients(similarities, LABELS, scale, margin, exact)
        values, by_similarities, by_scale = nca_oracle(
            similarities, LABELS, scale, margin, exact
        )
        np.testing.assert_allclose(found[0], values, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found[1], by_similarities / B, atol=1e-12)
        np.testing.assert_allclose(found[2], by_scale.mean(), atol=1e-12)


def test_nca_by_hand() -> None:
    """Two classes: coded and printed, right and wrong, with the hinge at work."""
    similarities = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [0.5, 0.0]])
    labels = np.zeros(3, int)
    coded = losses.nca(similarities, labels, 2.0)
    expected = [np.log(1 + np.exp(-2)), 2 + np.log(2), np.log(1 + np.exp(-1))]
    np.testing.assert_allclose(coded, expected, rtol=1e-6)
    printed = losses.nca(similarities, labels, 2.0, exact=True)
    np.testing.assert_allclose(printed, [0, 2 * 1.6, 2 * 0.1], rtol=1e-5)
    no_margin = losses.nca(similarities, labels, 2.0, 0.0, exact=True)
    np.testing.assert_allclose(no_margin, [0, 2, 0], rtol=1e-6)
    gradient = nca_and_gradients(similarities, labels, 2.0, exact=True)[1]
    np.testing.assert_array_equal(gradient[0], 0)
    np.testing.assert_allclose(gradient[1], [-2 / 3, 2 / 3], rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(similarity_arrays, st.floats(-8, 8))
def test_nca_of_the_most_similar_class_is_cross_entropy(
    similarities: np.ndarray, scale: float
) -> None:
    with jax.enable_x64(True):
        scores = scale * similarities
        labels = np.argmax(scores, axis=1)
        values = nca_and_gradients(similarities, labels, scale)[0]
        entropy = losses.softmax_cross_entropy(jnp.asarray(scores), labels)
        np.testing.assert_allclose(values, entropy, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scale", [3.0, 1.0, -2.0])
@pytest.mark.parametrize("exact", [False, True])
def test_nca_excluded_classes_change_nothing(
    x64: None, scale: float, exact: bool
) -> None:
    """The same as without their columns, whatever is there, and no gradient."""
    similarities = np.random.default_rng(0).normal(size=(B, C))
    seen = np.array([True, True, False, True, True, False])
    labels = np.array([0, 4, 3, 1, 3])
    position = np.cumsum(seen) - 1
    similarities[:, ~seen] = 50 * similarities[:, ~seen]
    found = nca_and_gradients(similarities, labels, scale, 0.6, exact, seen)
    without = nca_and_gradients(
        similarities[:, seen], position[labels], scale, 0.6, exact
    )
    np.testing.assert_allclose(found[0], without[0], rtol=1e-12)
    np.testing.assert_allclose(found[1][:, seen], without[1], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found[2], without[2], rtol=1e-12)
    np.testing.assert_array_equal(found[1][:, ~seen], 0)


@pytest.mark.parametrize("exact", [False, True])
def test_nca_is_stable(exact: bool) -> None:
    """No overflow, whichever class leads; one class; labels that are no class."""
    similarities = jnp.asarray([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]])
    labels = np.zeros(3, int)
    for found in nca_and_gradients(similarities, labels, 5.0, 0.6, exact):
        assert np.isfinite(found).all()
    values = nca_and_gradients(similarities, labels, 5.0, 0.6, exact)[0]
    np.testing.assert_allclose(values[1], 1e5, rtol=1e-4)
    for seen in (np.arange(3) < 1, np.arange(3) < 0, np.arange(3) == 1):
        arguments = (labels, 5.0, 0.6, exact, seen)
        for found in nca_and_gradients(similarities, *arguments):
            assert np.isfinite(found).all()
    only = np.arange(3) < 1
    values, gradient, _ = nca_and_gradients(similarities, labels, 1.0, 0.6, exact, only)
    np.testing.assert_array_equal(values, 0)
    np.testing.assert_array_equal(gradient, 0)
    outside = np.array([-1, 3, 99])
    for found in nca_and_gradients(similarities, outside, 1.0, 0.6, exact):
        np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("exact", [False, True])
def test_nca_second_derivatives(x64: None, exact: bool) -> None:
    similarities = jnp.asarray(np.random.default_rng(1).normal(size=(B, C)))
    check_second_derivatives(
        lambda x: losses.nca(x[0], LABELS, x[1], exact=exact),
        (similarities, jnp.asarray(2.0)),
        seed=1,
    )


@pytest.mark.parametrize("exact", [False, True])
def test_nca_gradient_has_no_scatter(exact: bool) -> None:
    gradient = jax.grad(lambda s: jnp.sum(losses.nca(s, LABELS, 2.0, exact=exact)))
    text = jax.jit(gradient).lower(jnp.ones((B, C))).as_text()
    assert "reduce" in text and "scatter" not in text and "gather" not in text


def pooled(values: np.ndarray) -> np.ndarray:
    """Unit vectors of one map, by loops over the samples."""
    rows = []
    for sample in np.square(values.astype(np.float64)):
        over_height, over_width = sample.sum(axis=0), sample.sum(axis=1)
        row = np.concatenate([over_width.ravel(), over_height.ravel()])
        rows.append(row / max(np.sqrt((row**2).sum()), 1e-12))
    return np.array(rows)


def pod_oracle(maps: list[np.ndarray], teacher_maps: list[np.ndarray]) -> np.ndarray:
    return np.mean(
        [
            np.sqrt(((pooled(a) - pooled(b)) ** 2).sum(axis=1))
            for a, b in zip(maps, teacher_maps, strict=True)
        ],
        axis=0,
    )


def random_maps(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in SHAPES]


def test_pod_spatial_oracle(x64: None) -> None:
    """Values, and the gradient against differences of the NumPy formula."""
    maps, teacher = random_maps(0), random_maps(1)
    arrays = [jnp.asarray(m) for m in maps]
    theirs = [jnp.asarray(m) for m in teacher]
    values, gradient = jax.device_get(pod_and_gradient(arrays, theirs))
    np.testing.assert_allclose(values, pod_oracle(maps, teacher), rtol=1e-12)
    for which, found in enumerate(gradient):
        for index in np.ndindex(maps[which].shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [m.copy() for m in maps]
                moved[which][index] += step
                ends.append(pod_oracle(moved, teacher)[index[0]])
            expected = (ends[0] - ends[1]) / 2e-6
            np.testing.assert_allclose(found[index], expected, rtol=1e-5, atol=1e-8)


def test_pod_spatial_by_hand() -> None:
    """One pixel of one channel each: the pooled vectors are one-hot pairs."""
    ours = np.zeros((1, 2, 2, 1), np.float32)
    theirs = ours.copy()
    ours[0, 0, 0, 0], theirs[0, 0, 1, 0] = -3, 5
    value = losses.pod_spatial([jnp.asarray(ours)], [jnp.asarray(theirs)])
    np.testing.assert_allclose(value, 1, rtol=1e-6)  # the same row, another column
    theirs = theirs[:, ::-1]
    value = losses.pod_spatial([jnp.asarray(ours)], [jnp.asarray(theirs)])
    np.testing.assert_allclose(value, np.sqrt(2), rtol=1e-6)
    zero = jnp.zeros_like(ours)
    value = losses.pod_spatial([jnp.asarray(ours)], [zero])
    np.testing.assert_allclose(value, 1, rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(map_arrays, map_arrays, st.floats(0.01, 100))
def test_pod_spatial_invariants(a: np.ndarray, b: np.ndarray, factor: float) -> None:
    a[:, 0, 0, 0] += np.where(a[:, 0, 0, 0] < 0, -1, 1)  # no map of zeros
    b[:, 0, 0, 0] += np.where(b[:, 0, 0, 0] < 0, -1, 1)
    with jax.enable_x64(True):
        pod = jax.jit(losses.pod_spatial)
        values = np.asarray(pod([a], [b]))
        assert (values >= 0).all() and (values <= np.sqrt(2) + 1e-12).all()
        # Not closer: where both agree the distance is a root of rounding errors.
        for same in (
            pod([b], [a]),
            pod([factor * a], [-b]),
            pod([a, a], [b, b]),
        ):
            np.testing.assert_allclose(same, values, rtol=1e-10, atol=1e-11)
        np.testing.assert_array_equal(pod([a], [a]), 0)


def test_pod_spatial_second_derivatives(x64: None) -> None:
    theirs = [jnp.asarray(m) for m in random_maps(1)]
    arrays = [jnp.asarray(m) for m in random_maps(2)]
    check_second_derivatives(lambda m: losses.pod_spatial(m, theirs), arrays, seed=2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pod_spatial_is_finite_at_equal_and_at_zero_maps(dtype: type) -> None:
    """Values, gradients and their directional derivatives."""
    tangent = [jnp.asarray(m, dtype) for m in random_maps(4)]

    @jax.jit
    def everything(maps: list, teacher: list) -> tuple:
        gradient = jax.grad(lambda m: jnp.sum(losses.pod_spatial(m, teacher)))
        values = losses.pod_spatial(maps, teacher)
        return values, *jax.jvp(gradient, (maps,), (tangent,))

    for size in (0.0, 1e-20, 1e-7, 1e-6, 1e-3, 1.0):
        maps = [jnp.asarray(size * m, dtype) for m in random_maps(3)]
        for teacher in (maps, tangent, [jnp.zeros_like(m) for m in maps]):
            for found in jax.tree.leaves(everything(maps, teacher)):
                assert np.isfinite(np.asarray(found, np.float32)).all(), size
        for found in jax.tree.leaves(everything(maps, maps)[:2]):
            np.testing.assert_array_equal(np.asarray(found, np.float32), 0)


def test_pod_spatial_equals_pytorch(x64: None) -> None:
    """With PyTorch's layout, `normalize` and norm; one sample with equal maps."""
    torch = pytest.importorskip("torch")
    maps, teacher = random_maps(5), random_maps(6)
    for a, b in zip(maps, teacher, strict=True):
        a[1] = b[1]
    theirs = [torch.tensor(m.transpose(0, 3, 1, 2), requires_grad=True) for m in maps]
    total = torch.zeros(B, dtype=torch.float64)
    for a, m in zip(theirs, teacher, strict=True):
        b = torch.tensor(m.transpose(0, 3, 1, 2))
        vectors = [
            torch.nn.functional.normalize(
                torch.cat([x.pow(2).sum(3).flatten(1), x.pow(2).sum(2).flatten(1)], 1)
            )
            for x in (a, b)
        ]
        total = total + torch.linalg.vector_norm(vectors[0] - vectors[1], dim=1)
    values = total / len(maps)
    values.sum().backward()
    arrays = [jnp.asarray(m) for m in maps]
    others = [jnp.asarray(m) for m in teacher]
    found, gradient = pod_and_gradient(arrays, others)
    np.testing.assert_allclose(found, values.detach().numpy(), rtol=1e-12)
    for ours, tensor in zip(gradient, theirs, strict=True):
        expected = tensor.grad.numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(ours, expected, rtol=1e-11, atol=1e-14)


def test_pod_spatial_wants_as_many_maps_of_both() -> None:
    maps = [jnp.asarray(m) for m in random_maps(0)]
    for arguments in ((maps, maps[:1]), ([], [])):
        with pytest.raises(ValueError):
            losses.pod_spatial(*arguments)


def test_no_gradient_into_the_teacher() -> None:
    maps, teacher = ([jnp.asarray(m) for m in random_maps(s)] for s in (0, 1))
    for found in jax.grad(lambda t: jnp.sum(losses.pod_spatial(maps, t)))(teacher):
        np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_computed_in_float32(dtype: type) -> None:
    """Half precision loses nothing but its own rounding; squares do not overflow."""
    maps, teacher = (
        [jnp.asarray(300 * m, dtype) for m in random_maps(s)] for s in (0, 1)
    )
    rng = np.random.default_rng(7)
    similarities = [jnp.asarray(rng.normal(size=(B, C)), dtype)]
    for function, arguments in (
        (losses.pod_spatial, (maps, teacher)),
        (lambda s: losses.nca(s[0], LABELS, 3.0), (similarities,)),
        (lambda s: losses.nca(s[0], LABELS, 3.0, exact=True), (similarities,)),
    ):
        ours = function(*arguments)
        assert ours.dtype == jnp.float32 and np.isfinite(ours).all()
        exact = jax.tree.map(lambda x: x.astype(jnp.float32), arguments)
        np.testing.assert_array_equal(ours, function(*exact))


def outputs(rng: np.random.Generator) -> dict:
    return {
        "features": jnp.asarray(rng.normal(size=(B, 4)), jnp.float32),
        "maps": [jnp.asarray(rng.normal(size=s), jnp.float32) for s in SHAPES],
        "similarities": jnp.asarray(rng.normal(size=(B, C)), jnp.float32),
        "scale": jnp.float32(1.5),
    }


SEEN = np.arange(C) < 5
CONTEXT = types.SimpleNamespace(
    old=np.arange(C) < 3, seen=SEEN, log_prior=log_prior.uniform(SEEN)
)


def test_terms() -> None:
    """A term is its function, weighted by the valid rows."""
    rng = np.random.default_rng(8)
    student, teacher = outputs(rng), outputs(rng)
    valid = jnp.asarray([1, 1, 1, 0, 0], jnp.float32)
    batch = types.SimpleNamespace(labels=LABELS, valid=valid)
    flat = losses.less_forget(student["features"], teacher["features"])
    spatial = losses.pod_spatial(student["maps"], teacher["maps"])
    cases = [(pod_flat_module, {}, flat), (pod_spatial_module, {}, spatial)]
    for options in ({}, {"exact": True}, {"exact": True, "margin": 0.1}):
        expected = losses.nca(
            student["similarities"], LABELS, student["scale"], seen=SEEN, **options
        )
        cases.append((nca_module, options, expected))
    for module, options, expected in cases:
        values, weights = module.term(student, teacher, batch, CONTEXT, **options)
        np.testing.assert_array_equal(values, expected)
        np.testing.assert_array_equal(weights, valid)


USED = {"nca": "similarities", "pod_flat": "features", "pod_spatial": "maps"}


@pytest.mark.parametrize("name", USED)
def test_padding_rows_do_not_matter(name: str) -> None:
    rng = np.random.default_rng(9)
    student, teacher = outputs(rng), outputs(rng)
    term: Callable = importlib.import_module(f"bsce_jax.losses.{name}").term
    valid = jnp.asarray([1, 1, 1, 0, 0], jnp.float32)

    def loss(student: dict, labels: np.ndarray) -> jax.Array:
        batch = types.SimpleNamespace(labels=labels, valid=valid)
        values, weights = term(student, teacher, batch, CONTEXT)
        return jnp.sum(values * weights) / jnp.sum(weights)

    garbage = jax.tree.map(
        lambda x: x.at[3].set(0).at[4].set(1e6) if x.ndim else x, student
    )
    loss_and_gradient = jax.jit(jax.value_and_grad(loss))
    expected = loss_and_gradient(student, LABELS)
    for labels in ([0, 4, 2, 0, 5], [0, 4, 2, -1, C]):  # 5 is not seen
        found = loss_and_gradient(garbage, np.array(labels))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    for gradient in jax.tree.leaves(found[1][USED[name]]):
        assert np.any(gradient[:3])
        np.testing.assert_array_equal(gradient[3:], 0)


def test_what_the_modules_say_of_their_terms() -> None:
    assert pod_flat_module.NEEDS_OLD_CLASSES and pod_spatial_module.NEEDS_OLD_CLASSES
    assert not hasattr(nca_module, "NEEDS_OLD_CLASSES")
    assert nca_module.CLASSIFICATION and nca_module.NEEDS_SIMILARITIES


@pytest.mark.parametrize("name", ["nca", "pod_spatial"])
def test_the_attribute_is_the_function_and_the_import_the_module(name: str) -> None:
    module = importlib.import_module(f"bsce_jax.losses.{name}")
    assert isinstance(module, types.ModuleType)
    assert getattr(bsce_jax.losses, name) is getattr(module, name)
    assert name in losses.__all__
