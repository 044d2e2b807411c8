"""Training of one step: what is planned, called, recorded and saved, and when."""

import contextlib
import dataclasses
import functools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from bsce_jax import log_prior
from bsce_jax.compute import optim, parallel
from bsce_jax.compute.state import Images, StepContext, TrainState
from bsce_jax.config.fields import default_config
from bsce_jax.config.resolve import resolve
from bsce_jax.data import batches
from bsce_jax.errors import UserError
from bsce_jax.run import feed, loop, programs
from bsce_jax.run.phases import StepData
from tests.tiny import TinyNet

CLASSES, OLD, SEEN = 6, 2, 5
RATES = (0.1, 0.05, 0.01)


def config(**values) -> ConfigDict:
    c = default_config()
    c.terms = ConfigDict(
        {
            "softmax_ce": {"weight": "1-rho"},
            "kd": {"weight": "rho", "temperature": 2.0},
        }
    )
    c.data.mean, c.data.std, c.data.padding, c.data.flip = (0.5,), (0.25,), 0, False
    c.optim.batch_size = 4
    c.meta.every, c.meta.batch_size = 2, 6
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return resolve(c)


def plan(step=1, meta=False, images=11, batch_size=4, **changes) -> loop.Plan:
    """Three epochs of three updates, the last batch of an epoch partial."""
    values = {
        "phase": "main",
        "seed": 3,
        "step": step,
        "train": np.arange(100, 100 + images, dtype=np.int32),
        "held_out": np.arange(50, 55, dtype=np.int32) if meta else np.zeros(0, int),
        "batch_size": batch_size,
        "epochs": 3,
        "learning_rates": RATES,
        "alpha_every": 2 if meta else 0,
        "held_out_batch_size": 6,
        **changes,
    }
    return loop.Plan(**values)


def test_a_plan_counts_partial_batches():
    assert (plan().updates_per_epoch, plan().updates) == (3, 9)
    assert plan(images=12).updates == 9 and plan(images=13).updates == 12
    assert plan(images=1).updates == 3 and plan(images=4).updates_per_epoch == 1


def step_data(step: int, held_out: int = 0) -> StepData:
    train = np.arange(20, dtype=np.int32)
    held = np.arange(20, 20 + held_out, dtype=np.int32)
    return StepData("main", step, 0, 5, train, held, np.zeros(6, int), 0)


def test_make_plan_takes_the_lengths_and_rates_of_its_step():
    c = config(
        seed=9,
        optim__epochs=4,
        optim__milestones=(1, 3),
        optim__learning_rate=0.2,
        optim__decay=0.5,
        optim__base_epochs=3,
        optim__base_learning_rate=1.0,
        optim__base_milestones=(2,),
        optim__batch_size=7,
    )
    base = loop.make_plan(c, step_data(0))
    assert (base.epochs, base.learning_rates) == (3, (1.0, 1.0, 0.5))
    later = loop.make_plan(c, step_data(2))
    assert later.epochs == 4 and later.learning_rates == (0.2, 0.1, 0.1, 0.05)
    assert (later.seed, later.step, later.batch_size) == (9, 2, 7)
    assert later.updates == 4 * 3
    np.testing.assert_array_equal(later.train, np.arange(20))
    assert base.alpha_every == later.alpha_every == 0
    meta = loop.make_plan(c, step_data(2, held_out=5))
    assert (meta.alpha_every, meta.held_out_batch_size) == (2, 6)
    np.testing.assert_array_equal(meta.held_out, np.arange(20, 25))


