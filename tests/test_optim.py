"""Optimisers against PyTorch's SGD written out in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsce_jax.compute import optim
from tests.step_example import EVERY_GROUP
from tests.tiny import TinyNet

NOTHING = dict.fromkeys(EVERY_GROUP, 0.0)
SHAPES = {"conv": {"kernel": (3, 2)}, "head": {"kernel": (2, 5), "bias": (5,)}}
RATES = (0.1, 0.1, 0.01, 0.5, 0.03)


def random(seed: int) -> dict:
    """Float64 arrays of SHAPES."""
    rng = np.random.default_rng(seed)
    return {
        module: {name: rng.normal(size=shape) for name, shape in leaves.items()}
        for module, leaves in SHAPES.items()
    }


def torch_sgd(params, gradients, rates, momentum, decay, scale):
    """torch.optim.SGD (no dampening, no Nesterov), an update times `scale`.

    Every update: g += decay * p; buffer = g at first, then momentum * buffer + g;
    p -= rate * buffer. All in float64.
    """
    params = {key: value.copy() for key, value in params.items()}
    buffers: dict = {}
    for gradient, rate in zip(gradients, rates, strict=True):
        for key in params:
            g = gradient[key] + decay * params[key]
            buffers[key] = g if key not in buffers else momentum * buffers[key] + g
            params[key] = params[key] - rate * np.float64(scale[key]) * buffers[key]
    return params


def flat(tree) -> dict:
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def update(momentum, decay, params, state, gradient, rate, scale):
    chain = optim.sgd(momentum, decay)
    direction, state = chain.update(gradient, state, params, decay=1.0)
    return optim.apply(params, direction, rate, scale), state


def train(momentum, decay, params, gradients, rates, scale):
    state = optim.sgd(momentum, decay).init(params)
    for gradient, rate in zip(gradients, rates, strict=True):
        rate = np.asarray(rate, params["conv"]["kernel"].dtype)
        params, state = update(momentum, decay, params, state, gradient, rate, scale)
    return params


@pytest.mark.parametrize(
    ("momentum", "decay"), [(0.9, 2e-4), (0.9, 0.5), (0.0, 0.1), (0.5, 0.0)]
)
def test_sgd_is_pytorchs(x64, momentum, decay):
    params = random(0)
    gradients = [random(i) for i in range(1, len(RATES) + 1)]
    ones = jax.tree.map(lambda p: np.ones((1,) * p.ndim, np.float32), params)
    found = flat(train(momentum, decay, params, gradients, RATES, ones))
    expected = torch_sgd(
        flat(params),
        [flat(g) for g in gradients],
        RATES,
        momentum,
        decay,
        flat(ones),
    )
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-13)
        assert found[key].dtype == np.float64


def test_rows_that_are_not_trained_stay_still_against_decay_and_momentum():
    """In float32, bit for bit; what is trained moves as if they were not there."""
    params = jax.tree.map(np.float32, random(0))
    gradients = [jax.tree.map(np.float32, random(i)) for i in (1, 2, 3)]
    trained = np.array([True, False, True, True, False])
    scale = optim.update_scale(params, EVERY_GROUP, trained)
    found = flat(train(0.9, 0.5, params, gradients, RATES[:3], scale))
    expected = torch_sgd(
        flat(jax.tree.map(np.float64, params)),
        [flat(jax.tree.map(np.float64, g)) for g in gradients],
        RATES[:3],
        0.9,
        0.5,
        flat(scale),
    )
    before = flat(params)
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-5)
        assert found[key].dtype == np.float32
        if "head" in key:
            np.testing.assert_array_equal(
                found[key][..., ~trained], before[key][..., ~trained]
            )
            assert (found[key][..., trained] != before[key][..., trained]).all()
        else:
            assert (found[key] != before[key]).all()


def test_a_scale_between_0_and_1_is_a_learning_rate_of_its_own():
    params = {"a": np.ones(2, np.float32)}
    direction = {"a": np.array([1.0, 2.0], np.float32)}
    scale = {"a": np.array([0.5, 1.0], np.float32)}
    rate = np.float32(0.25)
    found = jax.jit(optim.apply)(params, direction, rate, scale)
    np.testing.assert_array_equal(found["a"], [1 - 0.25 * 0.5, 1 - 0.25 * 2])


def test_the_state_of_the_optimiser_starts_at_zero():
    state = optim.sgd(0.9, 1.0).init(random(0))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state))


def test_update_scale_follows_the_class_axis_of_the_head():
    trained = np.array([True, True, False, False, False])
    network = TinyNet(5)
    shapes = jax.eval_shape(
        functools.partial(network.init, train=False),
        jax.random.key(0),
        jnp.zeros((1, 8, 8, 1)),
    )["params"]
    scale = optim.update_scale(shapes, EVERY_GROUP, trained)
    assert jax.tree.structure(scale) == jax.tree.structure(shapes)
    assert set(scale["head"]) == {"kernel", "bias"}
    for (path, factor), value in zip(
        jax.tree_util.tree_leaves_with_path(scale), jax.tree.leaves(shapes), strict=True
    ):
        assert factor.ndim == value.ndim and factor.dtype == np.float32
        np.broadcast_to(factor, value.shape)
        if path[0].key == "head":
            assert factor.shape[-1] == 5 and set(factor.shape[:-1]) <= {1}
            np.testing.assert_array_equal(factor.reshape(-1), trained)
        else:
            assert factor.size == 1 and factor.item() == 1


PARAMS = {
    "stem": {
        "conv": {"kernel": np.zeros((3, 2)), "kernel_scale": np.zeros((1, 2))},
        "norm": {"scale": np.zeros(2)},
    },
    "block_norm": {"bias": np.zeros(2)},
    "auxiliary": {"dense": {"kernel": np.zeros((2, 4))}},
    "auxiliary_block": {"norm": {"scale": np.zeros(2)}},
    "head": {"kernel": np.zeros((2, 4, 3)), "scale": np.zeros(())},
    "own": {"scale": np.zeros(()), "head": {"kernel": np.zeros((2, 3))}},
}
GROUPS = {
    "['stem']['conv']['kernel']": "convolutions",
    "['stem']['conv']['kernel_scale']": "kernel_scales",
    "['stem']['norm']['scale']": "batch_norms",
    "['block_norm']['bias']": "batch_norms",
    "['auxiliary']['dense']['kernel']": "auxiliary",
    "['auxiliary_block']['norm']['scale']": "auxiliary",
    "['head']['kernel']": "head",
    "['head']['scale']": "scale",
    "['own']['scale']": "own",
    "['own']['head']['kernel']": "own",
}


def test_every_parameter_is_in_a_group():
    leaves = jax.tree_util.tree_leaves_with_path(PARAMS)
    found = {jax.tree_util.keystr(path): optim.group(path) for path, _ in leaves}
    assert found == GROUPS and set(GROUPS.values()) == set(EVERY_GROUP)


@pytest.mark.parametrize("name", EVERY_GROUP)
def test_a_group_has_a_rate_of_its_own(name):
    """Frozen alone, or faster alone; rows of the head besides."""
    rows = np.array([True, True, False])
    for rates in ({**EVERY_GROUP, name: 0.0}, {**NOTHING, name: 10.0}):
        scale = flat(optim.update_scale(PARAMS, rates, rows))
        for path, group in GROUPS.items():
            value = PARAMS
            for key in path[2:-2].split("']['"):
                value = value[key]
            assert scale[path].ndim == value.ndim and scale[path].dtype == np.float32
            expected = np.full((1,) * value.ndim, rates[group], np.float32)
            expected = expected * rows if group == "head" else expected
            np.testing.assert_array_equal(scale[path], expected)


def test_update_scale_of_fine_tuning_moves_the_rows_of_the_head_alone():
    params = {
        "stem": {"kernel": np.zeros((3, 2))},
        "head": {"kernel": np.zeros((2, 4, 3)), "scale": np.zeros(())},
    }
    trained = np.array([True, True, False])
    scale = optim.update_scale(params, {**NOTHING, "head": 1.0}, trained)
    assert scale["stem"]["kernel"].item() == 0.0
    assert scale["head"]["scale"].shape == () and scale["head"]["scale"] == 0.0
    np.testing.assert_array_equal(scale["head"]["kernel"], [[[1, 1, 0]]])
    assert optim.update_scale(params, EVERY_GROUP, trained)["head"]["scale"] == 1.0


def test_clipping_comes_before_weight_decay_entry_by_entry():
    params = {"w": np.array([10.0, -10.0, 1.0], np.float32)}
    gradient = {"w": np.array([7.0, -7.0, 3.0], np.float32)}
    params, gradient = {"layer": params}, {"layer": gradient}
    chain = optim.sgd(0.0, 0.1, clip=5.0)
    direction, _ = chain.update(gradient, chain.init(params), params, decay=1.0)
    np.testing.assert_allclose(direction["layer"]["w"], [6.0, -6.0, 3.1], rtol=1e-6)


@pytest.mark.parametrize("decayed", ["all", "kernels"])
def test_what_decays(decayed):
    """A method's own never; biases and scales, which have one axis, with "all"."""
    gradient = jax.tree.map(np.float32, PARAMS)
    params = jax.tree.map(lambda leaf: leaf + np.float32(2), gradient)
    chain = optim.sgd(0.9, 0.1, decayed=decayed)
    found, _ = chain.update(gradient, chain.init(params), params, decay=0.5)
    for path, direction in flat(found).items():
        kernel = direction.ndim > 1 or decayed == "all"
        expected = 0.1 if kernel and GROUPS[path] != "own" else 0.0
        np.testing.assert_allclose(direction, expected, rtol=1e-6)


