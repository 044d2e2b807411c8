"""The training of a phase: what is planned, called, recorded and saved, and when."""

import contextlib
import dataclasses
import functools
import json
import math
import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from bsce_jax.compute import parallel
from bsce_jax.compute.state import HELD_OUT, TRAIN
from bsce_jax.config.fields import default_config, phase
from bsce_jax.config.resolve import resolve
from bsce_jax.data import batches
from bsce_jax.errors import UserError
from bsce_jax.run import feed, loop
from bsce_jax.run.phases import configured
from tests.loop_example import RATES, config, data_of, training


def test_a_training_counts_partial_batches():
    assert (training().updates_per_epoch, training().updates) == (3, 9)
    assert training(images=12).updates == 9 and training(images=13).updates == 12
    assert training(images=1).updates == 3
    assert training(images=4).updates_per_epoch == 1


def test_make_training_takes_the_lengths_and_rates_of_its_phase():
    c = config(
        seed=9,
        phase__incremental__epochs=4,
        phase__incremental__milestones=(1, 3),
        phase__incremental__learning_rate=0.2,
        phase__incremental__decay=0.5,
        phase__base__epochs=3,
        phase__base__learning_rate=1.0,
        phase__base__milestones=(2,),
        phase__base__decay=0.5,
        optim__batch_size=7,
    )
    train = np.arange(20, dtype=np.int32)
    base, later = (dataclasses.asdict(found) for found in configured(c))
    base = loop.make_training(c, data_of(0, train, **base))
    assert base.data.phase.epochs == 3 and base.learning_rates == (1.0, 1.0, 0.5)
    found = loop.make_training(c, data_of(2, train, **later))
    assert found.learning_rates == (0.2, 0.1, 0.1, 0.05)
    assert (found.seed, found.data.step, found.batch_size) == (9, 2, 7)
    assert found.updates == 4 * 3
    np.testing.assert_array_equal(found.data.train, train)
    assert base.alpha_every == found.alpha_every == 0
    meta = loop.make_training(c, data_of(2, train, np.arange(20, 25), **later))
    assert (meta.alpha_every, meta.held_out_batch_size) == (2, 6)
    np.testing.assert_array_equal(meta.held_out_batches.indices, np.arange(20, 25))


def test_a_later_phase_goes_on_where_the_one_before_ended():
    c = default_config()
    c.phases = (*c.phases, "finetune")
    c.phase.finetune = phase(
        images="exemplars", epochs=3, learning_rate=0.3, milestones=(2,), decay=0.5
    )
    c.phase.incremental.epochs, c.phase.incremental.schedule = 4, "cosine"
    c.terms = ConfigDict({"softmax_ce": {"weight": 1.0}})
    c = resolve(c)
    _, main, last = (dataclasses.asdict(found) for found in configured(c))
    train = np.arange(20, dtype=np.int32)
    tuned = loop.make_training(c, data_of(2, train, **last))
    tuned = dataclasses.replace(tuned, batch_size=4)
    assert tuned.data.phase.epochs == 3 and tuned.data.phase.first_epoch == 4
    assert tuned.learning_rates == (0.3, 0.3, 0.15)  # not the cosine
    rates = loop.make_training(c, data_of(2, train, **main)).learning_rates
    assert rates[:2] == (0.1, 0.1) and rates[3] < 0.06
    recorder, history = Recorder(), loop.History()
    fit(recorder, tuned, history)
    assert {call.name for call in recorder.calls} == {"finetune"}
    epochs = [int(call.schedule.epoch[0]) for call in recorder.calls]
    per_epoch = tuned.updates_per_epoch
    assert epochs == [e for e in (4, 5, 6) for _ in range(per_epoch)]
    order = [
        int(i) for call in recorder.calls[:per_epoch] for i in call.rows.indices[0]
    ]
    expected = train[batches.epoch_order(c.seed, 2, 4, len(train))]
    assert order[: len(expected)] == expected.tolist()