def test_the_plan_of_fine_tuning_goes_on_where_the_main_training_ended():
    c = config(
        optim__epochs=4,
        optim__decay=0.5,
        optim__schedule="cosine",
        finetune__epochs=3,
        finetune__learning_rate=0.3,
        finetune__milestones=(2,),
    )
    data = dataclasses.replace(step_data(2), phase="finetune")
    tuned = loop.make_plan(c, data)
    assert (tuned.phase, tuned.epochs, tuned.first_epoch) == ("finetune", 3, 4)
    assert tuned.learning_rates == (0.3, 0.3, 0.15)  # not the cosine
    main = loop.make_plan(c, step_data(2))
    assert main.learning_rates[:2] == (0.1, 0.1) and main.learning_rates[3] < 0.06
    recorder, history = Recorder(), loop.History()
    fit(recorder, tuned, history)
    assert {call.name for call in recorder.calls} == {"finetune_update"}
    epochs = [int(call.schedule.epoch[0]) for call in recorder.calls]
    per_epoch = tuned.updates_per_epoch
    assert epochs == [e for e in (4, 5, 6) for _ in range(per_epoch)]
    order = [
        int(i) for call in recorder.calls[:per_epoch] for i in call.rows.indices[0]
    ]
    expected = tuned.train[batches.epoch_order(c.seed, 2, 4, len(tuned.train))]
    assert order[: len(expected)] == expected.tolist()


class Recorder:
    """Stands in for the compiled programs: writes down calls, makes up metrics.

    The state is the number of updates done; the loss of update u is 1 / (u + 1), every
    image with an even index is "correct", alpha is the number of its updates.
    """

    def __init__(
        self, updates_per_call=1, every=2, bad=None, loss=math.nan, broken=None
    ):
        self.parallel = parallel.create("jit", jax.devices()[:1])
        self.updates_per_call, self.every = updates_per_call, every
        self.bad, self.bad_loss, self.broken = bad, loss, broken
        self.calls: list = []

    def __getattr__(self, name):
        return functools.partial(self.update, name)

    def update(self, name, state, context, data, count, schedule, rows, held_out=None):
        assert (context, data) == ("context", "data")
        arguments = jax.device_get((int(count), schedule, rows, held_out))
        call = types.SimpleNamespace(name=name, first=state["done"])
        call.count, call.schedule, call.rows, call.held_out = arguments
        self.calls.append(call)
        updates = state["done"] + np.arange(self.updates_per_call)
        valid, indices = call.rows.valid, call.rows.indices
        metrics = {
            "loss": np.where(updates == self.bad, self.bad_loss, 1 / (updates + 1)),
            "correct": (valid * (indices % 2 == 0)).sum(axis=1),
            "images": valid.sum(axis=1),
            "alpha": 1.0 + updates // self.every,
            "finite": np.full(len(updates), self.broken not in updates[: call.count]),
        }
        return {"done": state["done"] + call.count}, metrics


def fit(recorder, plan, history=None, *, state=None, wanted=(), stop_after=math.inf):
    """Runs training.fit; returns the state, history, saves and images of each call.

    `wanted` are the numbers of updates in the history at which it is time to save, and
    `stop_after` the number of calls after which the run is asked to stop.
    """
    history = loop.History() if history is None else history
    saves, images, calls = [], [], 0

    def after_call(seen, n):
        assert seen is history
        images.append((seen.updates, n))

    def save(state, seen):
        assert seen is history
        saves.append((dict(state), json.loads(json.dumps(dataclasses.asdict(seen)))))

    def stop():
        nonlocal calls
        calls += 1
        return 15 if calls >= stop_after else 0

    result = loop.fit(
        recorder,
        {"done": history.updates} if state is None else state,
        "context",
        feed.Resident(recorder.parallel, "data"),
        plan,
        history,
        after_call=after_call,
        due=lambda: history.updates in wanted,
        save=save,
        stop=stop,
    )
    return result, history, saves, images


