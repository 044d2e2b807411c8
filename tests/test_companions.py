"""Second streams, compiled: their pixels, who sees them, and what padding does."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsce_jax.compute import parallel, steps, updates
from bsce_jax.compute.state import COMPANIONS, HELD_OUT, MEMORY, TRAIN, Rows
from bsce_jax.config import terms
from bsce_jax.data import augment, batches, companions
from bsce_jax.methods import lucir_dde, tpcil_like
from bsce_jax.run import feed
from tests.step_example import (
    BATCH,
    FEATURES,
    UPDATES,
    assert_close,
    compiled,
    example,
    jitted,
    program,
)

EACH, STORED, EPOCH = 2, 5, 1
PLACES = 29  # of the epoch: its third batch has five images
OPTIONS = {"share": 0.5, "momentum": 0.9, "pool": 0}
ROWS = {TRAIN: BATCH, COMPANIONS: BATCH * EACH, MEMORY: STORED}


def forward(apply, network, batch, context):
    """DDE's and TPCIL's in one; keeps the images that each update has shown it."""
    kept = network.extra
    network = network.replace(extra={"h": kept["h"]})
    out, network = lucir_dde.forward(apply, network, batch, context, **OPTIONS)

    def memory(network, images, valid):  # the batch's pass has been
        found = out, network
        return found if images is batch.images else apply(network, images, valid)

    beside, network = tpcil_like.forward(memory, network, batch, context)
    extra = kept | network.extra | {"update": kept["update"] + 1}
    for name, shown in {TRAIN: batch, **batch.beside}.items():
        images = batch.whole(shown.images)[: ROWS[name]]
        extra[name] = kept[name].at[kept["update"]].set(images)
    return beside | out, network.replace(extra=extra)


def augmented(images, key, rows):
    """Brightness by the image's key: each gives other pixels, and it compiles soon."""
    of_image = jax.random.key_data(augment.keys(key, rows))[:, 0] / 2**32
    return images.astype(jnp.float64) / 255 * (1 + of_image[:, None, None, None])


@functools.cache
def small() -> steps.Program:
    """The terms that look at the streams."""
    chosen = tuple(
        steps.Term(name, terms.module(name).term, {}) for name in ("dde_ce", "topology")
    )
    base = program(jnp.float64, False, "lucir", False)
    return dataclasses.replace(
        base, terms=chosen, forward=forward, train_images=augmented
    )


PLAN = batches.Shuffled(np.arange(2, 2 + PLACES), BATCH, 2, seed=3, step=1)
TABLE = np.random.default_rng(0).integers(-1, PLACES, (PLACES, EACH)).astype(np.int32)
PLANS = {
    TRAIN: PLAN,
    COMPANIONS: companions.Companions(PLAN, EPOCH, TABLE),
    MEMORY: batches.Cycled(np.arange(31, 38), STORED, 6, 3, 1, batches.BESIDE),
}


@pytest.fixture
def given(x64):
    """State, context, images, schedule and streams of the plans' second epoch."""
    extra = {"h": np.zeros(FEATURES), "update": np.int32(0)}
    for name, rows in ROWS.items():
        extra[name] = np.zeros((UPDATES, rows, 8, 8, 1))
    own = {"extra": extra}
    arguments = example(small(), np.float64, student=own, teacher=own)
    assert arguments[3].seed[0] == PLAN.seed and arguments[3].epoch[0] == EPOCH
    images = feed.Resident(parallel.create("jit", jax.devices()[:1]), arguments[2])
    streams = {
        name: next(images.groups(plan, EPOCH * UPDATES, UPDATES))
        for name, plan in PLANS.items()
    }
    return *arguments[:4], jax.device_get(streams)


def update_of(tree, u):
    """The plan of one update."""
    return jax.tree.map(operator.itemgetter(slice(u, u + 1)), tree)


@functools.cache
def one_update(mode, devices):
    return compiled(small(), mode, jax.devices()[:devices])


def one_by_one(mode, devices, given):
    """The state after all updates, each in a call of its own, and their losses."""
    state, context, data, schedule, streams = given
    losses = []
    for u in range(UPDATES):
        rows = {name: update_of(rows, u) for name, rows in streams.items()}
        run = one_update(mode, devices)
        state, metrics = run(state, context, data, update_of(schedule, u), rows)
        losses.append(metrics["loss"][0])
    return state, np.array(losses)


def rebuilt(given):
    """All images by their own keys: TRAIN's, and MEMORY's by two purposes of keys."""
    _, _, data, schedule, streams = given

    def images(data, schedule, streams, name, purpose):
        found = [
            steps.fetch(
                small(), data, streams[name], u, updates._key(schedule, u, purpose)
            )
            for u in range(UPDATES)
        ]
        return jnp.stack([batch.images for batch in found])

    def every(*arguments):
        chosen = ((TRAIN, 0), (MEMORY, 3), (MEMORY, 0))
        return [images(*arguments, *one) for one in chosen]

    return jitted(every, data, schedule, streams)


