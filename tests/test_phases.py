"""What a run will do: the phases of each step, and the images of each phase."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsce_jax.config.fields import phase
from bsce_jax.config.resolve import resolve
from bsce_jax.run.loop import make_training
from bsce_jax.run.phases import (
    configured,
    empty_ranking,
    of_step,
    phases_of,
    planned,
    training_set,
)
from bsce_jax.run.quotas import exemplars_per_class
from tests.phase_example import HELD_OUT, config, data_of, dataset, full_ranking


def test_a_step_has_its_new_images_and_the_exemplars():
    data = dataset([9, 7, 8, 6, 10, 5], base=2, steps=2)
    ranking = full_ranking(data, 4)
    ranking[2:] = -1  # not chosen yet
    base, first = (data_of(config(), data, ranking, s) for s in (0, 1))
    assert (base.step, base.num_old, base.num_seen, base.exemplars) == (0, 0, 2, 0)
    np.testing.assert_array_equal(base.counts, [9, 7, 0, 0, 0, 0])
    np.testing.assert_array_equal(base.train, np.flatnonzero(data.train_labels < 2))
    assert (first.step, first.num_old, first.num_seen, first.exemplars) == (1, 2, 4, 8)
    np.testing.assert_array_equal(first.counts, [4, 4, 8, 6, 0, 0])
    new = np.flatnonzero((data.train_labels == 2) | (data.train_labels == 3))
    assert sorted(first.train) == sorted([*new, *ranking[:2].ravel()])
    for step in (base, first):
        assert step.train.dtype == step.held_out.dtype == np.int32
        assert len(step.held_out) == 0


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ({"memory__kind": "growing", "memory__per_class": 3}, [0, 3, 3, 3]),
        ({"memory__kind": "growing", "memory__per_class": 0}, [0, 0, 0, 0]),
        ({"memory__kind": "fixed", "memory__budget": 13}, [0, 6, 4, 3]),
        ({"memory__kind": "none"}, [0, 0, 0, 0]),
    ],
)
def test_the_kinds_of_memory(memory, expected):
    """A step replays what was kept after the step before: a prefix of the ranking."""
    data = dataset([8] * 5, base=2, steps=3)
    chosen = config(**memory)
    after = [exemplars_per_class(chosen, group.stop) for group in data.groups]
    assert after[:-1] == expected[1:]
    ranking = empty_ranking(chosen, data)
    assert ranking.shape == (5, max(after)) and ranking.dtype == np.int32
    assert (ranking == -1).all()
    ranking = full_ranking(data, max(after))
    for step, size in enumerate(expected):
        found = data_of(chosen, data, ranking, step)
        old, new = data.groups[step].start, data.groups[step].stop
        np.testing.assert_array_equal(
            found.counts, [size] * old + [8] * (new - old) + [0] * (5 - new)
        )
        assert found.exemplars == old * size
        replayed = found.train[data.train_labels[found.train] < old]
        np.testing.assert_array_equal(replayed, ranking[:old, :size].ravel())


@pytest.mark.parametrize("kind", ["uniform", "memory", "class"])
def test_what_an_incremental_step_samples(kind):
    data = dataset([9] * 6, base=3, steps=3)
    chosen = config(memory__per_class=2, phase__incremental__sampling=kind)
    ranking = full_ranking(data, 2)
    base, later = (data_of(chosen, data, ranking, step) for step in (0, 2))
    assert base.sampler is None
    if kind == "uniform":
        assert later.sampler is None
        return
    shares, labels = later.sampler.probabilities, data.train_labels[later.train]
    np.testing.assert_allclose(shares.sum(), 1)
    by_class = np.bincount(labels, shares)
    if kind == "memory":  # 8 exemplars, 9 new images
        np.testing.assert_allclose(by_class, [1 / 8] * 4 + [1 / 2])
        assert later.sampler.draws == 18
    else:
        np.testing.assert_allclose(by_class, [1 / 5] * 5)
        assert later.sampler.draws == 45
    without = data_of(
        config(memory__kind="none", phase__incremental__sampling=kind),
        data,
        ranking,
        2,
    )
    assert without.sampler is None


BALANCED = {"finetune": phase(images="exemplars", epochs=4)}


def test_a_phase_on_exemplars_has_those_of_all_classes_seen():
    data = dataset([8] * 6, base=3, steps=3)
    chosen = config(BALANCED, memory__per_class=2)
    ranking = empty_ranking(chosen, data)
    for position in range(4):
        ranking[position] = np.flatnonzero(data.train_labels == position)[[5, 1]]
    found = data_of(chosen, data, ranking, 1, "finetune")
    assert found.phase.name == "finetune"
    assert (found.step, found.num_old, found.num_seen) == (1, 3, 4)
    np.testing.assert_array_equal(found.train, ranking[:4].reshape(-1))
    assert found.counts.tolist() == [2, 2, 2, 2, 0, 0] and found.exemplars == 6
    assert len(found.held_out) == 0
    phases = [(d.step, d.phase.name) for d in planned(chosen, data)]
    assert phases == [(0, "base")] + [
        (step, name) for step in (1, 2, 3) for name in ("incremental", "finetune")
    ]


@pytest.mark.parametrize("prior", ["none", "balanced", "meta"])
def test_a_phase_on_held_out_images_has_meta_s_split(prior):
    """Taken out of the training set whether alpha is learned on it or not."""
    data = dataset([12, 9, 10, 11, 8], base=2, steps=3)
    ranking = full_ranking(data, 5)
    options = {"memory__per_class": 5, "meta__fraction": 0.4}
    chosen = config(HELD_OUT, **options)
    chosen.prior = prior
    meta, plain = config(prior="meta", **options), config(**options)
    assert len(data_of(chosen, data, ranking, 0).train) == 21
    for step in (1, 2, 3):
        split = data_of(meta, data, ranking, step)
        main = data_of(chosen, data, ranking, step)
        last = data_of(chosen, data, ranking, step, "bias")
        np.testing.assert_array_equal(main.train, split.train)
        np.testing.assert_array_equal(main.counts, split.counts)
        np.testing.assert_array_equal(last.train, split.held_out)
        held = [2] * last.num_seen + [0] * (5 - last.num_seen)
        assert last.counts.tolist() == held and last.phase.name == "bias"
        # Alpha, where it is learned, is learned in the other phase.
        expected = split.held_out if prior == "meta" else []
        np.testing.assert_array_equal(main.held_out, expected)
        assert len(last.held_out) == 0
        whole = training_set(plain, data, ranking, step)
        assert sorted([*main.train, *last.train]) == sorted(whole.train)
        assert len(whole.held_out) == 0
        assert whole.exemplars == main.exemplars == 5 * main.num_old


@pytest.mark.parametrize(
    ("memory", "runs"),
    [
        ({"memory__per_class": 2}, True),
        ({"memory__kind": "fixed", "memory__budget": 12}, True),
        ({"memory__per_class": 0}, False),
        ({"memory__kind": "none"}, False),
    ],
)
def test_without_a_memory_the_phases_that_need_one_do_not_run(memory, runs):
    data = dataset([8] * 6, base=3, steps=3)
    chosen = config({**HELD_OUT, **BALANCED}, **memory)
    found = configured(chosen)
    everything = ("incremental", "bias", "finetune")
    assert [p.name for p in found] == ["base", *everything]
    for step in range(4):
        names = tuple(p.name for p in phases_of(chosen, data, found, step))
        later = everything if runs else ("incremental",)
        assert names == (later if step else ("base",))
        size = exemplars_per_class(chosen, data.groups[step].stop)
        assert of_step(found, step, size) == phases_of(chosen, data, found, step)
    assert len(planned(chosen, data)) == (10 if runs else 4)


def test_first_epochs_add_up_over_the_phases_of_a_kind_of_step():
    phases = {
        "second": phase(steps="base", epochs=3),
        "absent": phase(epochs=0),
        "with_none": phase(epochs=5, when_prior="none"),
        "last": phase(epochs=7),
    }
    changes = {"phase__base__epochs": 2, "phase__incremental__epochs": 4}
    chosen = config(phases | {"later": phase(epochs=1)}, **changes)
    order = ("base", "second", "incremental", "absent", "with_none", "last", "later")
    assert chosen.phases == order
    found = {p.name: p.first_epoch for p in configured(chosen)}
    assert found == {
        "base": 0,
        "second": 2,
        "incremental": 0,
        "with_none": 4,
        "last": 9,
        "later": 16,
    }
    chosen.prior = "balanced"
    found = {p.name: p.first_epoch for p in configured(resolve(chosen))}
    assert found == {"base": 0, "second": 2, "incremental": 0, "last": 4, "later": 11}


def test_a_phase_may_have_batches_of_its_own_size():
    data = dataset([8] * 6, base=3, steps=3)
    chosen = config(optim__batch_size=6, phase__incremental__batch_size=4)
    trainings = [make_training(chosen, each) for each in planned(chosen, data)]
    assert [training.batch_size for training in trainings] == [6, 4, 4, 4]
    # 24 base images; then 8 new ones and 4 exemplars of each old class.
    per_epoch = [training.updates_per_epoch for training in trainings]
    assert per_epoch == [4, 5, 6, 7]


def test_the_rates_of_a_phase():
    """The schedule is the phase's; it may be divided by the number of the step."""
    steps = {"milestones": (1, 3), "decay": 0.5, "learning_rate": 0.2}
    phases = {
        "a": phase(epochs=4, **steps),
        "b": phase(epochs=4, by_step="1/step", **steps),
        "c": phase(epochs=4, schedule="cosine", learning_rate=0.4),
    }
    found = {p.name: p for p in configured(config(phases))}
    rates = np.array([0.2, 0.1, 0.1, 0.05])
    for step in (1, 2, 9):
        np.testing.assert_allclose(found["a"].learning_rates(step), rates)
        np.testing.assert_allclose(found["b"].learning_rates(step), rates / (step + 1))
    cosine = [0.2 * (1 + np.cos(np.pi * e / 4)) for e in (0, 0, 1, 2)]
    np.testing.assert_allclose(found["c"].learning_rates(1), cosine)
    assert len(found["base"].learning_rates(0)) == 250


