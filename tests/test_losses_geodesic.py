"""GeoDL's geodesic distance: pooling, kernel by quadrature, loss, padding, devices."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsce_jax.compute.state import Batch, total_over_devices
from bsce_jax.errors import UserError

module = importlib.import_module("bsce_jax.losses.geodesic")
Arrays = tuple[np.ndarray, np.ndarray]

ROWS, SIDE, CHANNELS = 16, 3, 5
SIZE = 4 * CHANNELS  # of the pooled features


def pooled(maps: np.ndarray, size: int = 2) -> np.ndarray:
    """PyTorch's adaptive average pooling, pixel by pixel."""
    height, width = maps.shape[1:3]
    windows = []
    for i in range(size):
        for j in range(size):
            top, left = (
                int(np.floor(i * height / size)),
                int(np.floor(j * width / size)),
            )
            bottom = int(np.ceil((i + 1) * height / size))
            right = int(np.ceil((j + 1) * width / size))
            pixels = [
                maps[:, h, w] for h in range(top, bottom) for w in range(left, right)
            ]
            windows.append(sum(pixels) / len(pixels))
    return np.concatenate(windows, axis=1)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def basis(x: np.ndarray, count: int) -> np.ndarray:
    """Leading eigenvectors of the scatter matrix: not by the SVD that is under test."""
    centred = unit(x) - unit(x).mean(axis=1, keepdims=True)
    return np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :count]


def flow(x: np.ndarray, y: np.ndarray, count: int) -> tuple:
    """Basis of the geodesic from y's subspace to x's as a function of t."""
    start, end = basis(y, count), basis(x, count)
    null = np.linalg.qr(start, mode="complete")[0][:, count:]
    u, cosines, vt = np.linalg.svd(start.T @ end)
    aside = null.T @ end @ vt.T
    sines = np.linalg.norm(aside, axis=0)
    theta = np.arctan2(sines, cosines)
    turned = null @ aside / np.maximum(sines, 1e-14)[None, :]
    return (
        start,
        end,
        lambda t: start @ u * np.cos(t * theta) + turned * np.sin(t * theta),
    )


def kernel_oracle(x: np.ndarray, y: np.ndarray, count: int) -> np.ndarray:
    """The flow's integral by 20 points of Gauss and Legendre."""
    _, _, at = flow(x, y, count)
    points, weights = np.polynomial.legendre.leggauss(20)
    return sum(
        w / 2 * at((t + 1) / 2) @ at((t + 1) / 2).T
        for t, w in zip(points, weights, strict=True)
    )


def loss_oracle(x: np.ndarray, y: np.ndarray, kernel: np.ndarray) -> Arrays:
    """Values, and the gradient of their sum by x, the kernel being constant."""
    gx, gy = x @ kernel, y @ kernel
    xx, xy, yy = (
        (a * b).sum(axis=1, keepdims=True) for a, b in ((gx, x), (gx, y), (gy, y))
    )
    gradient = -(gy - gx * xy / xx) / np.sqrt(xx * yy)
    return 1 - (xy / np.sqrt(xx * yy))[:, 0], gradient


def features(
    seed: int, rows: int = ROWS, size: int = SIZE, drift: float = 0.5
) -> Arrays:
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(rows, size)) + 0.5
    return y + drift * rng.normal(size=y.shape), y


@jax.jit
def kernel_of(x: jax.Array, y: jax.Array, valid: jax.Array) -> jax.Array:
    """Of few shapes and types: it takes long to compile."""
    return module.geodesic_kernel(x, y, valid)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("side", [(1, 2), (4, 7), (5, 3)])
def test_pooling(x64: None, side: tuple[int, int], size: int) -> None:
    maps = np.random.default_rng(0).normal(size=(2, *side, 3))
    found = module.adaptive_average_pool(jnp.asarray(maps), size)
    np.testing.assert_allclose(found, pooled(maps, size), rtol=1e-13, atol=1e-15)


