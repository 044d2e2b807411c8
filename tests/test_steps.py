"""The compiled steps: one device, jit over 8 and pmap over 8 agree; the algebra."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsce_jax import log_prior, meta_alpha
from bsce_jax.compute import optim, steps, updates
from bsce_jax.compute.state import HELD_OUT, TRAIN, Schedule
from bsce_jax.losses import kd
from bsce_jax.losses.softmax_ce import softmax_cross_entropy
from tests.step_example import (
    CLASSES,
    OLD,
    SEEN,
    UPDATES,
    assert_close,
    batch_of,
    compiled,
    example,
    jitted,
    on_one,
    program,
    run,
    stepped,
)

SHARED = (jnp.float64, True, "linear")  # the program that most tests run


# test_forward.py has the terms of the other methods, with a forward pass of its own.
@pytest.mark.parametrize(
    ("method", "meta"),
    [
        ("linear", True),
        pytest.param("il_baseline", False, marks=pytest.mark.slow),
        pytest.param("il_baseline", True, marks=pytest.mark.slow),
        pytest.param("lucir", True, marks=pytest.mark.slow),
        pytest.param("podnet", True, marks=pytest.mark.slow),
        pytest.param("table6", False, marks=pytest.mark.slow),
    ],
)
def test_one_device_jit_8_and_pmap_8_give_the_same_update(x64, method, meta):
    tested = program(jnp.float64, meta, method)
    arguments = example(tested, np.float64, method=method)
    one = on_one(jnp.float64, meta, method)(*arguments)
    for mode in ("jit", "pmap"):
        eight = run(tested, mode, jax.devices()[:8], arguments)
        assert_close(one, eight, 1e-9)
    assert one[1]["images"].tolist() == [12, 12, 5]
    if meta:
        alphas = one[1]["alpha"]
        assert alphas[0] != 0.7 and alphas[0] == alphas[1] != alphas[2]


def test_a_loop_of_updates_equals_single_calls(x64):
    tested = program(*SHARED)
    arguments = example(tested, np.float64, method="linear")
    state, context, data, schedule, streams = arguments
    looped, metrics = on_one(*SHARED)(*arguments)
    one = jax.devices()[:1]
    plain = compiled(dataclasses.replace(tested, meta=None), "jit", one)
    with_alpha = compiled(tested, "jit", one)
    for u in range(UPDATES):
        at = functools.partial(jax.tree.map, operator.itemgetter(slice(u, u + 1)))
        only = {TRAIN: at(streams[TRAIN])}
        single = plain
        if u % tested.meta.every == 0:
            group = u // tested.meta.every
            single, row = with_alpha, operator.itemgetter(slice(group, group + 1))
            only[HELD_OUT] = jax.tree.map(row, streams[HELD_OUT])
        state, new = single(state, context, data, at(schedule), only)
        np.testing.assert_allclose(new["loss"][0], metrics["loss"][u], rtol=1e-9)
        np.testing.assert_allclose(new["alpha"][0], metrics["alpha"][u], rtol=1e-9)
    assert_close(state, looped, 1e-9)


def test_fewer_updates_than_the_plan_holds(x64):
    arguments = example(program(*SHARED), np.float64, method="linear")
    _, full = on_one(*SHARED)(*arguments)
    _, part = on_one(*SHARED)(*arguments, count=1)
    assert part["images"].tolist() == [12, 0, 0]
    assert part["loss"][0] == full["loss"][0]


def test_train_step_is_pytorch_sgd_on_the_weighted_terms(x64):
    """Against jax.grad of a loss written out in full, and hand-made momentum."""
    tested = program(jnp.float64, meta=False, augmented=False)
    state, context, data, _, streams = example(tested, np.float64)
    context = context.replace(decay=np.float64(0.25))
    batch = batch_of(tested, data, streams[TRAIN], 2)
    step = functools.partial(steps.train_step, tested)
    new, metrics = jitted(step, state, context, batch, 0.1)
    network, teacher = state.network, context.teacher

    def loss(params):
        (z, _), _ = tested.model.apply(
            {"params": params, "batch_stats": network.batch_stats},
            batch.images,
            train=True,
            valid=batch.valid,
            mutable=["batch_stats"],
        )
        variables = {"params": teacher.params, "batch_stats": teacher.batch_stats}
        taught, _ = tested.model.apply(variables, batch.images, train=False)
        n = 5
        lam = context.counts * np.where(context.old, 0.7, 1.0)
        q = lam[None, :SEEN] * jnp.exp(z[:n, :SEEN])
        ce = -jnp.log(q[np.arange(n), batch.labels[:n]] / q.sum(axis=1))
        p = jax.nn.softmax(taught[:n, :OLD] / 2)
        distilled = -4 * jnp.sum(p * jax.nn.log_softmax(z[:n, :OLD] / 2), axis=1)
        return 0.6 * distilled.mean() + 0.4 * ce.mean()

    value, gradient = jitted(jax.value_and_grad(loss), network.params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-12)
    expected = jax.tree.map(
        lambda p, g: p - 0.1 * (g + 0.25 * 2e-4 * p), network.params, gradient
    )
    head = expected["head"]
    for name in head:  # the row of the class not seen does not move
        head[name] = np.array(head[name])
        head[name][..., SEEN:] = network.params["head"][name][..., SEEN:]
    assert_close(new.network.params, expected, 1e-11)


@pytest.mark.slow
def test_noise_on_the_gradient_is_the_same_on_all_devices(x64):
    """Of its own random key and the epoch's deviation, over the images of the batch."""
    plain = program(jnp.float64, meta=False, augmented=False)
    noisy = dataclasses.replace(plain, noise=optim.Noise(0.3, 1))
    state, context, data, schedule, streams = example(plain, np.float64)
    schedule, rows = jax.tree.map(lambda leaf: leaf[-1:], (schedule, streams[TRAIN]))
    arguments = (state, context, data, schedule, {TRAIN: rows})
    one, eight = jax.devices()[:1], jax.devices()[:8]
    without, _ = stepped(plain)(*arguments)
    found, _ = run(noisy, "jit", one, arguments)
    assert_close(run(noisy, "pmap", eight, arguments)[0], found, 1e-9)
    key = updates._key(jax.tree.map(jnp.asarray, schedule), 0, 2)
    zeros = jax.tree.map(jnp.zeros_like, state.network.params)
    deviation = 0.3 / 3**0.55 / 5  # in epoch 1, which is the second, of five images
    expected = jax.tree.map(
        lambda p, d, s: p - 0.05 * s * d,
        without.network.params,
        optim.noise(key, zeros, deviation),
        context.update_scale,
    )
    assert_close(found.network.params, jax.device_get(expected), 1e-8)