def test_a_shortened_run_divides_epochs_and_milestones_alone():
    few = {"few": phase(epochs=20, milestones=(10,), learning_rate=0.5)}
    (base, _, last), (short_base, _, short_last) = (
        configured(config(few, short=n)) for n in (1, 20)
    )
    assert (base.epochs, last.epochs) == (250, 20)
    assert (short_base.epochs, short_last.epochs) == (12, 1)
    rates = [0.1] * 5 + [0.01] * 2 + [0.001] * 3 + [0.0001] * 2
    np.testing.assert_allclose(short_base.rates, rates)
    assert short_last.rates == (0.5,)  # its milestone lies after the only epoch
    assert (last.first_epoch, short_last.first_epoch) == (250, 12)


def test_a_phase_has_the_fields_of_its_section():
    changes = {
        "images": "held_out",
        "epochs": 3,
        "by_step": "1/step",
        "sampling": "class",
        "teacher": "now",
        "rows": "new",
        "optimizer": "kept",
    }
    rate = {"head": 10.0, "own": 0.0}
    found = configured(config({"last": phase(rate=rate, **changes)}))[-1]
    assert {name: getattr(found, name) for name in changes} == changes
    groups = "convolutions", "kernel_scales", "batch_norms", "scale", "auxiliary"
    ones = dict.fromkeys(groups, 1)
    assert found.rate == ones | rate and found.steps == "later"