def test_pooling_overlaps_and_refuses_no_window() -> None:
    maps = jnp.arange(7.0).reshape(1, 7, 1, 1)
    np.testing.assert_array_equal(
        module.adaptive_average_pool(maps)[0, ::2], [1.5, 4.5]
    )
    with pytest.raises(UserError, match="size=0, allowed: at least 1"):
        module.adaptive_average_pool(maps, 0)


# More features than rows, as many, and fewer.
@pytest.mark.parametrize("size", [SIZE, ROWS, 7])
@pytest.mark.parametrize("drift", [0.02, 0.5, 5.0])
def test_kernel_is_the_integral(x64: None, size: int, drift: float) -> None:
    x, y = features(1, size=size, drift=drift)
    count = min(ROWS, size) - 2
    start, end, at = flow(x, y, count)
    for t, other in ((0, start), (1, end)):  # the oracle leads from one to the other
        np.testing.assert_allclose(at(t) @ at(t).T, other @ other.T, atol=1e-9)
    found = kernel_of(x, y, np.ones(ROWS))
    np.testing.assert_allclose(found, kernel_oracle(x, y, count), atol=1e-8)
    np.testing.assert_allclose(np.trace(found), count, rtol=1e-12)
    np.testing.assert_allclose(found, found.T, atol=1e-14)
    values = np.linalg.eigvalsh(found)
    assert values[0] > -1e-13 and values[-1] < 1 + 1e-12


def test_kernel_in_float32() -> None:
    for drift in (1e-3, 0.5):
        x, y = features(2, drift=drift)
        found = kernel_of(
            *(jnp.asarray(a, jnp.float32) for a in (x, y)), jnp.ones(ROWS)
        )
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, kernel_oracle(x, y, ROWS - 2), atol=1e-5)


def test_kernel_of_equal_subspaces_is_their_projection(x64: None) -> None:
    """All angles are 0: a sample's length and the order of the rows do not count."""
    x, _ = features(3)
    found = kernel_of(x, 3 * x[::-1], np.ones(ROWS))
    projection = basis(x, ROWS - 2)
    np.testing.assert_allclose(found, projection @ projection.T, atol=1e-10)


@pytest.mark.parametrize("dtype,atol", [(np.float64, 1e-8), (np.float32, 1e-5)])
@pytest.mark.parametrize("left", [15, 7, 4, 3])
def test_padding_rows_take_no_part(left: int, dtype: type, atol: float) -> None:
    """The kernel is that of the valid rows, wherever these stand in the batch."""
    x, y = (a.astype(dtype) for a in features(4))
    valid = np.zeros(ROWS, dtype)
    rows = np.random.default_rng(left).permutation(ROWS)[:left]
    valid[rows] = 1
    garbage = np.where(valid[:, None] > 0, 0, np.arange(SIZE)[None, :] * 1e3)
    with jax.enable_x64(dtype == np.float64):
        found = kernel_of(*((a + garbage).astype(dtype) for a in (x, y)), valid)
    alone = kernel_oracle(x[rows].astype(float), y[rows].astype(float), left - 2)
    np.testing.assert_allclose(found, alone, atol=atol)
    np.testing.assert_allclose(np.trace(found), left - 2, rtol=1e-5)


@pytest.mark.parametrize("dtype,atol", [(np.float64, 1e-8), (np.float32, 1e-5)])
def test_repeated_rows_span_less(dtype: type, atol: float) -> None:
    """Seven directions of sixteen rows: seven dimensions, none of rounding errors.

    As many in both subspaces also where only one of the models repeats itself.
    """
    x, y = features(5)
    again = np.arange(ROWS) % 7
    for points in ((x[again], y[again]), (x, y[again]), (x[again], y)):
        with jax.enable_x64(dtype == np.float64):
            found = kernel_of(*(a.astype(dtype) for a in points), np.ones(ROWS, dtype))
        np.testing.assert_allclose(found, kernel_oracle(*points, 7), atol=atol)