def test_noise_has_its_deviation_and_spares_a_method_s_own():
    gradient = {"stem": {"kernel": np.ones((100, 200), np.float32)}}
    gradient["own"] = {"scale": np.ones(50, np.float32)}
    gradient["other"] = {"kernel": np.ones((100, 200), np.float32)}
    add = jax.jit(optim.noise)
    key, deviation = jax.random.key(0), np.float32(0.3)
    found = add(key, gradient, deviation)
    parts = [np.asarray(found[n]["kernel"]) - 1 for n in ("stem", "other")]
    for part in parts:
        assert abs(part.std() - 0.3) < 0.01 and abs(part.mean()) < 0.01
    assert abs(np.corrcoef(parts[0].ravel(), parts[1].ravel())[0, 1]) < 0.03
    np.testing.assert_array_equal(found["own"]["scale"], 1)
    jax.tree.map(np.testing.assert_array_equal, found, add(key, gradient, deviation))
    other = add(jax.random.key(1), gradient, deviation)
    assert np.any(other["stem"]["kernel"] != found["stem"]["kernel"])
    del gradient["own"]
    alone = add(key, gradient, deviation)  # the same without the method's own
    jax.tree.map(np.testing.assert_array_equal, {k: found[k] for k in alone}, alone)
    jax.tree.map(np.testing.assert_array_equal, add(key, gradient, 0.0), gradient)


