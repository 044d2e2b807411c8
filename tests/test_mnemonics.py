"""Mnemonics: exemplars as parameters, the unrolled head, and where they are stored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsce_jax.compute.state import OWN, Batch, Network
from bsce_jax.methods import Sizes, Step, mnemonics
from bsce_jax.models.convolution import Convolution, convolve
from bsce_jax.run.context import test_context as context_of

CLASSES, D, M, RATE, PASSES = 5, 4, 3, 0.5, 2
SIZES = Sizes(classes=CLASSES, features=D, image=(2, 2, 1), new=3, exemplars=M)
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 2, 2, 1)).astype(np.uint8)
MEAN, STD = (0.3,), (0.37,)
CONTEXT = context_of(CLASSES, [2, 5])


def step(halves=False, old=2, seen=5, network=None) -> Step:
    """A step whose classes have the images 0 to 2, 3 to 5, ...; one has two only."""
    options = {"inner_rate": RATE, "passes": PASSES, "halves": halves}
    exemplars = [np.arange(3 * c, 3 * c + M - (c == 3)) for c in range(seen)]
    own = mnemonics.initial(SIZES, **options)
    return Step(
        number=1,
        num_old=old,
        num_seen=seen,
        network=network or Network({OWN: own.params}, {}, own.extra),
        new=[],
        exemplars=exemplars,
        features=None,
        options=options,
        rng=np.random.default_rng(0),
        mirrored=False,
        images=lambda indices: IMAGES[indices],
        normalization=(MEAN, STD),
    )


@pytest.mark.parametrize("halves", [False, True])
def test_exemplars_that_did_not_move_come_back_to_the_bit(halves):
    shown = step(halves)
    begun = mnemonics.start(shown)
    rows = begun.extra["rows"].tolist()
    assert rows == ([0, 1, 2, 3, 4] if halves else [2, 3, 4])
    pixels = begun.params[OWN]["pixels"][rows.index(3)]
    np.testing.assert_allclose(pixels[1], (IMAGES[10] / 255 - 0.3) / 0.37, rtol=1e-6)
    found = mnemonics.finish(shown._replace(network=begun))
    indices, images = mnemonics.replaced(found)
    assert sorted(indices) == [6, 7, 8, 9, 10, 12, 13, 14]
    np.testing.assert_array_equal(images, IMAGES[indices])
    assert images.dtype == np.uint8
    assert shown.network.extra["rows"].max() == -1  # what was given stays


def test_learned_exemplars_are_rounded_and_stay_in_range():
    shown = step()
    begun = mnemonics.start(shown)
    pixels = np.array(begun.params[OWN]["pixels"])
    pixels[0, 0] += 2.4 / 255 / 0.37
    pixels[0, 1], pixels[0, 2] = 9.0, -9.0
    moved = begun.replace(params={OWN: {"pixels": pixels}})
    _, images = mnemonics.replaced(mnemonics.finish(shown._replace(network=moved)))
    expected = np.minimum(IMAGES[6].astype(int) + 2, 255)
    np.testing.assert_array_equal(images[0], expected)
    assert (images[1] == 255).all() and (images[2] == 0).all()


def test_a_later_step_keeps_what_earlier_ones_have_stored():
    shown = step(old=0, seen=2)
    first = mnemonics.finish(shown._replace(network=mnemonics.start(shown)))
    changed = dict(first.extra, images=first.extra["images"] // 2)
    later = step(network=first.replace(extra=changed))
    found = mnemonics.finish(later._replace(network=mnemonics.start(later)))
    indices, images = mnemonics.replaced(found)
    expected = np.where((indices < 6)[:, None, None, None], IMAGES[indices] // 2, 0)
    expected[indices >= 6] = IMAGES[indices[indices >= 6]]
    np.testing.assert_array_equal(images, expected)


# The unrolled head


WEIGHTS = np.random.default_rng(1).normal(size=(4, D))


def apply(network, images, valid):
    """Features are a linear function of the pixels."""
    return {"features": images.reshape(len(images), -1) @ WEIGHTS}, network


def cosines(kernel, features):
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return unit @ (kernel / np.linalg.norm(kernel, axis=0))


def probabilities(logits, seen):
    found = np.exp(logits) * seen
    return found / found.sum(axis=1, keepdims=True)


def learned(kernel, scale, features, rows, weights, seen):
    """SGD on the mean cross-entropy of one exemplar a class, its gradient by hand."""
    kernel = kernel.copy()
    for slot in list(range(M)) * PASSES:
        there = weights[:, slot]
        f, labels = features[there, slot], rows[there]
        if not len(f):
            continue
        p = probabilities(scale * cosines(kernel, f), seen)
        p[np.arange(len(f)), labels] -= 1
        unit = f / np.linalg.norm(f, axis=1, keepdims=True)
        lengths = np.linalg.norm(kernel, axis=0)
        direction = kernel / lengths
        towards = scale * unit.T @ p / len(f)  # d loss / d direction
        along = (towards * direction).sum(axis=0)
        kernel -= RATE * (towards - direction * along) / lengths
    return kernel


def arrays(halves):
    rng = np.random.default_rng(2)
    begun = mnemonics.start(step(halves))
    head = {"kernel": rng.normal(size=(D, CLASSES)), "scale": np.float64(3.0)}
    pixels = begun.params[OWN]["pixels"].astype(np.float64)
    images = rng.normal(size=(6, 2, 2, 1))
    return begun, head, pixels, images


def outputs(halves, begun, head, pixels, images):
    network = begun.replace(params={"head": head, OWN: {"pixels": pixels}})
    network, images, context = jax.tree.map(jnp.asarray, (network, images, CONTEXT))
    batch = Batch(images, jnp.zeros(len(images), int), jnp.ones(len(images)))
    out, _ = mnemonics.unrolled(apply, network, batch, context, RATE, PASSES, halves)
    return out["logits"], out["halves"]


@pytest.mark.parametrize("halves", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_unrolled_head_is_that_of_a_loop_in_numpy(halves):
    with jax.enable_x64(True):
        begun, head, pixels, images = arrays(halves)
        logits, loss = map(np.asarray, outputs(halves, begun, head, pixels, images))
    rows, seen = begun.extra["rows"], np.ones(CLASSES)
    features = pixels.reshape(*pixels.shape[:2], -1) @ WEIGHTS
    there = begun.extra["places"][rows] >= 0
    assert not there.all()  # class 3 has two exemplars; old ones have no place yet
    there[rows < 2] = False
    kernel = learned(head["kernel"], 3.0, features, rows, there, seen)
    expected = 3.0 * cosines(kernel, images.reshape(6, -1) @ WEIGHTS)
    np.testing.assert_allclose(logits, expected, rtol=1e-6)
    if not halves:
        assert loss == 0


@pytest.mark.slow
def test_each_half_of_the_old_exemplars_is_judged_by_the_other():
    with jax.enable_x64(True):
        begun, head, pixels, images = arrays(True)
        places = np.where(np.arange(CLASSES)[:, None] < 2, 0, begun.extra["places"])
        begun = begun.replace(extra=dict(begun.extra, places=places))
        rng = np.random.default_rng(3)
        pixels[:2] = rng.normal(size=pixels[:2].shape)
        _, loss = outputs(True, begun, head, pixels, images)
    rows, seen = begun.extra["rows"], np.ones(CLASSES)
    features = pixels.reshape(*pixels.shape[:2], -1) @ WEIGHTS
    expected = 0.0
    for half in (np.array([True, False, True]), np.array([False, True, False])):
        weights = (rows < 2)[:, None] & half
        kernel = learned(head["kernel"], 3.0, features, rows, weights, seen)
        values = [
            -np.log(
                probabilities(3.0 * cosines(kernel, features[c, j][None]), seen)[0, c]
            )
            for c in (0, 1)
            for j in np.flatnonzero(~half)
        ]
        expected += 0.5 * np.mean(values)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_the_gradient_of_the_pixels_goes_through_the_loop():
    """Against central differences in float64."""
    with jax.enable_x64(True):
        begun, head, pixels, images = arrays(False)

        def loss(pixels):
            logits, _ = outputs(False, begun, head, pixels, images)
            return -jax.nn.log_softmax(logits)[:, 3].sum()

        gradient = jax.jit(jax.grad(loss))(pixels)
        compiled = jax.jit(loss)
        for where in ((0, 0, 1, 0, 0), (1, 1, 0, 1, 0), (2, 2, 1, 1, 0)):
            ends = []
            for sign in (1, -1):
                moved = pixels.copy()
                moved[where] += sign * 1e-5
                ends.append(float(compiled(moved)))
            slope = (ends[0] - ends[1]) / 2e-5
            assert gradient[where] == pytest.approx(slope, rel=1e-5)
            assert abs(slope) > 1e-4
        assert not np.asarray(gradient)[1, 2].any()  # no exemplar there


# Factors of kernels


def test_kernels_can_have_factors():
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 3)), jnp.float32)
    model = Convolution(4, scaled=True)
    init = jax.jit(functools.partial(model.init))
    params = init(jax.random.key(0), x)["params"]
    assert params["kernel_scale"].shape == (1, 1, 3, 4)
    assert (np.asarray(params["kernel_scale"]) == 1).all()
    factors = jnp.asarray(rng.normal(size=(1, 1, 3, 4)), jnp.float32)
    found = model.apply({"params": params | {"kernel_scale": factors}}, x)
    expected = convolve(x, params["kernel"] * factors)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