def test_an_orthogonal_direction_is_not_lost(x64: None) -> None:
    """Its cosine is 0; among dimensions that are left out it must stay what it is."""
    rng = np.random.default_rng(16)
    ones = np.ones((SIZE, 1))
    q = np.linalg.qr(np.concatenate([ones, rng.normal(size=(SIZE, 6))], axis=1))[0]
    q = q[:, 1:].T  # rows of mean 0
    x, y = (rng.normal(size=(ROWS, 5)) @ q[[0, 1, 2, 3, last]] for last in (4, 5))
    found = q @ np.asarray(kernel_of(x, y, np.ones(ROWS))) @ q.T
    # The quarter turn may go either way round.
    np.testing.assert_allclose(np.abs(found[4, 5]), 1 / np.pi, atol=1e-12)
    found[4, 5] = found[5, 4] = 0
    np.testing.assert_allclose(found, np.diag([1, 1, 1, 1, 0.5, 0.5]), atol=1e-12)


@pytest.mark.parametrize("left", [0, 1, 2])
def test_kernel_of_too_few_rows_is_zero(left: int) -> None:
    x, y = features(6)
    valid = (np.arange(ROWS) < left).astype(np.float32)
    found = kernel_of(x.astype(np.float32), y.astype(np.float32), valid)
    np.testing.assert_allclose(found, 0, atol=1e-12)


def test_loss_oracle(x64: None) -> None:
    x, y = features(7)
    kernel = kernel_oracle(x, y, ROWS - 2)
    loss = jax.jit(lambda a, b: module.geodesic(a, b, kernel))
    by_both = jax.jit(jax.grad(lambda a, b: jnp.sum(loss(a, b)), (0, 1)))
    expected, gradient = loss_oracle(x, y, kernel)
    np.testing.assert_allclose(loss(x, y), expected, atol=1e-13)
    ours, theirs = by_both(x, y)
    np.testing.assert_allclose(ours, gradient, atol=1e-13)
    np.testing.assert_array_equal(theirs, 0)
    np.testing.assert_allclose(loss(3 * y, y), 0, atol=1e-14)
    np.testing.assert_allclose(loss(-y, y), 2, atol=1e-14)


def test_loss_outside_the_subspace_is_one_and_finite() -> None:
    kernel = jnp.diag(jnp.asarray([1.0, 1.0, 0.0]))
    x = jnp.asarray([[0.0, 0, 0], [0, 0, 2], [1, 1, 0], [1e-30, 0, 0], [0, 0, 0]])
    y = jnp.asarray([[1.0, 0, 0], [1, 2, 3], [0, 0, 1], [1, 0, 0], [0, 0, 0]])
    values = jax.jit(module.geodesic)(x, y, kernel)
    np.testing.assert_allclose(values, 1, atol=1e-6)
    gradient = jax.grad(lambda a: jnp.sum(module.geodesic(a, y, kernel)))
    both = jax.jit(lambda a: jax.jvp(gradient, (a,), (jnp.ones_like(a),)))
    for found in both(x):
        assert np.isfinite(found).all()


def share(
    maps: jax.Array, theirs: jax.Array, valid: jax.Array, axis: str | None = None
) -> jax.Array:
    """A device's share of the loss, as a training step takes it."""
    batch = Batch(images=None, labels=None, valid=valid, axis_name=axis)
    outputs = [{"maps": [jnp.zeros((1, 1, 1, 1)), m]} for m in (maps, theirs)]
    values, weights = module.term(*outputs, batch, None)
    total = total_over_devices(jnp.sum(weights), axis)
    return jnp.sum(values * weights) / jnp.where(total > 0, total, 1)


loss_and_gradient = jax.jit(jax.value_and_grad(share))


def maps_of(seed: int, rows: int, dtype: type = np.float64) -> Arrays:
    rng = np.random.default_rng(seed)
    theirs = rng.normal(size=(rows, SIDE, SIDE, CHANNELS)) + 0.5
    maps = theirs + 0.5 * rng.normal(size=theirs.shape)
    return maps.astype(dtype), theirs.astype(dtype)


