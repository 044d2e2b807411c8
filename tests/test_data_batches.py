"""The batch plan: every image once an epoch, the same from anywhere."""

import dataclasses
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsce_jax.data import batches, companions, sampling

SIZES = st.integers(1, 40)
plans = settings(max_examples=60, deadline=None)


def source_rows(n: int) -> np.ndarray:
    """Indices that are not their own positions."""
    return 1000 + 3 * np.arange(n)


def test_orders_are_numpys_and_read_only() -> None:
    order = batches.epoch_order(3, 2, 7, 50)
    expected = np.random.default_rng([3, 2, 7]).permutation(50)
    np.testing.assert_array_equal(order, expected)
    assert order.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 1


def test_orders_differ_between_seeds_steps_and_epochs() -> None:
    chosen = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)]
    orders = [batches.epoch_order(*where, 30).tobytes() for where in chosen]
    assert len(set(orders)) == len(chosen)


def test_orders_are_the_same_in_another_process() -> None:
    code = (
        "from bsce_jax.data import batches;"
        "print(batches.epoch_order(5, 1, 2, 8).tolist())"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=pathlib.Path(__file__).parents[1],
    )
    assert told.stdout.strip() == str(batches.epoch_order(5, 1, 2, 8).tolist())


@plans
@given(n=SIZES, batch_size=SIZES, epoch=st.integers(0, 3), seed=st.integers(0, 9))
def test_an_epoch_visits_every_image_once(
    n: int, batch_size: int, epoch: int, seed: int
) -> None:
    per_epoch = batches.updates_per_epoch(n, batch_size)
    assert (per_epoch - 1) * batch_size < n <= per_epoch * batch_size
    indices = source_rows(n)
    seen = []
    for update in range(epoch * per_epoch, (epoch + 1) * per_epoch):
        found, valid = batches.rows(indices, batch_size, update, seed=seed, step=1)
        assert found.shape == valid.shape == (batch_size,)
        assert (found.dtype, valid.dtype) == (np.int32, np.float32)
        count = int(valid.sum())
        np.testing.assert_array_equal(valid, np.arange(batch_size) < count)
        assert not found[count:].any()
        seen.append(found[:count])
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), indices)
    order = batches.epoch_order(seed, 1, epoch, n)
    np.testing.assert_array_equal(np.concatenate(seen), indices[order])


@plans
@given(
    n=SIZES,
    batch_size=SIZES,
    start=st.integers(0, 50),
    width=st.integers(1, 6),
    epochs=st.integers(1, 3),
)
def test_a_group_stacks_consecutive_batches_and_fills_the_last(
    n: int, batch_size: int, start: int, width: int, epochs: int
) -> None:
    indices = source_rows(n)
    plan = batches.Shuffled(indices, batch_size, epochs, seed=4, step=2)
    assert len(plan) == epochs * batches.updates_per_epoch(n, batch_size)
    start %= len(plan)
    found, valid = batches.group(plan, start, width)
    assert found.shape == valid.shape == (width, batch_size)
    assert (found.dtype, valid.dtype) == (np.int32, np.float32)
    count = min(width, len(plan) - start)
    for i in reversed(range(count)):  # in another order: no history
        expected = batches.rows(indices, batch_size, start + i, seed=4, step=2)
        np.testing.assert_array_equal(found[i], expected[0])
        np.testing.assert_array_equal(valid[i], expected[1])
    assert not found[count:].any() and not valid[count:].any()


@plans
@given(n=SIZES, batch_size=SIZES)
def test_images_in_order_come_once_each(n: int, batch_size: int) -> None:
    indices = source_rows(n)
    plan = batches.InOrder(indices, batch_size)
    found, valid = batches.group(plan, 0, len(plan))
    np.testing.assert_array_equal(found[valid > 0], indices)
    assert valid.size == len(plan) * batch_size < n + batch_size
    assert plan.key(0, 0) is None


def test_keys_of_crops_differ_between_batches_and_purposes() -> None:
    sampled = sampling.classes(np.array([0, 0, 0, 1]))
    plain = batches.Shuffled(source_rows(7), 2, 3, seed=1, step=2, first_epoch=5)
    other = batches.Shuffled(source_rows(4), 2, 3, 1, 2, sampler=sampled)
    held_out = batches.Cycled(source_rows(7), 2, 8, seed=1, step=2)
    assert plain.per_epoch == 4 and other.per_epoch == 3 and len(other) == 9
    assert plain.key(0, 1)[:4] == (1, 2, 5, 0) and plain.key(9, 1)[:4] == (1, 2, 7, 1)
    beside = dataclasses.replace(held_out, stream=batches.BESIDE)
    plans = plain, held_out, beside
    keys = [
        plan.key(i, row) for plan in plans for i in range(len(plan)) for row in (0, 1)
    ]
    assert len(set(keys)) == len(keys) == 56
    assert any((held_out[i][0] != beside[i][0]).any() for i in range(8))
    indices, valid = held_out[3]
    expected = batches.cycled_rows(source_rows(7), 2, 3, seed=1, step=2)
    np.testing.assert_array_equal(indices, expected)
    assert valid.all()


