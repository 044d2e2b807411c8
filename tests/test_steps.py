"""The compiled steps: one device, jit over 8 and pmap over 8 agree; the algebra."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bsce_jax import log_prior, meta_alpha
from bsce_jax.compute import optim, parallel, steps, updates
from bsce_jax.compute.state import Images, Rows, Schedule, StepContext, TrainState
from bsce_jax.config import terms
from bsce_jax.data import augment
from bsce_jax.losses import kd
from bsce_jax.losses.softmax_ce import softmax_cross_entropy
from tests.tiny import TinyNet

CLASSES, OLD, SEEN, BATCH, UPDATES = 6, 3, 5, 12, 3


# Head and loss terms, with their options and weights.
METHODS = {
    "il_baseline": (
        "linear",
        {"kd": ({"temperature": 2.0}, 0.6), "softmax_ce": ({}, 0.4)},
    ),
    "lucir": (
        "cosine",
        {
            "softmax_ce": ({}, 1.0),
            "less_forget": ({}, 5.0),
            "margin_ranking": ({"k": 2, "margin": 0.5}, 1.0),
        },
    ),
    "podnet": (
        "local_similarity",
        {
            "nca": ({"margin": 0.6, "exact": False}, 1.0),
            "pod_spatial": ({}, 3.0),
            "pod_flat": ({}, 1.5),
        },
    ),
    "table6": (  # in one program, though no method has both
        "linear",
        {
            "separated_softmax_ce": ({}, 1.0),
            "softmax_ce": ({"rescale": True}, 0.5),
        },
    ),
}


def program(dtype, meta=True, method="il_baseline") -> steps.Program:
    pixels = {"mean": (0.5,), "std": (0.5,), "dtype": dtype}
    head, chosen = METHODS[method]
    if meta and "nca" in chosen:  # alpha acts through softmax_ce only
        chosen = {"softmax_ce": ({}, 1.0)} | chosen
    return steps.Program(
        model=TinyNet(CLASSES, dtype, head, proxies=3),
        terms=tuple(
            steps.Term(name, terms.module(name).term, options)
            for name, (options, _) in sorted(chosen.items())
        ),
        optimizer=optim.sgd(0.9, 2e-4),
        train_images=functools.partial(
            augment.train_images, padding=1, flip=True, brightness=0.0, **pixels
        ),
        test_images=functools.partial(augment.test_images, **pixels),
        meta=steps.Meta(optax.sgd(1.0), 2, 0.0, 1e-3, 10.0, "train", False)
        if meta
        else None,
    )


def example(program: steps.Program, dtype, seed=0, method="il_baseline"):
    """State, context, data and a plan of UPDATES updates, the last batch partial."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (40, 8, 8, 1)).astype(np.uint8)
    labels = rng.integers(0, SEEN, 40).astype(np.int32)
    init = jax.jit(functools.partial(program.model.init, train=False))
    network, teacher = (
        init(jax.random.key(seed + i), jnp.zeros((1, 8, 8, 1), dtype)) for i in (0, 1)
    )
    params = network["params"]
    state = TrainState(
        params,
        network["batch_stats"],
        program.optimizer.init(params),
        np.asarray(0.7, dtype),
        optax.sgd(1.0).init(np.asarray(0.7, dtype)),
        {},
    )
    positions = np.arange(CLASSES)
    old, seen = positions < OLD, positions < SEEN
    counts = np.where(old, 4.0, 30.0) * seen
    context = StepContext(
        log_prior=np.asarray(log_prior.balanced(counts.astype(dtype))),
        old=old,
        seen=seen,
        counts=counts.astype(dtype),
        task_ids=np.zeros(CLASSES, np.int32),
        weights={
            term.name: np.asarray(
                METHODS[method][1].get(term.name, ({}, 1.0))[1], dtype
            )
            for term in program.terms
        },
        update_scale=optim.update_scale(params, seen),
        teachers=(teacher,),
    )
    indices = rng.integers(0, 40, (UPDATES, BATCH)).astype(np.int32)
    valid = np.ones((UPDATES, BATCH), np.float32)
    valid[-1, 5:] = 0  # fewer valid rows than devices
    numbers = np.broadcast_to(np.arange(BATCH, dtype=np.int32), indices.shape)
    constant = np.ones(UPDATES, np.int32)
    schedule = Schedule(
        3 * constant,
        constant,
        constant,
        np.arange(UPDATES, dtype=np.int32),
        0.05 * np.ones(UPDATES, dtype),
    )
    held = rng.integers(0, 40, (2, BATCH)).astype(np.int32)
    held_out = Rows(held, np.ones(held.shape, np.float32), numbers[:2])
    rows = Rows(indices, valid, numbers)
    return state, context, Images(images, labels), schedule, rows, held_out