@pytest.mark.parametrize("dtype,rtol", [(np.float64, 1e-8), (np.float32, 1e-4)])
@pytest.mark.parametrize("left", [ROWS, 9, 4, 3, 0])
def test_term(left: int, dtype: type, rtol: float) -> None:
    """From maps to the mean loss of the valid rows, and its gradient by the maps.

    The kernel is of as many dimensions as these rows allow; with fewer than four rows
    there is no loss.
    """
    maps, theirs = (m.astype(dtype) for m in maps_of(8, ROWS))
    maps[left:], theirs[left:] = 1e4, -7
    valid = (np.arange(ROWS) < left).astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        found = loss_and_gradient(maps, theirs, valid)
    loss, gradient = (np.asarray(a) for a in found)
    assert loss.dtype == dtype and gradient.dtype == dtype
    np.testing.assert_array_equal(gradient[left:], 0)
    if left < 4:
        assert loss == 0 and not np.any(gradient)
        return
    x, y = (pooled(m[:left].astype(np.float64)) for m in (maps, theirs))
    values, by_features = loss_oracle(x, y, kernel_oracle(x, y, left - 2))
    np.testing.assert_allclose(loss, values.mean(), rtol=rtol)
    tangents = np.random.default_rng(9).normal(size=(5, *maps[:left].shape))
    for tangent in tangents:
        expected = np.sum(by_features * pooled(tangent)) / left  # pooling is linear
        found = np.sum(gradient[:left] * tangent)
        np.testing.assert_allclose(found, expected, rtol=10 * rtol, atol=rtol / 100)
    assert module.NEEDS_OLD_CLASSES


def test_an_unchanged_network_and_dead_features() -> None:
    maps, theirs = maps_of(11, ROWS, np.float32)
    loss, gradient = loss_and_gradient(theirs, theirs, np.ones(ROWS, np.float32))
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    for pair in ((0 * maps, theirs), (maps, 0 * theirs), (0 * maps, 0 * maps)):
        for found in loss_and_gradient(*pair, np.ones(ROWS, np.float32)):
            assert np.isfinite(found).all()


def test_half_precision_is_pooled_in_float32() -> None:
    maps, theirs = (jnp.asarray(m, jnp.bfloat16) for m in maps_of(12, ROWS))
    valid = jnp.ones(ROWS)
    loss, gradient = loss_and_gradient(maps, theirs, valid)
    assert loss.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(gradient, np.float32)).all()
    exact, _ = loss_and_gradient(
        *(m.astype(jnp.float32) for m in (maps, theirs)), valid
    )
    np.testing.assert_array_equal(loss, exact)


def test_second_derivatives_pass_by_the_kernel(x64: None) -> None:
    """Forward over reverse, as the meta gradient takes it: the kernel is a constant."""
    x, y = features(13)
    kernel = kernel_of(x, y, np.ones(ROWS))

    def loss(a: jax.Array, fixed: bool) -> jax.Array:
        g = kernel if fixed else module.geodesic_kernel(a, y, np.ones(ROWS))
        return jnp.sum(module.geodesic(a, y, g))

    tangent = np.random.default_rng(14).normal(size=x.shape)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(fixed: bool) -> tuple[jax.Array, jax.Array]:
        gradient = jax.grad(functools.partial(loss, fixed=fixed))
        return jax.jvp(gradient, (x,), (tangent,))

    found = [derivatives(fixed) for fixed in (False, True)]
    for ours, expected in zip(*found, strict=True):
        assert np.any(expected)
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


def test_eight_devices_are_one(x64: None) -> None:
    """Values and gradients; three rows are padding, so the last device has none."""
    maps, theirs = maps_of(15, ROWS)
    valid = (np.arange(ROWS) < 13).astype(np.float64)
    maps[13:] = 1e3
    loss, gradient = loss_and_gradient(maps, theirs, valid)
    parts = [x.reshape(8, 2, *x.shape[1:]) for x in (maps, theirs, valid)]
    step = jax.pmap(jax.value_and_grad(functools.partial(share, axis="d")), "d")
    shares, gradients = step(*parts)
    np.testing.assert_allclose(np.sum(np.asarray(shares)), loss, rtol=1e-12)
    found = np.asarray(gradients).reshape(maps.shape)
    assert np.any(found[:13])
    np.testing.assert_allclose(found, gradient, rtol=1e-9, atol=1e-13)
