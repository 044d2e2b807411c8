"""Images held out once and for all: of each class the same, for one phase alone."""

import dataclasses

import numpy as np
import pytest

from bsce_jax.errors import UserError
from bsce_jax.run.dataset import check
from bsce_jax.run.phases import empty_ranking, held_out_once, new_images
from bsce_jax.run.quotas import exemplars_per_class
from bsce_jax.scenario import class_groups
from tests.phase_example import HELD_OUT, config, data_of, dataset


@pytest.mark.parametrize(
    ("kept", "total", "held"),
    [
        ({"memory__per_class": 5}, [5, 5, 5], [2, 2, 2]),
        ({"memory__kind": "fixed", "memory__budget": 20}, [10, 6, 5], [4, 2, 2]),
    ],
)
def test_images_held_out_once_are_learned_from_by_no_other_phase(kept, total, held):
    data = dataset([12, 19, 14, 16, 18], base=2, steps=3)
    options = {**kept, "meta__fraction": 0.4, "memory__held_out": "once"}
    chosen = config(HELD_OUT, **options)
    reserved = held_out_once(chosen, data)
    assert reserved.shape == (5, max(held)) and reserved.dtype == np.int32
    assert (data.train_labels[reserved] == np.arange(5)[:, None]).all()
    assert len(set(reserved.ravel())) == reserved.size
    ranking = empty_ranking(chosen, data)
    for step, group in enumerate(data.groups):
        main = data_of(chosen, data, ranking, step)
        assert not set(main.train) & set(reserved.ravel())
        new = new_images(chosen, data, step)
        for position, images in zip(group, new, strict=True):
            of_class = np.flatnonzero(data.train_labels == position)
            left = np.setdiff1d(of_class, reserved)
            np.testing.assert_array_equal(images, left)
            kept_of_class = exemplars_per_class(chosen, group.stop)
            ranking[position, :kept_of_class] = images[:kept_of_class]
        if step == 0:
            continue
        size, out = total[step - 1], held[step - 1]
        counts = main.counts.tolist()
        assert counts[: group.start] == [size - out] * group.start
        last = data_of(chosen, data, ranking, step, "bias")
        expected = reserved[: group.stop, :out]
        assert sorted(last.train) == sorted(expected.ravel())
        # What is held out of the old classes is a part of the memory.
        assert main.exemplars == last.exemplars == size * group.start


def test_images_held_out_once_depend_on_the_seed_alone():
    data = dataset([12, 19, 14, 16, 18], base=2, steps=3)
    options = {"memory__per_class": 5, "memory__held_out": "once"}
    found = held_out_once(config(HELD_OUT, **options), data)
    other = dataclasses.replace(data, groups=class_groups(5, 2, 1))
    np.testing.assert_array_equal(
        found, held_out_once(config(HELD_OUT, **options), other)
    )
    assert (found != held_out_once(config(HELD_OUT, **options, seed=1), data)).any()
    # Nothing is held out where nothing asks for it.
    assert held_out_once(config(**options), data).shape == (5, 0)
    assert held_out_once(config(HELD_OUT, memory__per_class=5), data).shape == (5, 0)


def test_a_class_needs_images_beside_those_held_out_once():
    data = dataset([6, 6, 6, 6, 6], base=2, steps=3)
    fixed = {"memory__kind": "fixed", "memory__budget": 12}
    chosen = config(HELD_OUT, **fixed, memory__held_out="once", meta__fraction=0.5)
    check(chosen, data)
    few = dataset([6, 6, 6, 6, 3], base=2, steps=3)
    with pytest.raises(UserError, match=r"memory.budget=12.*class 'class 4' has 3"):
        check(chosen, few)