class Named(dict):
    """A value of any name."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def __missing__(self, name):
        return self.make(name)


class Recorder:
    """Stands in for the compiled programs: writes down calls, makes up metrics.

    The state is the number of updates done; the loss of update u is 1 / (u + 1), every
    image with an even index is "correct", alpha is the number of its updates.
    """

    def __init__(
        self, updates_per_call=1, every=2, bad=None, loss=math.nan, broken=None
    ):
        self.devices = parallel.create("jit", jax.devices()[:1])
        self.updates_per_call, self.every = updates_per_call, every
        self.bad, self.bad_loss, self.broken = bad, loss, broken
        self.calls: list = []

    @property
    def updates(self):
        return Named(lambda name: functools.partial(self.update, name))

    @property
    def meta_updates(self):
        return Named(lambda name: functools.partial(self.update, f"{name} with alpha"))

    def update(self, name, state, context, data, count, schedule, streams):
        assert (context, data) == ("context", "data")
        call = types.SimpleNamespace(name=name, first=state["done"])
        given = jax.device_get((int(count), schedule, streams))
        call.count, call.schedule, streams = given
        call.rows, call.held_out = streams.pop(TRAIN), streams.pop(HELD_OUT, None)
        assert not streams and ("alpha" in name) == (call.held_out is not None)
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


def watching(**changes) -> loop.Watch:
    """Nothing is due or asked for, but for `changes`."""
    nothing = loop.Watch(
        after_call=lambda history, images: None,
        due=lambda: False,
        save=lambda state, history: None,
        stop=lambda: 0,
    )
    return dataclasses.replace(nothing, **changes)


def run(recorder, training, history, watch, state=None):
    """loop.fit with a recorder."""
    images = feed.Resident(recorder.devices, "data")
    state = {"done": history.updates} if state is None else state
    what = loop.Loop(recorder, images, training)
    return loop.fit(what, state, "context", history, watch)


def fit(recorder, training, history=None, *, wanted=()):
    """Runs loop.fit; returns the state, history, saves and images of each call.

    `wanted` are the numbers of updates in the history at which it is time to save.
    """
    history = loop.History() if history is None else history
    saves, images = [], []

    def after_call(seen, n):
        assert seen is history
        images.append((seen.updates, n))

    def save(state, seen):
        assert seen is history
        saves.append((dict(state), json.loads(json.dumps(dataclasses.asdict(seen)))))

    due = lambda: history.updates in wanted  # noqa: E731
    watch = watching(after_call=after_call, due=due, save=save)
    return run(recorder, training, history, watch), history, saves, images


def expected_history(training, every=2):
    """Loss, accuracy, alpha of every epoch of the Recorder, from its definition."""
    loss, accuracy, alpha, update = [], [], [], 0
    data, size = training.data, training.batch_size
    for epoch in range(data.phase.epochs):
        rng = np.random.default_rng([training.seed, data.step, epoch])
        order = data.train[rng.permutation(len(data.train))]
        total = correct = 0.0
        for first in range(0, len(order), size):
            batch = order[first : first + size]
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
    recorder, planned = Recorder(updates_per_call), training(meta=meta)
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
        order = planned.data.train[rng.permutation(11)]
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
        fit(recorder, training(**options))
        return [c.name for c in recorder.calls]

    assert set(names(step=0, name="base")) == {"base"}
    assert set(names(step=2)) == {"incremental"}
    assert set(names(step=2, name="another")) == {"another"}
    mixed, learned = names(meta=True), "incremental with alpha"
    assert mixed == [learned, "incremental"] * 4 + [learned]
    assert names(meta=True, updates_per_call=4) == [learned] * 3


@pytest.mark.parametrize("updates_per_call", [1, 2, 4])
def test_batches_of_the_held_out_images_follow_one_another(updates_per_call):
    """Draw d is positions 6 d to 6 d + 5 of reshuffled passes over the five images."""
    recorder, planned = Recorder(updates_per_call), training(meta=True)
    fit(recorder, planned)
    drawn = []
    for call in recorder.calls:
        if call.held_out is not None:
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
        expected = batches.cycled_rows(planned.data.held_out, 6, d, seed=3, step=1)
        np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("updates_per_call", [1, 2])
def test_replayed_exemplars_are_beside_new_images_in_every_batch(updates_per_call):
    """Two of five beside four of eleven, whose last three stay out of the epoch."""
    planned = training()
    old = np.arange(60, 65, dtype=np.int32)
    phase = dataclasses.replace(planned.data.phase, replay=2)
    data = dataclasses.replace(planned.data, phase=phase, replayed=old)
    planned = dataclasses.replace(planned, data=data)
    assert (planned.updates_per_epoch, planned.updates) == (2, 6)
    recorder = Recorder(updates_per_call)
    _, history, _, images = fit(recorder, planned)
    rows = [r for call in recorder.calls for r in call.rows.indices[: call.count]]
    assert [len(row) for row in rows] == [6] * 6
    assert all(call.rows.valid[: call.count].all() for call in recorder.calls)
    for epoch in range(3):
        order = data.train[np.random.default_rng([3, 1, epoch]).permutation(11)]
        new = np.concatenate([row[:4] for row in rows[2 * epoch : 2 * epoch + 2]])
        np.testing.assert_array_equal(new, order[:8])
        rates = [c.schedule.learning_rate[0] for c in recorder.calls]
        assert rates[2 * epoch // updates_per_call] == np.float32(RATES[epoch])
    joined = np.concatenate([row[4:] for row in rows])
    assert sorted(joined[:5]) == sorted(joined[5:10]) == old.tolist()
    assert len(history.loss) == 3 and sum(n for _, n in images) == 36


@pytest.mark.parametrize("updates_per_call", [1, 2])
def test_a_save_holds_a_state_and_the_history_that_belongs_to_it(updates_per_call):
    recorder = Recorder(updates_per_call)
    _, history, saves, images = fit(recorder, training(), wanted={2})
    assert [s["done"] for s, _ in saves] == [h["updates"] for _, h in saves]
    # Asked for while a call is in flight, agreed on with its metrics, done after the
    # next one, already dispatched.
    assert [s["done"] for s, _ in saves] == [2 + 2 * updates_per_call]
    assert [u for u, _ in images] == [*range(updates_per_call, 9, updates_per_call), 9][
        : len(images)
    ]
    _, undisturbed, _, _ = fit(Recorder(updates_per_call), training())
    assert history == undisturbed


@pytest.mark.parametrize("calls", range(1, 9))
def test_stop_saves_first_and_the_run_goes_on_as_if_undisturbed(calls):
    planned = training(meta=True)
    history = loop.History()
    saves: list = []

    def save(state, seen):
        saves.append((dict(state), dataclasses.asdict(seen)))

    number = iter(range(1, 100))
    with pytest.raises(
        loop.StopRequested,
        match=f"stopped in step 1 after update {calls + 1}; saved",
    ) as stopped:
        stop = lambda: 15 * (next(number) >= calls)  # noqa: E731
        run(Recorder(), planned, history, watching(save=save, stop=stop))
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
    result, history, saves, images = fit(recorder, training(), history)
    assert result == {"done": 9} and not (recorder.calls or saves or images)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize(("updates_per_call", "bad"), [(1, 0), (1, 5), (4, 6), (1, 8)])
def test_a_loss_that_is_not_finite_stops_training(loss, updates_per_call, bad):
    recorder = Recorder(updates_per_call, bad=bad, loss=loss)
    history, name = loop.History(), "step 7, phase incremental"
    with pytest.raises(loop.NotFiniteError) as caught:
        fit(recorder, training(step=7), history)
    assert str(caught.value) == f"the loss is {loss} in {name} at update {bad}"
    assert isinstance(caught.value, UserError)
    assert history.updates == bad  # what came before is there, nothing bad is
    assert math.isfinite(sum(history.sums))
    assert len(recorder.calls) <= bad // updates_per_call + 2  # one call late


@pytest.mark.parametrize(("updates_per_call", "broken"), [(1, 3), (4, 5), (1, 8)])
def test_a_network_that_is_not_finite_stops_training(updates_per_call, broken):
    """Even after the last update, of whose network no loss tells."""
    recorder = Recorder(updates_per_call, broken=broken)
    last = broken // updates_per_call * updates_per_call + updates_per_call - 1
    name = "step 7, phase incremental"
    message = f"the network is not finite in {name} after update {min(last, 8)}"
    with pytest.raises(loop.NotFiniteError, match=message):
        fit(recorder, training(step=7))


def saved(recorder, due) -> list[int]:
    """Updates at each save of a run; `due` is given those done and those saved."""
    history, saves = loop.History(), [0]
    with contextlib.suppress(loop.NotFiniteError):
        watch = watching(
            due=lambda: due(history.updates, saves[-1]),
            save=lambda state, history: saves.append(history.updates),
        )
        run(recorder, training(), history, watch)
    return saves[1:]


def test_a_save_that_is_due_is_made_once():
    """A clock that the save sets back; a second save would wait for the first."""
    assert saved(Recorder(), lambda done, last: done - last >= 2) == [4, 8]


def test_nothing_is_saved_after_a_loss_that_is_not_finite():
    assert saved(Recorder(), lambda done, last: True) == [*range(2, 10)]
    assert saved(Recorder(bad=4), lambda done, last: True) == [2, 3, 4]