def expected_history(plan, every=2):
    """Loss, accuracy, alpha of every epoch of the Recorder, from its definition."""
    loss, accuracy, alpha, update = [], [], [], 0
    for epoch in range(plan.epochs):
        rng = np.random.default_rng([plan.seed, plan.step, epoch])
        order = plan.train[rng.permutation(len(plan.train))]
        total = correct = 0.0
        for first in range(0, len(order), plan.batch_size):
            batch = order[first : first + plan.batch_size]
            total += len(batch) / (update + 1)
            correct += (batch % 2 == 0).sum()
            update += 1
        loss.append(total / len(order))
        accuracy.append(100 * correct / len(order))
        alpha.append([update, 1.0 + (update - 1) // every])
    return loss, accuracy, alpha


@pytest.mark.parametrize("updates_per_call", [1, 2, 4, 9, 50])
@pytest.mark.parametrize("meta", [False, True])
def test_every_update_of_the_plan_is_made_once_in_order(updates_per_call, meta):
    recorder, planned = Recorder(updates_per_call), plan(meta=meta)
    result, history, saves, images = fit(recorder, planned)
    assert result == {"done": 9} and not saves and history.updates == 9
    calls = recorder.calls
    assert [c.first for c in calls] == list(range(0, 9, updates_per_call))
    assert sum(c.count for c in calls) == 9
    seen = []
    for call in calls:
        assert call.rows.indices.shape == call.rows.valid.shape == (updates_per_call, 4)
        assert call.rows.numbers.tolist() == [[0, 1, 2, 3]] * updates_per_call
        assert all(
            leaf.shape == (updates_per_call,) for leaf in jax.tree.leaves(call.schedule)
        )
        assert not call.rows.valid[call.count :].any()
        for u in range(call.count):
            update = call.first + u
            epoch, within = divmod(update, 3)
            assert call.schedule.seed[u] == 3 and call.schedule.step[u] == 1
            assert call.schedule.epoch[u] == epoch
            assert call.schedule.update[u] == within
            assert call.schedule.learning_rate[u] == np.float32(RATES[epoch])
            valid = call.rows.valid[u] == 1
            assert valid.sum() == (3 if within == 2 else 4)
            seen.append(call.rows.indices[u][valid])
    for epoch in range(3):
        rng = np.random.default_rng([3, 1, epoch])
        order = planned.train[rng.permutation(11)]
        found = np.concatenate(seen[3 * epoch : 3 * epoch + 3])
        np.testing.assert_array_equal(found, order)
    loss, accuracy, alpha = expected_history(planned)
    np.testing.assert_allclose(history.loss, loss, rtol=1e-12)
    np.testing.assert_allclose(history.accuracy, accuracy, rtol=1e-12)
    assert history.alpha == (alpha if meta else [])
    assert history.sums == [0, 0, 0]
    assert sum(n for _, n in images) == 33
    assert [updates for updates, _ in images] == [c.first + c.count for c in calls]


def test_which_program_runs():
    """Meta's own only where alpha is updated; a loop of updates holds its own."""

    def names(**options):
        recorder = Recorder(options.pop("updates_per_call", 1))
        fit(recorder, plan(**options))
        return [c.name for c in recorder.calls]

    assert set(names(step=0)) == {"base_update"}
    assert set(names(step=2)) == {"incremental_update"}
    mixed = names(meta=True)
    assert mixed == ["meta_update", "incremental_update"] * 4 + ["meta_update"]
    assert names(meta=True, updates_per_call=4) == ["meta_update"] * 3


@pytest.mark.parametrize("updates_per_call", [1, 2, 4])
def test_batches_of_the_held_out_images_follow_one_another(updates_per_call):
    """Draw d is positions 6 d to 6 d + 5 of reshuffled passes over the five images."""
    recorder, planned = Recorder(updates_per_call), plan(meta=True)
    fit(recorder, planned)
    drawn = []
    for call in recorder.calls:
        if call.name == "meta_update":
            assert call.first % 2 == 0
            assert call.held_out.indices.shape == (-(-updates_per_call // 2), 6)
            groups = -(-call.count // 2)
            assert call.held_out.valid[:groups].all()
            drawn.extend(call.held_out.indices[:groups])
    assert len(drawn) == 5
    joined = np.concatenate(drawn)
    for start in range(0, 30, 5):
        assert sorted(joined[start : start + 5]) == [50, 51, 52, 53, 54]
    for d, row in enumerate(drawn):
        expected = batches.cycled_rows(planned.held_out, 6, d, seed=3, step=1)
        np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("updates_per_call", [1, 2])
def test_a_save_holds_a_state_and_the_history_that_belongs_to_it(updates_per_call):
    recorder = Recorder(updates_per_call)
    _, history, saves, images = fit(recorder, plan(), wanted={2})
    assert [s["done"] for s, _ in saves] == [h["updates"] for _, h in saves]
    # Asked for while a call is in flight, agreed on with its metrics, done after the
    # next one, already dispatched.
    assert [s["done"] for s, _ in saves] == [2 + 2 * updates_per_call]
    assert [u for u, _ in images] == [*range(updates_per_call, 9, updates_per_call), 9][
        : len(images)
    ]
    _, undisturbed, _, _ = fit(Recorder(updates_per_call), plan())
    assert history == undisturbed


@pytest.mark.parametrize("calls", range(1, 9))
def test_stop_saves_first_and_the_run_goes_on_as_if_undisturbed(calls):
    planned = plan(meta=True)
    history = loop.History()
    saves: list = []

    def save(state, seen):
        saves.append((dict(state), dataclasses.asdict(seen)))

    number = iter(range(1, 100))
    with pytest.raises(
        loop.StopRequested,
        match=f"stopped in step 1 after update {calls + 1}; saved",
    ) as stopped:
        loop.fit(
            (recorder := Recorder()),
            {"done": 0},
            "context",
            feed.Resident(recorder.parallel, "data"),
            planned,
            history,
            after_call=lambda history, images: None,
            due=lambda: False,
            save=save,
            stop=lambda: 15 * (next(number) >= calls),
        )
    assert stopped.value.number == 15
    ((state, saved),) = saves
    assert state["done"] == saved["updates"] == calls + 1
    resumed = loop.History(**json.loads(json.dumps(saved)))
    recorder = Recorder()
    result, resumed, _, _ = fit(recorder, planned, resumed)
    assert result["done"] == 9 and [c.first for c in recorder.calls] == [
        *range(calls + 1, 9)
    ]
    _, undisturbed, _, _ = fit(Recorder(), planned)
    assert resumed == undisturbed


def test_a_finished_step_is_not_trained_again():
    recorder = Recorder()
    history = loop.History(updates=9, loss=[1.0, 2.0, 3.0])
    result, history, saves, images = fit(recorder, plan(), history)
    assert result == {"done": 9} and not (recorder.calls or saves or images)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize(("updates_per_call", "bad"), [(1, 0), (1, 5), (4, 6), (1, 8)])
def test_a_loss_that_is_not_finite_stops_training(loss, updates_per_call, bad):
    recorder = Recorder(updates_per_call, bad=bad, loss=loss)
    history = loop.History()
    with pytest.raises(loop.NotFiniteError) as caught:
        fit(recorder, plan(step=7), history)
    assert str(caught.value) == f"the loss is {loss} in step 7 at update {bad}"
    assert isinstance(caught.value, UserError)
    assert history.updates == bad  # what came before is there, nothing bad is
    assert math.isfinite(sum(history.sums))
    assert len(recorder.calls) <= bad // updates_per_call + 2  # one call late


@pytest.mark.parametrize(("updates_per_call", "broken"), [(1, 3), (4, 5), (1, 8)])
def test_a_network_that_is_not_finite_stops_training(updates_per_call, broken):
    """Even after the last update, of whose network no loss tells."""
    recorder = Recorder(updates_per_call, broken=broken)
    last = broken // updates_per_call * updates_per_call + updates_per_call - 1
    message = f"the network is not finite in step 7 after update {min(last, 8)}"
    with pytest.raises(loop.NotFiniteError, match=message):
        fit(recorder, plan(step=7))


def saved(recorder, due) -> list[int]:
    """Updates at each save of a run; `due` is given those done and those saved."""
    history, saves = loop.History(), [0]
    with contextlib.suppress(loop.NotFiniteError):
        loop.fit(
            recorder,
            {"done": 0},
            "context",
            feed.Resident(recorder.parallel, "data"),
            plan(),
            history,
            after_call=lambda history, images: None,
            due=lambda: due(history.updates, saves[-1]),
            save=lambda state, history: saves.append(history.updates),
            stop=lambda: 0,
        )
    return saves[1:]


def test_a_save_that_is_due_is_made_once():
    """A clock that the save sets back; a second save would wait for the first."""
    assert saved(Recorder(), lambda done, last: done - last >= 2) == [4, 8]


def test_nothing_is_saved_after_a_loss_that_is_not_finite():
    assert saved(Recorder(), lambda done, last: True) == [*range(2, 10)]
    assert saved(Recorder(bad=4), lambda done, last: True) == [2, 3, 4]


# From here on with compiled programs, of a network small enough to compile in seconds.


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
    state = TrainState(
        params=student["params"],
        batch_stats=student["batch_stats"],
        opt_state=jax.device_get(optimizers[0].init(student["params"])),
        alpha=one,
        alpha_opt_state=jax.device_get(optimizers[1].init(one)),
        extra={},
    )
    context = StepContext(
        log_prior=prior.astype(dtype),
        old=old,
        seen=seen,
        counts=counts.astype(dtype),
        task_ids=np.zeros(CLASSES, np.int32),
        weights=weights,
        update_scale=optim.update_scale(student["params"], seen),
        teachers=(teacher,),
    )
    return state, context, Images(images, labels.astype(np.int32))


def small_plan(meta: bool) -> loop.Plan:
    held_out = np.arange(SEEN, dtype=np.int32) if meta else None
    changes = {"held_out": held_out} if meta else {}
    train = np.arange(SEEN, SEEN + 11, dtype=np.int32)
    return plan(meta=meta, train=train, **changes)


def train(built, arguments, plan, history=None, stop_after=math.inf):
    """Runs real training; returns the state and history at the end or at the stop."""
    history = loop.History() if history is None else history
    state, context, data = parallel.replicate(built.parallel, arguments)
    saved: list = []
    number = iter(range(1, 100))
    try:
        state = loop.fit(
            built,
            state,
            context,
            feed.Resident(built.parallel, data),
            plan,
            history,
            after_call=lambda history, images: None,
            due=lambda: False,
            save=lambda state, history: saved.append(jax.device_get(state)),
            stop=lambda: 15 * (next(number) >= stop_after),
        )
    except loop.StopRequested:
        (state,) = saved
    return jax.device_get(state), history


def written_out(built, arguments, plan):
    """The same training from the paper's formulas: whole batches, NumPy's SGD."""
    state, context, data = arguments
    params, statistics = state.params, state.batch_stats
    lam = jnp.asarray(context.counts[:SEEN])

    @jax.jit
    def gradient(params, statistics, images, labels):
        teacher, _ = built.model.apply(context.teachers[0], images, train=False)

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
    for epoch, rate in enumerate(np.float32(plan.learning_rates)):
        rng = np.random.default_rng([plan.seed, plan.step, epoch])
        order = plan.train[rng.permutation(len(plan.train))]
        total = correct = 0.0
        for first in range(0, len(order), plan.batch_size):
            batch = order[first : first + plan.batch_size]
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
    planned = small_plan(meta=False)
    state, history = train(made, arguments, planned)
    params, statistics, losses, accuracies = written_out(made, arguments, planned)
    np.testing.assert_allclose(history.loss, losses, rtol=1e-7)
    np.testing.assert_allclose(history.accuracy, accuracies, rtol=1e-12)
    assert len(history.loss) == 3 and history.loss[0] != history.loss[2]
    for found, expected in ((state.params, params), (state.batch_stats, statistics)):
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
    planned = small_plan(meta=True)
    expected, undisturbed = train(made, arguments, planned)
    assert not same_bits(expected.params, arguments[0].params)
    for calls in range(2, -(-planned.updates // updates_per_call)):
        state, history = train(made, arguments, planned, stop_after=calls - 1)
        assert history.updates == calls * updates_per_call
        assert not same_bits(state.params, expected.params)
        history = loop.History(**json.loads(json.dumps(dataclasses.asdict(history))))
        found, history = train(made, (state, *arguments[1:]), planned, history)
        assert same_bits(found, expected) and history == undisturbed


def test_alpha_of_every_epoch_is_recorded(built):
    made = built("float32", 1)
    arguments = example("float32")
    planned = small_plan(meta=True)
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
    plain = train(made, arguments, small_plan(meta=False))
    assert plain[1].alpha == [] and plain[0].alpha == 1.0


def test_a_loop_and_single_updates_give_the_same_training(built):
    planned = small_plan(meta=True)
    arguments = example("float32")
    single, one = train(built("float32", 1), arguments, planned)
    looped, two = train(built("float32", 2), arguments, planned)
    np.testing.assert_allclose(one.loss, two.loss, rtol=1e-4)
    np.testing.assert_allclose(one.alpha, two.alpha, rtol=1e-3)
    np.testing.assert_allclose(single.alpha, looped.alpha, rtol=1e-3)
