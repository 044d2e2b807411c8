"""A method's `forward`: trained, shown to the teacher, evaluated; the whole batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsce_jax.compute import inference, parallel, steps
from bsce_jax.compute.state import HELD_OUT, OWN, TRAIN, Batch
from bsce_jax.log_prior import EXCLUDED
from tests.step_example import (
    BATCH,
    CLASSES,
    FEATURES,
    OLD,
    SEEN,
    UPDATES,
    assert_close,
    batch_of,
    compiled,
    example,
    fast,
    jitted,
    network,
    program,
)

OWN_OF = {
    "student": {"scale": np.float64(0.7), "shift": np.float64(-0.3)},
    "teacher": {"scale": np.float64(1.3), "shift": np.float64(0.2)},
}
KEPT = {
    "student": {"mean": np.linspace(0.0, 1.0, FEATURES), "updates": np.float64(0)},
    "teacher": {"mean": np.linspace(2.0, 1.0, FEATURES), "updates": np.float64(7)},
}


def forward(apply, network, batch, context, share=0.5):
    """A scale and a shift of new classes; a running mean whose part predicts less."""
    out, network = apply(network, batch.images, batch.valid)
    own, kept = network.params[OWN], network.extra
    new = (context.seen & ~context.old)[None, :]
    logits = out["logits"]
    logits = jnp.where(new, own["scale"] * logits + own["shift"], logits)
    common = jnp.dot(out["features"], kept["mean"])
    mean = jax.lax.stop_gradient(batch.mean(out["features"]))
    kept = {
        "mean": 0.9 * kept["mean"] + 0.1 * mean,
        "updates": kept["updates"] + 1,
    }
    own_scores = logits - share * common[:, None] * jnp.arange(CLASSES)[None, :]
    found = {"logits": logits, "scores": own_scores, "shift": own["shift"]}
    return out | found, network.replace(extra=kept)


def distances(features, valid):
    """Mean over all pairs of valid rows of a function of both."""
    difference = features[:, None, :] - features[None, :, :]
    pairs = valid[:, None] * valid[None, :]
    values = jnp.log1p(jnp.sum(difference**2, axis=-1))
    return jnp.sum(pairs * values) / jnp.maximum(jnp.sum(pairs), 1)


def spread(student, teacher, batch, context):
    """A term of the whole batch: its pairs lie on all devices."""
    valid = batch.whole(batch.valid)
    value = distances(batch.whole(student["features"]), valid)
    taught = distances(batch.whole(teacher["features"]), valid)
    value = (value - taught) ** 2 + batch.mean(student["logits"][:, 0]) ** 2
    return value[None], jnp.ones(1)


def penalty(student, teacher, batch, context):
    value = jnp.square(student["shift"] - teacher["shift"])[None]
    return value, jnp.ones_like(value)


@functools.cache
def with_forward(method="similarities", meta=True) -> steps.Program:
    """All terms of the other methods and two of this one, through its `forward`."""
    tested = program(jnp.float64, meta, method, augmented=False)
    more = (steps.Term("spread", spread, {}), steps.Term("penalty", penalty, {}))
    return dataclasses.replace(tested, terms=tested.terms + more, forward=forward)


def arguments(tested, method="similarities"):
    both = {
        who: {"own": OWN_OF[who], "extra": KEPT[who]} for who in ("student", "teacher")
    }
    return example(tested, np.float64, method=method, **both)


def updates_one_by_one(mode, devices, given, held_out):
    """State and metrics after each update, by calls of one update each."""
    state, context, data, schedule, streams = given
    update, found = compiled(with_forward(), mode, devices), []
    for u in range(UPDATES):
        at = functools.partial(jax.tree.map, lambda leaf, u=u: leaf[u : u + 1])
        rows = {TRAIN: at(streams[TRAIN]), HELD_OUT: held_out}
        state, metrics = update(state, context, data, at(schedule), rows)
        found.append((state, metrics))
    return found


@pytest.mark.slow
def test_one_device_jit_8_and_pmap_8_give_the_same_update_through_a_forward(x64):
    """Everything of the network, the method's own and what it keeps included."""
    given = arguments(with_forward())
    held_out = jax.tree.map(lambda leaf: leaf[:1], given[-1][HELD_OUT])
    one = updates_one_by_one("jit", jax.devices()[:1], given, held_out)
    before, (last, _) = given[0], one[-1]
    assert last.network.extra["updates"] == UPDATES
    assert np.all(last.network.extra["mean"] != before.network.extra["mean"])
    for name, value in last.network.params[OWN].items():
        assert value != before.network.params[OWN][name]
    assert [int(metrics["images"][0]) for _, metrics in one] == [12, 12, 5]
    alphas = [0.7, *(float(metrics["alpha"][0]) for _, metrics in one)]
    assert len(set(alphas)) == UPDATES + 1
    for mode in ("jit", "pmap"):
        eight = updates_one_by_one(mode, jax.devices()[:8], given, held_out)
        assert_close(one, eight, 1e-9)