def test_unseen_rows_never_move_over_many_updates(x64):
    arguments = example(program(*SHARED), np.float64, method="linear")
    state, _ = on_one(*SHARED)(*arguments)
    before, after = (s.network.params["head"] for s in (arguments[0], state))
    for name in before:
        assert after[name].shape[-1] == CLASSES > SEEN
        np.testing.assert_array_equal(after[name][..., SEEN:], before[name][..., SEEN:])
        assert np.any(after[name][..., :SEEN] != before[name][..., :SEEN])


def test_without_old_samples_the_ranking_term_vanishes_exactly(x64):
    """No memory: the update is that without the term, bit for bit."""
    tested = program(jnp.float64, False, "lucir", False)
    state, context, data, *rest = example(tested, np.float64, method="lucir")
    data = data.replace(labels=(OLD + data.labels % (SEEN - OLD)).astype(np.int32))
    arguments = (state, context, data, *rest)
    kept = tuple(term for term in tested.terms if term.name != "margin_ranking")
    assert len(kept) == len(tested.terms) - 1
    with_term, losses = stepped(tested)(*arguments)
    without, others = stepped(dataclasses.replace(tested, terms=kept))(*arguments)
    assert_close(losses, others, 1e-14)
    assert_close(with_term.network.params, without.network.params, 1e-14)


def test_meta_step_equals_reverse_mode_of_the_losses_written_out(x64):
    tested = program(jnp.float64, augmented=False)
    state, context, data, _, streams = example(tested, np.float64)
    batch = batch_of(tested, data, streams[TRAIN], 0)
    balanced = batch_of(tested, data, streams[HELD_OUT], 0, seed=1)
    step = functools.partial(steps.meta_step, tested)
    new = jitted(step, state, context, batch, balanced, 0.05)
    network = state.network

    def expected(params, alpha, rate, teacher):
        z, _ = tested.model.apply(
            {"params": teacher.params, "batch_stats": teacher.batch_stats},
            batch.images,
            train=False,
        )
        nested = functools.partial(
            meta_alpha.gradient,
            functools.partial(inner, z),
            outer,
            mode="reverse",
        )
        return nested(params, alpha, rate)

    def logits(params, images):
        return tested.model.apply(
            {"params": params, "batch_stats": network.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )[0][0]

    def inner(teacher, params, alpha):
        z = logits(params, batch.images)
        prior = log_prior.weighted(context.counts, context.old, alpha)
        ce = softmax_cross_entropy(z, batch.labels, prior)
        distilled = kd.knowledge_distillation(z, teacher, context.old)
        return 0.6 * distilled.mean() + 0.4 * ce.mean()

    def outer(params):
        z = logits(params, balanced.images)[:, :SEEN]
        return softmax_cross_entropy(z, balanced.labels).mean()

    found = jitted(expected, network.params, state.alpha, 0.05, context.teacher)
    np.testing.assert_allclose(new.alpha, 0.7 - found, rtol=1e-11)
    assert abs(found) > 1e-6
    assert_close(new.network, network, 0)
    assert_close(new.opt_state, state.opt_state, 0)


def test_randomness_depends_on_seed_step_epoch_update_and_purpose():
    def key(purpose=0, **changed):
        values = {"seed": 0, "step": 1, "epoch": 2, "update": 3, **changed}
        schedule = Schedule(
            **{name: jnp.asarray([v]) for name, v in values.items()},
            learning_rate=jnp.zeros(1),
        )
        return tuple(jax.random.key_data(updates._key(schedule, 0, purpose)).tolist())

    assert key() == key()
    changed = [key(**{name: 7}) for name in ("seed", "step", "epoch", "update")]
    assert len({key(), *changed, key(1), key(2)}) == 7