@pytest.mark.slow
def test_companions_have_the_pixels_of_their_own_places(given):
    """As training images of their epoch; the memory's have keys of their own."""
    state, _ = one_by_one("jit", 1, given)
    shown = state.network.extra
    trained, stored, otherwise = rebuilt(given)
    np.testing.assert_array_equal(shown[TRAIN], trained)
    by_place = trained.reshape(-1, 8, 8, 1)
    found = shown[COMPANIONS].reshape(-1, EACH, 8, 8, 1)
    for place, k in np.argwhere(TABLE >= 0):
        np.testing.assert_array_equal(found[place, k], by_place[TABLE[place, k]])
    valid = given[-1][COMPANIONS].valid.reshape(-1, EACH)
    np.testing.assert_array_equal(valid[:PLACES], TABLE >= 0)
    assert not valid[PLACES:].any()
    np.testing.assert_array_equal(shown[MEMORY], stored)
    assert np.all(np.any(stored != otherwise, axis=(2, 3, 4)))


def test_features_of_an_epoch_are_those_of_the_images_trained_on(given):
    """The teacher's, by which companions are chosen, of the very same pixels."""
    _, context, data, schedule, streams = given
    of_epoch = updates.make_epoch_features(small())

    def both(teacher, data, schedule, rows):
        images = steps.fetch(
            small(), data, rows, 0, updates._key(schedule, 0, 0)
        ).images
        variables = {"params": teacher.params, "batch_stats": teacher.batch_stats}
        _, out = small().model.apply(variables, images, train=False)
        return of_epoch(teacher, context, data, schedule, rows), out["features"]

    at, rows = update_of(schedule, 2), update_of(streams[TRAIN], 2)
    (valid, found), expected = jitted(both, context.teacher, data, at, rows)
    np.testing.assert_array_equal(valid[0], np.arange(BATCH) < 5)
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)
    assert found.dtype == np.float32


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "devices"), [("pmap", 8), ("jit", 8), ("jit", 1)])
def test_one_call_on_many_devices_is_a_call_an_update_on_one(given, mode, devices):
    """Rows are filled up, those of companions together with their image."""
    state, losses = one_by_one("jit", 1, given)
    whole, metrics = compiled(small(), mode, jax.devices()[:devices])(*given)
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-9)
    assert len(set(losses)) == UPDATES
    assert_close(whole, state, 1e-9)