def compiled(program, mode, devices):
    """One call of `program` on host arrays, compiled once."""
    place = parallel.create(mode, devices)
    whole, split = "replicated", "batch"
    function = updates.make_train_update(program)
    inputs: list = [whole, whole, whole, whole, whole, split]
    if program.meta is not None:
        function = updates.make_meta_update(program)
        inputs.append(split)
    update = parallel.compile_step(
        place, function, name="update", inputs=inputs, outputs=(whole, whole)
    )

    def run(state, context, data, schedule, rows, held_out):
        count = np.int32(len(rows.indices))
        values = parallel.replicate(place, (state, context, data, count, schedule))
        held = (parallel.shard(place, held_out),) if program.meta else ()
        found = update(*values, parallel.shard(place, rows), *held)
        return jax.device_get(found)

    return run


def run(program, mode, devices, arguments):
    """Compiles and runs one call; returns host arrays."""
    return compiled(program, mode, devices)(*arguments)


def assert_close(a, b, rtol):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        np.testing.assert_allclose(
            x, y, rtol=rtol, atol=rtol, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize(
    ("method", "meta"),
    [
        ("il_baseline", False),
        ("il_baseline", True),
        ("lucir", True),
        ("podnet", True),
        ("table6", False),
    ],
)
def test_one_device_jit_8_and_pmap_8_give_the_same_update(x64, method, meta):
    tested = program(jnp.float64, meta, method)
    arguments = example(tested, np.float64, method=method)
    one = run(tested, "jit", jax.devices()[:1], arguments)
    for mode in ("jit", "pmap"):
        eight = run(tested, mode, jax.devices()[:8], arguments)
        assert_close(one, eight, 1e-9)
    assert one[1]["images"].tolist() == [12, 12, 5]
    if meta:
        alphas = one[1]["alpha"]
        assert alphas[0] != 0.7 and alphas[0] == alphas[1] != alphas[2]


def test_a_loop_of_updates_equals_single_calls(x64):
    tested = program(jnp.float64)
    state, context, data, schedule, rows, held_out = example(tested, np.float64)
    arguments = (state, context, data, schedule, rows, held_out)
    looped, metrics = run(tested, "jit", jax.devices()[:1], arguments)
    one = jax.devices()[:1]
    plain = compiled(dataclasses.replace(tested, meta=None), "jit", one)
    with_alpha = compiled(tested, "jit", one)
    for u in range(UPDATES):
        at = functools.partial(jax.tree.map, operator.itemgetter(slice(u, u + 1)))
        single = plain if u % tested.meta.every else with_alpha
        group = u // tested.meta.every
        held = jax.tree.map(operator.itemgetter(slice(group, group + 1)), held_out)
        state, new = single(state, context, data, at(schedule), at(rows), held)
        np.testing.assert_allclose(new["loss"][0], metrics["loss"][u], rtol=1e-9)
    assert_close(state, looped, 1e-9)


def test_fewer_updates_than_the_plan_holds(x64):
    tested = program(jnp.float64)
    state, context, data, schedule, rows, held_out = example(tested, np.float64)
    place = parallel.create("jit", jax.devices()[:1])
    update = jax.jit(
        functools.partial(updates.make_meta_update(tested), axis_name=None)
    )
    whole = parallel.replicate(place, (state, context, data))
    full = update(*whole, 3, schedule, rows, held_out)
    part = update(*whole, 1, schedule, rows, held_out)
    assert part[1]["images"].tolist() == [12, 0, 0]
    assert part[1]["loss"][0] == full[1]["loss"][0]


def test_train_step_is_pytorch_sgd_on_the_weighted_terms(x64):
    """Against jax.grad of a loss written out in full, and hand-made momentum."""
    tested = program(jnp.float64, meta=False)
    state, context, data, schedule, rows, _ = example(tested, np.float64)
    key = jax.random.key(0)
    batch = steps.fetch(tested, data, jax.tree.map(jnp.asarray, rows), 2, key)
    step = jax.jit(functools.partial(steps.train_step, tested))
    new, metrics = step(state, context, batch, jnp.asarray(0.1))

    def loss(params):
        (z, _), _ = tested.model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            batch.images,
            train=True,
            valid=batch.valid,
            mutable=["batch_stats"],
        )
        teacher, _ = tested.model.apply(context.teachers[0], batch.images, train=False)
        n = 5
        lam = context.counts * np.where(context.old, 0.7, 1.0)
        q = lam[None, :SEEN] * jnp.exp(z[:n, :SEEN])
        ce = -jnp.log(q[np.arange(n), batch.labels[:n]] / q.sum(axis=1))
        p = jax.nn.softmax(teacher[:n, :OLD] / 2)
        distilled = -4 * jnp.sum(p * jax.nn.log_softmax(z[:n, :OLD] / 2), axis=1)
        return 0.6 * distilled.mean() + 0.4 * ce.mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(state.params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-12)
    expected = jax.tree.map(
        lambda p, g: p - 0.1 * (g + 2e-4 * p), state.params, gradient
    )
    head = expected["head"]
    for name in head:  # the row of the class not seen does not move
        head[name] = np.array(head[name])
        head[name][..., SEEN:] = np.asarray(state.params["head"][name])[..., SEEN:]
    assert_close(jax.device_get(new.params), jax.device_get(expected), 1e-11)