def outputs(tested, variables, images, train, valid=None):
    """The model's own logits and features, without the hook."""
    params = {name: part for name, part in variables.params.items() if name != OWN}
    (logits, out), _ = tested.model.apply(
        {"params": params, "batch_stats": variables.batch_stats},
        images,
        train=train,
        valid=valid,
        mutable=["batch_stats"],
    )
    return logits, out["features"]


@pytest.mark.slow
def test_what_is_trained_is_the_loss_of_its_outputs_written_out(x64):
    """Gradients of own parameters, moved extra, and the teacher's own and extra."""
    tested = with_forward("il_baseline", meta=False)
    state, context, data, _, streams = arguments(tested, "il_baseline")
    batch = batch_of(tested, data, streams[TRAIN], 2)
    step = fast(jax.jit(functools.partial(steps.train_step, tested)))
    rate, student, n = np.float64(0.1), state.network, 5
    new, metrics = jax.device_get(step(state, context, batch, rate))

    def corrected(network, z):
        own = network.params[OWN]
        later = own["scale"] * z[:, OLD:SEEN] + own["shift"]
        return jnp.concatenate([z[:, :OLD], later, z[:, SEEN:]], axis=1)

    def loss(params, teacher, context, batch):
        found = student.replace(params=params)
        valid, images = batch.valid, batch.images
        z, features = outputs(tested, found, images, True, valid)
        taught, known = outputs(tested, teacher, images, False)
        z, taught = corrected(found, z)[:n], corrected(teacher, taught)[:n]
        lam = context.counts * jnp.where(context.old, 0.7, 1.0)
        q = lam[None, :SEEN] * jnp.exp(z[:, :SEEN])
        ce = -jnp.log(q[jnp.arange(n), batch.labels[:n]] / q.sum(axis=1)).mean()
        p = jax.nn.softmax(taught[:, :OLD] / 2)
        kd = -4 * jnp.sum(p * jax.nn.log_softmax(z[:, :OLD] / 2), axis=1).mean()
        ones = jnp.ones(n)
        far = distances(features[:n], ones) - distances(known[:n], ones)
        own = params[OWN]["shift"] - teacher.params[OWN]["shift"]
        value = 0.6 * kd + 0.4 * ce + far**2 + z[:, 0].mean() ** 2 + own**2
        return value, features[:n].mean(axis=0)

    (value, mean), gradient = jitted(
        jax.value_and_grad(loss, has_aux=True),
        *(student.params, context.teacher, context, batch),
    )
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-12)
    for name, before in student.params[OWN].items():  # which does not decay
        expected = before - 0.1 * gradient[OWN][name]
        np.testing.assert_allclose(new.network.params[OWN][name], expected, rtol=1e-12)
        assert abs(gradient[OWN][name]) > 1e-6
    kernel = student.params["Conv_0"]["kernel"]
    expected = kernel - 0.1 * (gradient["Conv_0"]["kernel"] + 2e-4 * kernel)
    found = new.network.params["Conv_0"]["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-13)
    kept = 0.9 * student.extra["mean"] + 0.1 * mean
    np.testing.assert_allclose(new.network.extra["mean"], kept, rtol=1e-12)
    assert new.network.extra["updates"] == 1
    assert_close(new.alpha, state.alpha, 0)
    # What is "correct" is what the scores say.
    found = outputs(tested, student, batch.images, True, batch.valid)
    z, features = jax.device_get(found)
    share = 0.5 * (features @ student.extra["mean"])[:, None] * np.arange(CLASSES)
    z = np.asarray(corrected(student, z))
    predicted = np.argmax((z - share)[:, :SEEN], axis=1).astype(np.int32)
    assert metrics["correct"] == np.sum((predicted == batch.labels)[:n])
    assert np.any(predicted[:n] != np.argmax(z[:n, :SEEN], axis=1))
    _, metrics = step(state, context, batch.replace(labels=predicted), rate)
    assert metrics["correct"] == metrics["images"] == n


def probe(student, teacher, batch, context):
    """A term that is what the teacher's outputs are."""
    values = jnp.sum(teacher["scores"][:, :SEEN], axis=1) + teacher["shift"]
    return values, batch.valid


@pytest.mark.parametrize("through", [forward, steps.plain])
def test_the_teacher_goes_through_the_phase_s_forward_with_what_is_its_own(
    x64, through
):
    """In evaluation mode, without a gradient; what it would keep is dropped."""

    def seen(apply, network, batch, context):
        out, network = through(apply, network, batch, context)
        return {"scores": out["logits"], "shift": jnp.zeros(())} | out, network

    tested = program(jnp.float64, False, "il_baseline", augmented=False)
    term = steps.Term("probe", probe, {})
    tested = dataclasses.replace(tested, terms=(term,), forward=seen)
    state, context, data, _, streams = arguments(tested, "il_baseline")
    batch = batch_of(tested, data, streams[TRAIN], 0)

    def value(params, teacher):
        moved = state.replace(network=state.network.replace(params=params))
        given = context.replace(teacher=teacher)
        found = steps._teacher_outputs(tested, given, batch)
        return steps._loss(tested, moved, given, batch, found)

    both = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
    teacher = context.teacher
    (found, (moved, _)), gradients = jitted(both, state.network.params, teacher)
    z, features = outputs(tested, teacher, batch.images, False)
    expected = np.asarray(z)[:, :SEEN]
    if through is forward:
        own = OWN_OF["teacher"]
        expected = np.array(expected)
        expected[:, OLD:] = own["scale"] * expected[:, OLD:] + own["shift"]
        common = (features @ KEPT["teacher"]["mean"])[:, None]
        expected = expected - 0.5 * common * np.arange(SEEN)[None, :]
        expected = expected.sum(axis=1) + own["shift"]
    else:
        expected = expected.sum(axis=1)
    np.testing.assert_allclose(found, expected.mean(), rtol=1e-12)
    for leaf in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(leaf, 0)
    assert moved.extra["updates"] == (1 if through is forward else 0)


def split(mode, function, values, valid):
    """A function of a batch and its rows, in one piece or with rows on 8 devices."""
    if mode == "whole":
        empty = np.zeros(len(valid), np.int32)
        return jax.jit(lambda v, w: function(Batch(None, empty, w), v))(values, valid)

    def one(v, w):
        return function(Batch(None, None, w, parallel.AXIS), v)

    shards = (values.reshape(8, -1, *values.shape[1:]), valid.reshape(8, -1))
    found = jax.pmap(one, axis_name=parallel.AXIS)(*shards)
    np.testing.assert_array_equal(found, np.broadcast_to(found[:1], found.shape))
    return found[0]


@pytest.mark.parametrize("mode", ["whole", "pmap"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_a_mean_is_that_of_the_valid_rows_of_all_devices(mode, shape):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(16, *shape)).astype(np.float32)
    valid = np.zeros(16, np.float32)
    valid[[0, 3, 4, 5, 11]] = 1  # some devices have none
    values[valid == 0] = 1e6
    found = split(mode, Batch.mean, values, valid)
    np.testing.assert_allclose(found, values[valid > 0].mean(axis=0), rtol=1e-5)
    none = split(mode, Batch.mean, values, np.zeros(16, np.float32))
    np.testing.assert_array_equal(none, np.zeros(shape))


@pytest.mark.parametrize("mode", ["whole", "pmap"])
def test_the_whole_batch_is_in_the_order_of_its_rows(mode):
    values = np.arange(32, dtype=np.float32).reshape(16, 2)
    valid = (np.arange(16) < 13).astype(np.float32)
    found = split(mode, Batch.whole, values, valid)
    np.testing.assert_array_equal(found, values)
    found = split(mode, lambda batch, _: batch.whole(batch.valid), values, valid)
    np.testing.assert_array_equal(found, valid)


def test_scores_are_the_prediction_rule():
    seen = np.arange(4) < 3
    out = {"logits": jnp.asarray([[1.0, 2.0, 0.0, 9.0]])}
    found = steps.scores(out, seen)
    np.testing.assert_array_equal(found, [[1.0, 2.0, 0.0, np.float32(9 + EXCLUDED)]])
    own = {**out, "scores": jnp.asarray([[3.0, 2.0, 0.0, 9.0]])}
    assert int(jnp.argmax(steps.scores(own, seen))) == 0
    assert int(jnp.argmax(found)) == 1


@functools.cache
def evaluate(how):
    """Of `make_evaluate`, where the scores are the logits or their opposite."""

    def opposite(apply, network, batch, context):
        out, network = apply(network, batch.images, batch.valid)
        return out | {"scores": -out["logits"]}, network

    tested = program(jnp.float32, meta=False, augmented=False)
    if how == "opposite":
        tested = dataclasses.replace(tested, forward=opposite)
    return tested, jax.jit(inference.make_evaluate(tested))


@pytest.mark.parametrize("seen", [SEEN, CLASSES])
@pytest.mark.parametrize("how", ["logits", "opposite"])
def test_top_1_and_top_5_are_those_of_the_scores(how, seen):
    tested, program_ = evaluate(how)
    _, context, data, _, streams = example(tested, np.float32)
    context = context.replace(seen=np.arange(CLASSES) < seen)
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf[-1:]), streams[TRAIN])
    data = data.replace(labels=(data.labels + np.arange(40, dtype=np.int32)) % seen)
    of = network(tested, np.float32)
    valid, predicted, top5, features = program_(of, context, data, rows)
    np.testing.assert_array_equal(valid, rows.valid)
    assert features.shape == (1, BATCH, FEATURES)
    batch = batch_of(tested, data, rows, 0)
    images = tested.test_images(data.images[rows.indices[0]])
    (z, out), _ = tested.model.apply(
        {"params": of.params, "batch_stats": of.batch_stats},
        images,
        train=False,
        mutable=["batch_stats"],
    )
    np.testing.assert_allclose(features[0], out["features"], rtol=1e-5)
    ranked = np.argsort(np.asarray(z if how == "opposite" else -z)[:, :seen], axis=1)
    np.testing.assert_array_equal(predicted[0], ranked[:, 0])
    among = [
        label in row for label, row in zip(batch.labels, ranked[:, :5], strict=True)
    ]
    np.testing.assert_array_equal(top5[0], among)
    if seen == CLASSES:  # of six classes one is not among the five
        assert 0 < np.sum(top5) < BATCH
    else:
        assert np.all(top5)


def test_evaluate_predicts_among_seen_classes_only():
    tested, program_ = evaluate("logits")
    _, context, data, _, streams = example(tested, np.float32)
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf[:1]), streams[TRAIN])
    of = network(tested, np.float32)
    bias = jnp.zeros(CLASSES).at[CLASSES - 1].set(100.0)
    of = of.replace(params={**of.params, "head": {**of.params["head"], "bias": bias}})
    _, predicted, top5, _ = program_(of, context, data, rows)
    assert predicted.shape == (1, BATCH) and int(predicted.max()) < SEEN
    assert bool(top5.all())  # five classes are seen
    context = context.replace(seen=np.ones(CLASSES, bool))
    _, predicted, *_ = program_(of, context, data, rows)
    assert (predicted == CLASSES - 1).all()