@plans
@given(n=SIZES, batch_size=SIZES, draws=st.integers(1, 6), seed=st.integers(0, 9))
def test_cycled_rows_are_passes_one_after_another(
    n: int, batch_size: int, draws: int, seed: int
) -> None:
    indices = source_rows(n)
    where = {"seed": seed, "step": 3}
    backwards = [
        batches.cycled_rows(indices, batch_size, draw, **where)
        for draw in reversed(range(draws))
    ]
    flat = np.concatenate(backwards[::-1])
    assert flat.dtype == np.int32 and flat.shape == (draws * batch_size,)
    for start in range(0, len(flat), n):
        part = np.sort(flat[start : start + n])
        assert np.all(np.diff(part) > 0)  # nothing twice within a pass
        assert np.isin(part, indices).all()
        if len(part) == n:
            np.testing.assert_array_equal(part, indices)


def test_passes_are_reshuffled_and_apart_from_the_training_order() -> None:
    indices = np.arange(60)
    passes = [
        batches.cycled_rows(indices, 60, draw, seed=0, step=1).tobytes()
        for draw in range(3)
    ]
    training = [batches.epoch_order(0, 1, epoch, 60).tobytes() for epoch in range(3)]
    assert len(set(passes + training)) == 6


def test_a_batch_costs_no_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = np.random.default_rng

    def counted(seed: list[int]) -> np.random.Generator:
        made.append(seed)
        return real(seed)

    batches._order.cache_clear()
    monkeypatch.setattr(np.random, "default_rng", counted)
    indices = np.arange(640)
    for update in range(20):  # two epochs of ten, with held-out draws in between
        batches.rows(indices, 64, update, seed=0, step=0)
        batches.cycled_rows(indices[:100], 64, update // 10, seed=0, step=0)
    assert len(made) == 2 + 2


def test_a_sampler_draws_with_its_probabilities_and_its_number() -> None:
    sampler = sampling.Sampler(np.array([0.7, 0.1, 0.2, 0.0]), 4000)
    order = batches.epoch_order(1, 2, 3, 4, sampler)
    assert order.dtype == np.int32 and len(order) == 4000
    shares = np.bincount(order, minlength=4) / 4000
    np.testing.assert_allclose(shares, sampler.probabilities, atol=0.03)
    other = batches.epoch_order(1, 2, 4, 4, sampler)
    assert np.any(order != other)
    indices, joined = np.array([10, 11, 12, 13], np.int32), []
    per_epoch = batches.updates_per_epoch(4000, 600)
    for update in range(per_epoch, 2 * per_epoch):  # the epoch after `order`
        found, valid = batches.rows(
            indices, 600, update, seed=1, step=2, first_epoch=3, sampler=sampler
        )
        joined.append(found[valid > 0])
    np.testing.assert_array_equal(np.concatenate(joined), indices[other])


@plans
@given(n=SIZES, batch_size=SIZES, each=st.integers(1, 4), epoch=st.integers(0, 2))
def test_companions_are_images_of_their_own_places(n, batch_size, each, epoch):
    """A companion is the image, and has the key, of the row where it is itself."""
    plan = batches.Shuffled(source_rows(n), batch_size, 3, seed=1, step=2)
    table = np.random.default_rng(n).integers(-1, n, (n, each)).astype(np.int32)
    found = companions.Companions(plan, epoch, table)
    start = epoch * plan.per_epoch
    assert len(found) == start + plan.per_epoch
    assert found.size == batch_size * each
    for place in range(n):
        update, row = divmod(place, batch_size)
        images, valid = found[start + update]
        for k in range(each):
            other, at = table[place, k], row * each + k
            assert valid[at] == (other >= 0)
            if other >= 0:
                theirs, row_there = divmod(int(other), batch_size)
                assert images[at] == plan[start + theirs][0][row_there]
                assert found.key(start + update, at) == plan.key(
                    start + theirs, row_there
                )
    assert not found[start + plan.per_epoch - 1][1][n * each :].any()


def test_leading_batches_are_those_of_the_plan():
    plan = batches.Shuffled(source_rows(7), 2, 3, seed=1, step=2)
    found = batches.Leading(plan, 5)
    assert len(found) == 5 and found.size == 2 and found.key(3, 1) == plan.key(3, 1)
    np.testing.assert_array_equal(found[4][0], plan[4][0])