def test_unseen_rows_never_move_over_many_updates(x64):
    tested = program(jnp.float64, meta=False)
    arguments = example(tested, np.float64)
    state, _ = run(tested, "jit", jax.devices()[:1], arguments)
    before, after = arguments[0].params["head"], state.params["head"]
    for name in before:
        np.testing.assert_array_equal(
            after[name][..., SEEN:], np.asarray(before[name])[..., SEEN:]
        )
        assert np.any(after[name][..., :SEEN] != np.asarray(before[name])[..., :SEEN])


@pytest.mark.parametrize("method", ["lucir", "podnet"])
def test_frozen_rows_stay_against_gradient_decay_and_momentum(x64, method):
    """Old rows of the head do not move by a bit; the learned scale does."""
    tested = program(jnp.float64, meta=False, method=method)
    state, context, *rest = example(tested, np.float64, method=method)
    momentum = jax.tree.map(jnp.ones_like, state.opt_state)
    scale = optim.update_scale(state.params, context.seen & ~context.old)
    arguments = (
        state.replace(opt_state=momentum),
        context.replace(update_scale=scale),
        *rest,
    )
    new, _ = run(tested, "jit", jax.devices()[:1], arguments)
    before, after = state.params["head"]["kernel"], new.params["head"]["kernel"]
    moved = np.any(np.asarray(before) != after, axis=tuple(range(before.ndim - 1)))
    assert moved.tolist() == [False] * OLD + [True] * (SEEN - OLD) + [False]
    assert new.params["head"]["scale"] != state.params["head"]["scale"]


@pytest.mark.parametrize("batch_norm", ["train", "eval"])
def test_fine_tuning_moves_the_rows_of_the_head_alone(x64, batch_norm):
    """As the main training restricted to the head, without the rest's backward pass."""
    tested = program(jnp.float64, meta=False, method="podnet")
    state, context, *rest = example(tested, np.float64, method="podnet")
    scale = optim.update_scale(state.params, context.seen, rest=0.0, scalars=0.0)
    arguments = (state, context.replace(update_scale=scale), *rest)
    one = jax.devices()[:1]
    tuned = dataclasses.replace(tested, trainable=("head",), batch_norm=batch_norm)
    new, _ = run(tuned, "jit", one, arguments)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(state.params),
        jax.tree.leaves(new.params),
        strict=True,
    ):
        changed = bool(np.any(np.asarray(a) != b))
        assert changed == (jax.tree_util.keystr(path) == "['head']['kernel']")
    moved = [
        bool(np.any(np.asarray(a) != b))
        for a, b in zip(
            jax.tree.leaves(state.batch_stats),
            jax.tree.leaves(new.batch_stats),
            strict=True,
        )
    ]
    assert moved == [batch_norm == "train"] * len(moved)
    if batch_norm == "train":
        whole, _ = run(tested, "jit", one, arguments)
        assert_close(whole.params["head"], new.params["head"], 1e-12)


def test_without_old_samples_the_ranking_term_vanishes_exactly(x64):
    """No memory: the update is that without the term, bit for bit."""
    tested = program(jnp.float64, meta=False, method="lucir")
    state, context, data, *rest = example(tested, np.float64, method="lucir")
    data = data.replace(labels=(OLD + data.labels % (SEEN - OLD)).astype(np.int32))
    arguments = (state, context, data, *rest)
    kept = tuple(term for term in tested.terms if term.name != "margin_ranking")
    one = jax.devices()[:1]
    with_term, metrics = run(tested, "jit", one, arguments)
    without, others = run(
        dataclasses.replace(tested, terms=kept), "jit", one, arguments
    )
    assert_close(metrics["loss"], others["loss"], 1e-14)
    assert_close(with_term.params, without.params, 1e-14)


