"""One device, pmap over 8 and jit over 8 compute the same; derivatives of a network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bsce_jax.models.resnet import ResNet
from tests.step_example import fast

# Devices 1, 3 and 7 of 8 hold nothing but padding, others a mixture.
VALID = np.array([1, 1, 0, 0, 1, 0, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0], np.float32)
# Two stages hold every piece: stem, both kinds of block, head. The other methods' heads
# follow one block, without its ReLU.
NETWORKS = {
    "linear": {"blocks": (1, 1), "widths": (4, 8)},
    "cosine": {"blocks": (1,), "widths": (4,), "relu": "not_last"},
    "local_similarity": {"blocks": (1,), "widths": (4,), "relu": "none", "proxies": 3},
}


def setting(head="linear", dtype=jnp.float32, **options):
    options = NETWORKS[head] | options
    module = ResNet(5, head=head, dtype=dtype, **options)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(16, 8, 8, 3)).astype(dtype)
    # Padding rows hold something extreme, to be noticed if it leaked.
    images = np.where(VALID[:, None, None, None] > 0, images, 50).astype(dtype)
    labels = rng.integers(0, 5, 16).astype(np.int32)
    state = jax.jit(lambda key: module.init(key, jnp.asarray(images), train=False))(
        jax.random.key(0, impl="unsafe_rbg")
    )
    return module, state, images, labels


def total_loss(module, params, stats, images, labels, valid, axis_name=None):
    """This device's share of the global mean, and all the outputs."""
    (logits, out), updated = module.apply(
        {"params": params, "batch_stats": stats},
        images,
        train=True,
        valid=valid,
        axis_name=axis_name,
        mutable=["batch_stats"],
    )
    out.pop("scale", None)  # a parameter: all others have a batch axis
    count = valid.sum()
    if axis_name is not None:
        count = jax.lax.psum(count, axis_name)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]
    return -(chosen * valid).sum() / count, (logits, out, updated["batch_stats"])


@functools.cache
def results(where, head):
    module, state, images, labels = setting(head)

    def step(params, stats, images, labels, valid, axis_name=None):
        grads, aux = jax.grad(functools.partial(total_loss, module), has_aux=True)(
            params, stats, images, labels, valid, axis_name
        )
        if axis_name is not None:
            grads = jax.lax.psum(grads, axis_name)
        return grads, *aux

    arguments = state["params"], state["batch_stats"], images, labels, VALID
    if where == "one device":
        return jax.tree.map(np.asarray, fast(jax.jit(step))(*arguments))
    if where == "jit":
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
        placed = [jax.device_put(a, whole) for a in arguments[:2]]
        placed += [jax.device_put(a, split) for a in arguments[2:]]
        return jax.tree.map(np.asarray, fast(jax.jit(step))(*placed))
    shards = [a.reshape(8, 2, *a.shape[1:]) for a in arguments[2:]]
    program = jax.pmap(
        functools.partial(step, axis_name="data"),
        axis_name="data",
        in_axes=(None, None, 0, 0, 0),
    )
    grads, logits, out, stats = fast(program)(*arguments[:2], *shards)
    for leaf in jax.tree.leaves((grads, stats)):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    first = jax.tree.map(lambda leaf: np.asarray(leaf[0]), (grads, stats))
    logits, out = jax.tree.map(
        lambda leaf: np.asarray(leaf).reshape(16, *leaf.shape[2:]), (logits, out)
    )
    return first[0], logits, out, first[1]


# test_forward.py has PODNet's head on several devices.
HEADS = [
    pytest.param(name, marks=[pytest.mark.slow] * (name != "cosine"))
    for name in NETWORKS
]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("where", ["jit", "pmap"])
def test_eight_devices_compute_what_one_does(where, head):
    got, want = results(where, head), results("one device", head)
    rows = VALID > 0
    pick = lambda tree: jax.tree.map(lambda leaf: leaf[rows], tree)  # noqa: E731
    got, want = ((r[0], pick(r[1]), pick(r[2]), r[3]) for r in (got, want))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want
    )


def test_padding_rows_count_for_nothing():
    module, state, images, labels = setting()
    rows = VALID > 0
    gradient = jax.grad(functools.partial(total_loss, module), has_aux=True)
    short, aux = fast(jax.jit(gradient))(
        state["params"],
        state["batch_stats"],
        images[rows],
        labels[rows],
        np.ones(rows.sum(), np.float32),
    )
    grads, logits, _, stats = results("one device", "linear")
    for got, want in ((grads, short), (stats, aux[2]), (logits[rows], aux[0])):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            got,
            want,
        )


@pytest.mark.slow
def test_second_derivatives_of_a_network_with_chunks(x64):
    module, state, images, labels = setting(dtype=np.float64, conv_chunks=2)
    params, stats = state["params"], state["batch_stats"]
    assert jax.tree.leaves(params)[0].dtype == jnp.float64
    valid = jnp.asarray(VALID, jnp.float64)

    def loss(params):
        return total_loss(module, params, stats, images, labels, valid)[0]

    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)

    def forward_over_reverse(params):
        return jax.jvp(jax.grad(loss), (params,), (direction,))[1]

    def reverse_over_reverse(params):
        dot = lambda p: sum(  # noqa: E731
            (a * b).sum()
            for a, b in zip(
                jax.tree.leaves(jax.grad(loss)(p)),
                jax.tree.leaves(direction),
                strict=True,
            )
        )
        return jax.grad(dot)(params)

    both = lambda p: (forward_over_reverse(p), reverse_over_reverse(p))  # noqa: E731
    forward, reverse = fast(jax.jit(both))(params)
    # 1e-12 of the largest entry: both are sums over the whole batch.
    scale = max(abs(leaf).max() for leaf in jax.tree.leaves(reverse))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * scale),
        forward,
        reverse,
    )


def test_training_without_mutable_statistics_discards_them():
    module, state, images, _ = setting()
    kept, _ = fast(
        jax.jit(lambda v: module.apply(v, images, train=True, mutable=["batch_stats"]))
    )(state)
    discarded = fast(jax.jit(lambda v: module.apply(v, images, train=True)))(state)
    jax.tree.map(np.testing.assert_array_equal, kept, discarded)
