"""What does not train stays: groups of parameters, rows of the head, in every step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsce_jax.compute import optim, steps
from bsce_jax.compute.state import HELD_OUT, OWN, TRAIN
from bsce_jax.losses.softmax_ce import softmax_cross_entropy
from tests.step_example import (
    EVERY_GROUP,
    OLD,
    SEEN,
    assert_close,
    batch_of,
    example,
    fast,
    jitted,
    paths,
    plain_steps,
    program,
    stepped,
)

RATE, DECAY = 0.05, 0.5


def corrected(apply, network, batch, context):
    out, network = apply(network, batch.images, batch.valid)
    return out | {"logits": out["logits"] * network.params[OWN]["factor"]}, network


@functools.cache
def cosine(frozen: str) -> steps.Program:
    """A program with parameters of five groups, one of which may be frozen."""
    tested = program(jnp.float32, False, "lucir", augmented=False)
    return dataclasses.replace(
        tested,
        optimizer=optim.sgd(0.9, DECAY),
        forward=corrected,
        frozen=frozenset([frozen]),
    )


@pytest.mark.parametrize(
    "frozen", ["own", "head", "scale", "batch_norms", "convolutions"]
)
def test_a_frozen_group_alone_has_no_gradient_and_does_not_move(frozen):
    """Not a bit, with an update scale of 0, against momentum and weight decay."""
    tested, own = cosine(frozen), {"own": {"factor": np.float32(0.9)}}
    both = {"student": own, "teacher": own}
    state, context, data, _, streams = example(
        tested, np.float32, method="lucir", **both
    )
    batch = batch_of(tested, data, streams[TRAIN], 0)
    step = fast(jax.jit(functools.partial(steps.train_step, tested)))
    seen = np.ones_like(context.seen)  # all rows of the head move
    rates = {**EVERY_GROUP, frozen: 0.0}
    params = state.network.params

    def trained(momentum, rates):
        """Parameters and momentum after an update."""
        given = state.replace(
            opt_state=jax.tree.map(lambda m: m + momentum, state.opt_state)
        )
        scale = optim.update_scale(params, rates, seen)
        new, _ = step(
            given, context.replace(update_scale=scale), batch, np.float32(RATE)
        )
        return jax.tree.map(np.asarray, (new.network.params, new.opt_state))

    moved, trace = trained(np.float32(0), EVERY_GROUP)
    moved, (trace,) = paths(moved), jax.tree.leaves(trace, is_leaf=_is_params)
    trace = paths(trace)
    held = paths(trained(np.float32(1), rates)[0])
    groups = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, group = jax.tree_util.keystr(path), optim.group(path)
        groups.add(group)
        decayed = 0 * leaf if group == "own" else np.float32(DECAY) * leaf
        if group == frozen:  # no gradient: decay alone is in the momentum
            np.testing.assert_array_equal(trace[name], decayed, err_msg=name)
            np.testing.assert_array_equal(held[name], leaf, err_msg=name)
        else:
            assert np.any(trace[name] != decayed), name
            assert np.any(moved[name] != leaf) and np.any(held[name] != leaf), name
    assert groups == {"own", "head", "scale", "batch_norms", "convolutions"}


def _is_params(tree) -> bool:
    return isinstance(tree, dict) and OWN in tree


@pytest.mark.parametrize(
    "method", [pytest.param("lucir", marks=pytest.mark.slow), "podnet"]
)
def test_frozen_rows_stay_against_gradient_decay_and_momentum(x64, method):
    """Old rows of the head do not move by a bit; the learned scale does."""
    tested = program(jnp.float64, False, method, False)
    state, context, *rest = example(tested, np.float64, method=method)
    momentum = jax.tree.map(np.ones_like, state.opt_state)
    params, new_rows = state.network.params, context.seen & ~context.old
    scale = optim.update_scale(params, EVERY_GROUP, new_rows)
    arguments = (
        state.replace(opt_state=momentum),
        context.replace(update_scale=scale),
        *rest,
    )
    new, _ = plain_steps(jnp.float64, method)(*arguments)
    before, after = params["head"], new.network.params["head"]
    changed = before["kernel"] != after["kernel"]
    moved = np.any(changed, axis=tuple(range(changed.ndim - 1)))
    assert moved.tolist() == [False] * OLD + [True] * (SEEN - OLD) + [False]
    assert after["scale"] != before["scale"]


@pytest.mark.parametrize("batch_norm", ["train", "eval"])
def test_fine_tuning_moves_the_rows_of_the_head_alone(x64, batch_norm):
    """As the main training restricted to the head, without the rest's backward pass."""
    tested = program(jnp.float64, False, "podnet", False)
    state, context, *rest = example(tested, np.float64, method="podnet")
    rates = {**dict.fromkeys(EVERY_GROUP, 0.0), "head": 1.0}
    network = state.network
    scale = optim.update_scale(network.params, rates, context.seen)
    arguments = (state, context.replace(update_scale=scale), *rest)
    frozen = frozenset(name for name, rate in rates.items() if not rate)
    tuned = dataclasses.replace(tested, frozen=frozen, batch_norm=batch_norm)
    new, _ = stepped(tuned)(*arguments)
    after = paths(new.network.params)
    for path, leaf in paths(network.params).items():
        changed = bool(np.any(leaf != after[path]))
        assert changed == (path == "['head']['kernel']")
    stats = paths(new.network.batch_stats)
    moved = [np.any(leaf != stats[p]) for p, leaf in paths(network.batch_stats).items()]
    assert moved == [batch_norm == "train"] * len(moved)
    if batch_norm == "train":
        whole, _ = plain_steps(jnp.float64, "podnet")(*arguments)
        assert_close(whole.network.params["head"], new.network.params["head"], 1e-12)


@pytest.mark.slow
def test_the_inner_step_of_meta_leaves_frozen_rows(x64):
    """theta* = theta - lr * scale * gradient: against reverse mode written out."""
    tested = program(jnp.float64, True, "lucir", augmented=False)
    state, context, data, _, streams = example(tested, np.float64, method="lucir")
    params, new_rows = state.network.params, context.seen & ~context.old
    scale = optim.update_scale(params, EVERY_GROUP, new_rows)
    context = context.replace(update_scale=scale)
    batch = batch_of(tested, data, streams[TRAIN], 0)
    balanced = batch_of(tested, data, streams[HELD_OUT], 0, seed=1)

    def after(alpha, params):
        teacher = steps._teacher_outputs(tested, context, batch)

        def inner(params, alpha):
            network = state.network.replace(params=params)
            moved = state.replace(network=network, alpha=alpha)
            return steps._loss(tested, moved, context, batch, teacher)[0]

        gradient = jax.grad(inner)(params, alpha)
        rows_of_head = np.where(new_rows, 1.0, 0.0)
        gradient["head"]["kernel"] *= rows_of_head[None, :]
        stepped = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)
        variables = {"params": stepped, "batch_stats": state.network.batch_stats}
        z = tested.model.apply(
            variables, balanced.images, train=True, mutable=["batch_stats"]
        )[0][0][:, :SEEN]
        return softmax_cross_entropy(z, balanced.labels).mean()

    step = functools.partial(steps.meta_step, tested)
    new = jitted(step, state, context, batch, balanced, 0.05)
    expected = jitted(jax.grad(after), state.alpha, params)
    np.testing.assert_allclose(new.alpha, 0.7 - expected, rtol=1e-10)
    assert abs(expected) > 1e-9