@pytest.mark.slow
def test_alpha_is_learned_beside_the_streams(given):
    """Meta's updates, in groups of two in one call, or each in a call of its own."""
    state, context, data, schedule, streams = given
    learning = program(jnp.float64, True, "lucir", False).meta
    learned = dataclasses.replace(small(), meta=learning)
    held = np.random.default_rng(2).integers(2, 40, (2, BATCH)).astype(np.int32)
    held_out = Rows(held, np.ones(held.shape, np.float32), streams[TRAIN].numbers[:2])
    with_alpha = compiled(learned, "jit", jax.devices()[:1])
    all_at_once = compiled(learned, "jit", jax.devices()[:1])
    whole, metrics = all_at_once(
        state, context, data, schedule, {**streams, HELD_OUT: held_out}
    )
    for u in range(UPDATES):
        rows = {name: update_of(stream, u) for name, stream in streams.items()}
        run = one_update("jit", 1)
        if u % learning.every == 0:
            run, rows[HELD_OUT] = with_alpha, update_of(held_out, u // learning.every)
        state, new = run(state, context, data, update_of(schedule, u), rows)
        np.testing.assert_allclose(new["loss"][0], metrics["loss"][u], rtol=1e-9)
        np.testing.assert_allclose(new["alpha"][0], metrics["alpha"][u], rtol=1e-9)
    assert_close(whole, state, 1e-9)
    first, same, last = metrics["alpha"]
    assert 0.7 != first == same != last and np.all(np.isfinite(metrics["alpha"]))


def test_rows_without_an_image_take_no_part(given):
    """Whatever they hold: loss, network and statistics have the same bits."""
    state, context, data, schedule, streams = given
    rng, at = np.random.default_rng(1), update_of(schedule, 2)
    rows = {name: update_of(stream, 2) for name, stream in streams.items()}
    absent = np.float32([[1, 1, 0, 1, 0]])
    rows[MEMORY] = rows[MEMORY].replace(valid=absent)

    def filled(stream):
        def other(leaf):
            found = rng.integers(0, BATCH, leaf.shape).astype(leaf.dtype)
            return np.where(stream.valid > 0, leaf, found)

        assert not stream.valid.all()
        return jax.tree.map(other, stream).replace(valid=stream.valid)

    garbage = {name: filled(stream) for name, stream in rows.items()}
    run = one_update("jit", 1)
    outcomes = [run(state, context, data, at, found) for found in (rows, garbage)]
    shown = [outcome[0].network.extra for outcome in outcomes]
    for name in ROWS:
        assert np.any(shown[0][name] != shown[1][name])
    ours, theirs = (
        (s.replace(network=s.network.replace(extra=s.network.extra["h"])), metrics)
        for s, metrics in outcomes
    )
    assert_close(ours, theirs, 0)


def test_an_update_written_out(given):
    """Neighbours', then the batch's pass; the memory's statistics are not kept."""
    state, context, data, schedule, streams = given
    rows = {name: update_of(stream, 0) for name, stream in streams.items()}
    at = update_of(schedule, 0)
    new, metrics = one_update("jit", 1)(state, context, data, at, rows)
    shown = {name: new.network.extra[name][0] for name in ROWS}
    valid = {name: stream.valid.ravel() for name, stream in rows.items()}
    labels = data.labels[rows[TRAIN].indices[0]]

    def passes(network, teacher, shown):
        found, stats = {}, network.batch_stats
        for name in (COMPANIONS, TRAIN, MEMORY):
            variables = {"params": network.params, "batch_stats": stats}
            (z, out), moved = small().model.apply(
                variables,
                shown[name],
                train=True,
                valid=valid[name],
                mutable=["batch_stats"],
            )
            found[name] = z, out["features"]
            stats = moved["batch_stats"] if name != MEMORY else stats
        variables = {"params": teacher.params, "batch_stats": teacher.batch_stats}
        _, out = small().model.apply(variables, shown[MEMORY], train=False)
        return found, out["features"], stats

    found, known, stats = jitted(passes, state.network, context.teacher, shown)
    assert_close(new.network.batch_stats, stats, 1e-12)
    mean = found[TRAIN][1].mean(axis=0)  # of a full batch, after a mean of 0
    np.testing.assert_allclose(new.network.extra["h"], mean, rtol=1e-12)
    prior = context.log_prior + np.where(context.old, np.log(0.7), 0)

    def likelihoods(z):
        scores = z + prior
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)

    every = np.arange(BATCH)
    p = likelihoods(found[TRAIN][0])[every, labels]
    each = likelihoods(found[COMPANIONS][0].reshape(BATCH, EACH, -1))[every, :, labels]
    there = valid[COMPANIONS].reshape(BATCH, EACH)
    assert {0, 1, 2} >= set(there.sum(axis=1)) > {2}
    q = (each * there).sum(axis=1) / np.maximum(there.sum(axis=1), 1)
    dde = -np.log(np.where(there.any(axis=1), (p + q) / 2, p)).mean()
    now, before = (
        (unit @ unit.T)[np.triu_indices(STORED, 1)]
        for unit in (
            f / np.linalg.norm(f, axis=1, keepdims=True)
            for f in (found[MEMORY][1], known)
        )
    )
    topology = -np.corrcoef(now, before)[0, 1]
    np.testing.assert_allclose(metrics["loss"][0], dde + topology, rtol=1e-5)


def test_the_teacher_sees_the_memory_and_no_companions(given):
    """Traced only: which streams each network's pass had."""
    state, context, data, schedule, streams = given
    seen = []

    def watched(apply, network, batch, context):
        seen.append((network is context.teacher, sorted(batch.beside)))
        return forward(apply, network, batch, context)

    watching = dataclasses.replace(small(), forward=watched)
    one = [update_of(tree, 0) for tree in (schedule, streams)]
    update = updates.make_train_update(watching)
    jax.eval_shape(update, state, context, data, np.int32(1), *one)
    assert seen == [(True, [MEMORY]), (False, [COMPANIONS, MEMORY])]


@pytest.mark.parametrize("width", [1, 2])
def test_groups_of_companions_are_cut_alike(given, width):
    """Groups of any width hold the same rows, the last filled up with none."""
    _, _, data, _, streams = given
    images = feed.Resident(parallel.create("jit", jax.devices()[:1]), data)
    plan, first = PLANS[COMPANIONS], EPOCH * UPDATES
    parts = list(images.groups(plan, first, width))
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    whole = streams[COMPANIONS]
    assert whole.indices.shape == (UPDATES, BATCH, EACH)
    for name in ("indices", "valid", "numbers", "updates"):
        found = getattr(joined, name)
        np.testing.assert_array_equal(found[:UPDATES], getattr(whole, name))
        assert not np.any(found[UPDATES:])