def test_sampling_is_that_of_a_phase():
    data = dataset([8] * 6, base=3, steps=3)
    last = {"last": phase(images="exemplars", epochs=1, sampling="class")}
    chosen = config(last, phase__incremental__sampling="memory", memory__per_class=2)
    ranking = full_ranking(data, 2)
    main, found = (
        data_of(chosen, data, ranking, 2, n) for n in ("incremental", "last")
    )
    assert main.sampler.draws == 16  # twice the new images
    assert found.sampler.draws == 10  # as many as there are of five classes
    plain = config(last, memory__per_class=2)
    assert data_of(plain, data, ranking, 2).sampler is None


def test_replayed_exemplars_are_apart_from_the_new_images():
    data = dataset([8] * 6, base=3, steps=3)
    chosen = config(phase__incremental__replay=4, memory__per_class=2)
    ranking = full_ranking(data, 2)
    plain = data_of(config(memory__per_class=2), data, ranking, 2)
    found = data_of(chosen, data, ranking, 2)
    new = np.flatnonzero(data.train_labels == 4)
    np.testing.assert_array_equal(np.sort(found.train), new)
    np.testing.assert_array_equal(found.replayed, ranking[:4].ravel())
    assert found.counts.tolist() == plain.counts.tolist() == [2, 2, 2, 2, 8, 0]
    assert found.exemplars == plain.exemplars == 8 and found.sampler is None
    assert len(plain.replayed) == len(data_of(chosen, data, ranking, 0).replayed) == 0
    without = config(phase__incremental__replay=4, memory__kind="none")
    without = data_of(without, data, ranking, 2)
    assert len(without.replayed) == 0 and len(without.train) == 8


