"""Compiled training, run from the loop: formulas, bits after a stop, alpha."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsce_jax import log_prior
from bsce_jax.compute import optim, parallel
from bsce_jax.compute.state import Images, Network, StepContext, TrainState
from bsce_jax.run import feed, loop, programs
from tests.loop_example import config, training
from tests.step_example import EVERY_GROUP
from tests.tiny import TinyNet

CLASSES, OLD, SEEN = 6, 2, 5


@pytest.fixture(scope="module")
def built():
    """(dtype, updates per call) -> programs of the real builder, with TinyNet."""

    @functools.cache
    def build(dtype: str, updates_per_call: int) -> programs.Programs:
        c = config(
            prior="meta",
            model__dtype="float32",
            updates_per_call=updates_per_call,
            meta__learning_rate=3.0,
        )
        c.model.dtype = dtype
        place = parallel.create("jit", jax.devices()[:1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                programs,
                "build_model",
                lambda config, devices, num_classes: TinyNet(
                    num_classes, jnp.dtype(config.model.dtype)
                ),
            )
            return programs.build(c, place, CLASSES)

    return build


@functools.cache
def example(name: str) -> tuple:
    """State, context and images, on the host; floats of the type with this name."""
    dtype = np.dtype(name)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 6, 6, 1)).astype(np.uint8)
    labels = np.concatenate([np.arange(SEEN), rng.integers(0, SEEN, 35)])
    init = jax.jit(functools.partial(TinyNet(CLASSES, dtype).init, train=False))
    student, teacher = (
        jax.device_get(init(jax.random.key(i), jnp.zeros((1, 6, 6, 1), dtype)))
        for i in (0, 1)
    )
    positions = np.arange(CLASSES)
    old, seen = positions < OLD, positions < SEEN
    counts = np.where(old, 3.0, 8.0) * seen
    prior = np.where(seen, np.log(np.maximum(counts, 1)), log_prior.EXCLUDED)
    weights = {"softmax_ce": np.asarray(0.6, dtype), "kd": np.asarray(0.4, dtype)}
    one = np.asarray(1.0, dtype)
    optimizers = optim.sgd(0.9, 2e-4), optim.alpha_optimizer("sgd", 3.0)
    student, teacher = (
        Network(found["params"], found["batch_stats"], {})
        for found in (student, teacher)
    )
    state = TrainState(
        network=student,
        opt_state=jax.device_get(optimizers[0].init(student.params)),
        alpha=one,
        alpha_opt_state=jax.device_get(optimizers[1].init(one)),
    )
    context = StepContext(
        log_prior=prior.astype(dtype),
        old=old,
        seen=seen,
        taught=old,
        counts=counts.astype(dtype),
        task_ids=np.zeros(CLASSES, np.int32),
        weights=weights,
        update_scale=optim.update_scale(student.params, EVERY_GROUP, seen),
        teacher=teacher,
        decay=one,
    )
    return state, context, Images(images, labels.astype(np.int32))


def small(meta: bool) -> loop.Training:
    train = np.arange(SEEN, SEEN + 11, dtype=np.int32)
    held_out = np.arange(SEEN, dtype=np.int32) if meta else None
    return training(meta=meta, train=train, held_out=held_out)


def train(built, arguments, training, history=None, stop_after=math.inf):
    """Runs real training; returns the state and history at the end or at the stop."""
    history = loop.History() if history is None else history
    state, context, data = parallel.replicate(built.devices, arguments)
    what = loop.Loop(built, feed.Resident(built.devices, data), training)
    saved: list = []
    number = iter(range(1, 100))
    watch = loop.Watch(
        after_call=lambda history, images: None,
        due=lambda: False,
        save=lambda state, history: saved.append(jax.device_get(state)),
        stop=lambda: 15 * (next(number) >= stop_after),
    )
    try:
        state = loop.fit(what, state, context, history, watch)
    except loop.StopRequested:
        (state,) = saved
    return jax.device_get(state), history


def written_out(built, arguments, training):
    """The same training from the paper's formulas: whole batches, NumPy's SGD."""
    state, context, data = arguments
    params, statistics = state.network.params, state.network.batch_stats
    known = {"params": context.teacher.params}
    known["batch_stats"] = context.teacher.batch_stats
    lam = jnp.asarray(context.counts[:SEEN])

    @jax.jit
    def gradient(params, statistics, images, labels):
        teacher, _ = built.model.apply(known, images, train=False)

        def loss(params):
            (z, _), changed = built.model.apply(
                {"params": params, "batch_stats": statistics},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            q = lam[None, :] * jnp.exp(z[:, :SEEN])
            own = jnp.take_along_axis(q, labels[:, None], axis=1)[:, 0]
            ce = -jnp.log(own / q.sum(axis=1)).mean()
            p = jax.nn.softmax(teacher[:, :OLD] / 2)
            distilled = -4 * (p * jax.nn.log_softmax(z[:, :OLD] / 2)).sum(1).mean()
            return 0.6 * ce + 0.4 * distilled, (z, changed["batch_stats"])

        return jax.value_and_grad(loss, has_aux=True)(params)

    normalised = (data.images.astype(np.float32) / 255 - np.float32(0.5)) * 4
    buffers = jax.tree.map(np.zeros_like, params)
    losses, accuracies = [], []
    for epoch, rate in enumerate(np.float32(training.learning_rates)):
        rng = np.random.default_rng([training.seed, training.data.step, epoch])
        order = training.data.train[rng.permutation(len(training.data.train))]
        total = correct = 0.0
        for first in range(0, len(order), training.batch_size):
            batch = order[first : first + training.batch_size]
            labels = data.labels[batch]
            (value, (z, statistics)), g = gradient(
                params, statistics, normalised[batch], labels
            )
            buffers = jax.tree.map(
                lambda b, g, p: 0.9 * b + np.asarray(g) + 2e-4 * p, buffers, g, params
            )
            params = jax.tree.map(
                lambda p, b, s, rate=rate: p - np.float64(rate) * np.float64(s) * b,
                params,
                buffers,
                context.update_scale,
            )
            total += float(value) * len(batch)
            correct += (np.asarray(z)[:, :SEEN].argmax(axis=1) == labels).sum()
        losses.append(total / len(order))
        accuracies.append(100 * correct / len(order))
    return params, statistics, losses, accuracies


def test_the_history_is_that_of_the_formulas_written_out(x64, built):
    """Balanced Softmax and distillation, over three epochs with partial batches."""
    made = built("float64", 1)
    arguments = example("float64")
    planned = small(meta=False)
    state, history = train(made, arguments, planned)
    params, statistics, losses, accuracies = written_out(made, arguments, planned)
    np.testing.assert_allclose(history.loss, losses, rtol=1e-7)
    np.testing.assert_allclose(history.accuracy, accuracies, rtol=1e-12)
    assert len(history.loss) == 3 and history.loss[0] != history.loss[2]
    network = state.network
    pairs = ((network.params, params), (network.batch_stats, statistics))
    for found, expected in pairs:
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8),
            found,
            jax.device_get(expected),
        )
    assert state.alpha == 1.0


def same_bits(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("updates_per_call", [1, 2])
def test_a_run_resumed_at_any_update_has_the_same_bits(built, updates_per_call):
    """Meta, by single updates and by a loop: network, momentum, alpha and history."""
    made = built("float32", updates_per_call)
    arguments = example("float32")
    planned = small(meta=True)
    expected, undisturbed = train(made, arguments, planned)
    assert not same_bits(expected.network, arguments[0].network)
    for calls in range(2, -(-planned.updates // updates_per_call)):
        state, history = train(made, arguments, planned, stop_after=calls - 1)
        assert history.updates == calls * updates_per_call
        assert not same_bits(state.network, expected.network)
        history = loop.History(**json.loads(json.dumps(dataclasses.asdict(history))))
        found, history = train(made, (state, *arguments[1:]), planned, history)
        assert same_bits(found, expected) and history == undisturbed


def test_alpha_of_every_epoch_is_recorded(built):
    made = built("float32", 1)
    arguments = example("float32")
    planned = small(meta=True)
    _, history = train(made, arguments, planned)
    after = {  # alpha after so many updates, from runs stopped there
        done: float(train(made, arguments, planned, stop_after=done - 1)[0].alpha)
        for done in range(2, planned.updates)
    }
    assert [update for update, _ in history.alpha] == [3, 6, 9]
    assert [alpha for _, alpha in history.alpha[:2]] == [after[3], after[6]]
    # Updated with updates 0, 2, 4, ...: counted over the step, not over the epoch.
    assert after[2] != 1.0
    moved = [after[done] != after[done - 1] for done in range(3, planned.updates)]
    assert moved == [done % 2 == 1 for done in range(3, planned.updates)]
    plain = train(made, arguments, small(meta=False))
    assert plain[1].alpha == [] and plain[0].alpha == 1.0


def test_a_loop_and_single_updates_give_the_same_training(built):
    planned = small(meta=True)
    arguments = example("float32")
    single, one = train(built("float32", 1), arguments, planned)
    looped, two = train(built("float32", 2), arguments, planned)
    np.testing.assert_allclose(one.loss, two.loss, rtol=1e-4)
    np.testing.assert_allclose(one.alpha, two.alpha, rtol=1e-3)
    np.testing.assert_allclose(single.alpha, looped.alpha, rtol=1e-3)