def test_noise_falls_from_epoch_to_epoch():
    """As the authors', who count from 1: scale / (1 + epoch)^0.55."""
    noise = optim.Noise(0.3, 1)
    found = [float(noise.deviation(jnp.asarray(e))) for e in range(4)]
    expected = [0.3 / (1 + e) ** 0.55 for e in (1, 2, 3, 4)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    slow = optim.Noise(0.3, 3)  # three passes are one epoch
    found = [float(slow.deviation(jnp.asarray(e))) for e in (0, 1, 2, 3, 5, 6)]
    np.testing.assert_allclose(found, np.array(expected)[[0, 0, 0, 1, 1, 2]], rtol=1e-6)
    short = optim.Noise(0.3, 3, short=6)  # each pass stands for six, two epochs
    found = [float(short.deviation(jnp.asarray(e))) for e in (0, 1)]
    np.testing.assert_allclose(found, np.array(expected)[[0, 2]], rtol=1e-6)


def test_lagged_cosine_is_the_scheduler_stepped_at_the_end_of_each_epoch():
    """Epoch 0 at the full rate, epoch e with the rate set at the end of epoch e - 1."""
    epochs, rate = 7, 0.3
    expected = [rate]
    for e in range(epochs - 1):
        expected.append(0.5 * rate * (1 + np.cos(np.pi * e / epochs)))
    found = [optim.lagged_cosine(rate, e, epochs) for e in range(epochs)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found[0] == found[1] > found[2]


def test_the_optimisers_of_alpha():
    alpha = np.float32(1.0)
    gradients = np.array([0.5, -0.25, 2.0], np.float32)
    for name, expected in (
        ("sgd", [1 - 0.1 * 0.5, 1 - 0.1 * 0.25, 1 - 0.1 * 2.25]),
        # Adam's first update is the sign of the gradient, whatever its size.
        ("adam", [0.9, None, None]),
    ):
        optimizer = optim.alpha_optimizer(name, 0.1)
        value, state = alpha, optimizer.init(alpha)
        for gradient, wanted in zip(gradients, expected, strict=True):
            step = jax.jit(optimizer.update)
            change, state = step(gradient, state, value)
            value = np.asarray(optax.apply_updates(value, change))
            if wanted is not None:
                np.testing.assert_allclose(value, wanted, rtol=1e-6)


def test_step_decay_at_the_milestones():
    rates = [optim.step_decay(0.1, e, (2, 5), 0.1) for e in range(7)]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.01, 0.001, 0.001])
    assert optim.step_decay(0.1, 10, (), 0.1) == 0.1
    np.testing.assert_allclose(optim.step_decay(0.1, 3, (3, 3), 0.5), 0.025)


@given(
    milestones=st.lists(st.integers(1, 30), max_size=4).map(sorted),
    decay=st.floats(0.01, 1.0),
)
def test_step_decay_is_the_schedule_run_epoch_by_epoch(milestones, decay):
    """MultiStepLR multiplies when its own count of epochs reaches a milestone."""
    rate = 0.1
    for epoch in range(32):
        rate *= decay ** milestones.count(epoch)
        np.testing.assert_allclose(
            optim.step_decay(0.1, epoch, milestones, decay), rate, rtol=1e-12
        )