@pytest.mark.parametrize("prior", ["balanced", "meta"])
@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_planned_phases_are_as_large_as_the_real_ones(prior, kind):
    data = dataset([12, 9, 10, 11, 8], base=2, steps=3)
    chosen = config(
        prior=prior, memory__kind=kind, memory__per_class=4, memory__budget=16
    )
    found_phases = planned(chosen, data)
    ranking = full_ranking(data, 8)
    assert [p.step for p in found_phases] == [0, 1, 2, 3]
    for found in found_phases:
        real = data_of(chosen, data, ranking, found.step)
        np.testing.assert_array_equal(found.counts, real.counts)
        assert len(found.train) == len(real.train) == found.counts.sum()
        assert len(found.held_out) == len(real.held_out)
        assert (len(found.held_out) > 0) == (prior == "meta" and found.step > 0)
        assert found.exemplars == real.exemplars


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(10, 40), min_size=4, max_size=4),
    size=st.integers(2, 10),
    fraction=st.sampled_from([0.05, 0.1, 0.25, 0.4]),
    seed=st.integers(0, 3),
)
def test_the_split_of_meta(counts, size, fraction, seed):
    """B_t is balanced and disjoint from D_t; n_i are the counts in D_t."""
    data = dataset(counts, base=2, steps=2, seed=seed)
    plain = config(prior="balanced", memory__per_class=size, seed=seed)
    meta = config(
        prior="meta", memory__per_class=size, meta__fraction=fraction, seed=seed
    )
    ranking = full_ranking(data, size)
    for step in (1, 2):
        everything = data_of(plain, data, ranking, step)
        found = data_of(meta, data, ranking, step)
        num_seen = found.num_seen
        held = max(1, int(fraction * size + 0.5))
        labels = data.train_labels[found.held_out]
        np.testing.assert_array_equal(np.bincount(labels), [held] * num_seen)
        assert not set(found.train) & set(found.held_out)
        together = np.concatenate([found.train, found.held_out])
        assert sorted(together) == sorted(everything.train)
        np.testing.assert_array_equal(
            found.counts, np.bincount(data.train_labels[found.train], minlength=4)
        )
        assert everything.counts.sum() == found.counts.sum() + held * num_seen
        assert found.exemplars == everything.exemplars == size * found.num_old
    base = data_of(meta, data, ranking, 0)
    assert len(base.held_out) == 0 and base.counts.sum() == sum(counts[:2])


def test_the_split_of_meta_depends_on_seed_and_step_only():
    data = dataset([30] * 6, base=2, steps=4)
    ranking = full_ranking(data, 10)

    def held_out(step, **values):
        """Of the base classes' exemplars, which every step replays."""
        chosen = config(
            prior="meta", memory__per_class=10, meta__fraction=0.4, **values
        )
        found = data_of(chosen, data, ranking, step).held_out
        return set(found[data.train_labels[found] < 2].tolist())

    assert len(held_out(1)) == 8
    assert held_out(1) == held_out(1, alpha=0.5)
    assert held_out(1) != held_out(1, seed=1)
    assert held_out(1) != held_out(2)