def test_the_inner_step_of_meta_leaves_frozen_rows(x64):
    """theta* = theta - lr * scale * gradient: against reverse mode written out."""
    tested = program(jnp.float64, method="lucir")
    state, context, data, schedule, rows, held_out = example(tested, np.float64)
    scale = optim.update_scale(state.params, context.seen & ~context.old)
    context = context.replace(update_scale=scale)
    rows, held_out = jax.tree.map(jnp.asarray, (rows, held_out))
    batch = steps.fetch(tested, data, rows, 0, jax.random.key(0))
    balanced = steps.fetch(tested, data, held_out, 0, jax.random.key(1))
    teacher = steps._teacher_outputs(tested, context, batch)

    def inner(params, alpha):
        rest = (context, batch, teacher, None)
        return steps._loss(tested, params, state.batch_stats, alpha, *rest)[0]

    def after(alpha):
        gradient = jax.grad(inner)(state.params, alpha)
        rows_of_head = np.where(context.seen & ~context.old, 1.0, 0.0)
        gradient["head"]["kernel"] *= rows_of_head[None, :]
        stepped = jax.tree.map(lambda p, g: p - 0.05 * g, state.params, gradient)
        variables = {"params": stepped, "batch_stats": state.batch_stats}
        z = tested.model.apply(
            variables, balanced.images, train=True, mutable=["batch_stats"]
        )[0][0][:, :SEEN]
        return softmax_cross_entropy(z, balanced.labels).mean()

    step = jax.jit(functools.partial(steps.meta_step, tested))
    new = step(state, context, batch, balanced, jnp.asarray(0.05))
    expected = jax.jit(jax.grad(after))(state.alpha)
    np.testing.assert_allclose(new.alpha, 0.7 - expected, rtol=1e-10)
    assert abs(expected) > 1e-9


def test_meta_step_equals_reverse_mode_of_the_losses_written_out(x64):
    tested = program(jnp.float64)
    state, context, data, schedule, rows, held_out = example(tested, np.float64)
    rows, held_out = jax.tree.map(jnp.asarray, (rows, held_out))
    batch = steps.fetch(tested, data, rows, 0, jax.random.key(0))
    balanced = steps.fetch(tested, data, held_out, 0, jax.random.key(1))
    rate = jnp.asarray(0.05)
    step = jax.jit(functools.partial(steps.meta_step, tested))
    new = step(state, context, batch, balanced, rate)
    teacher, _ = tested.model.apply(context.teachers[0], batch.images, train=False)

    def logits(params, images):
        return tested.model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )[0][0]

    def inner(params, alpha):
        z = logits(params, batch.images)
        prior = log_prior.weighted(context.counts, context.old, alpha)
        ce = softmax_cross_entropy(z, batch.labels, prior)
        distilled = kd.knowledge_distillation(z, teacher, context.old)
        return 0.6 * distilled.mean() + 0.4 * ce.mean()

    def outer(params):
        z = logits(params, balanced.images)[:, :SEEN]
        return softmax_cross_entropy(z, balanced.labels).mean()

    nested = functools.partial(meta_alpha.gradient, inner, outer, mode="reverse")
    expected = jax.jit(nested)(state.params, state.alpha, 0.05)
    np.testing.assert_allclose(new.alpha, 0.7 - expected, rtol=1e-11)
    assert abs(expected) > 1e-6
    assert_close(new.params, state.params, 0)


def test_randomness_depends_on_seed_step_epoch_and_update():
    def key(**changed):
        values = {"seed": 0, "step": 1, "epoch": 2, "update": 3, **changed}
        schedule = Schedule(
            **{name: jnp.asarray([v]) for name, v in values.items()},
            learning_rate=jnp.zeros(1),
        )
        return tuple(jax.random.key_data(updates._key(schedule, 0, 0)).tolist())

    assert key() == key()
    changed = [key(**{name: 7}) for name in ("seed", "step", "epoch", "update")]
    assert len({key(), *changed}) == 5


def test_evaluate_predicts_among_seen_classes_only():
    tested = program(jnp.float32, meta=False)
    state, context, data, _, rows, _ = example(tested, np.float32)
    rows = jax.tree.map(lambda x: jnp.asarray(x[:1]), rows)
    bias = jnp.zeros(CLASSES).at[CLASSES - 1].set(100.0)
    params = {**state.params, "head": {**state.params["head"], "bias": bias}}
    evaluate = jax.jit(steps.make_evaluate(tested))
    valid, predicted, top5, features = evaluate(
        params, state.batch_stats, context.seen, data, rows
    )
    np.testing.assert_array_equal(valid, rows.valid)
    assert features.shape == (1, BATCH, 4)
    assert predicted.shape == (1, BATCH) and int(predicted.max()) < SEEN
    assert bool(top5.all())  # five classes are seen
    _, predicted, *_ = evaluate(
        params, state.batch_stats, np.ones(CLASSES, bool), data, rows
    )
    assert (predicted == CLASSES - 1).all()
