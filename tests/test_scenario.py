"""Class orders and groups, against the published ones."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsce_jax import scenario
from bsce_jax.errors import UserError

Parity = Callable[[str], Mapping[str, np.ndarray]]


@pytest.mark.parametrize(
    ("num_classes", "order", "first", "last"),
    [
        (100, "seed1993", [68, 56, 78, 8, 23, 84, 90, 65], [67, 29, 49, 57, 33]),
        (1000, "seed1993", [54, 7, 894, 512, 126], [285, 225, 945, 697, 417]),
        (200, "seed1993", [168, 136, 51, 9, 183, 101, 171, 99], []),
        (10, "seed1993", [4, 2, 7, 6, 0, 3, 5, 8, 9, 1], []),
        (100, "icarl", [87, 0, 52, 58, 44, 91, 68, 97], [55, 54, 26, 35, 39]),
        (4, "natural", [0, 1, 2, 3], []),
        (3, (2, 0, 1), [2, 0, 1], []),
        (3, np.array([2, 0, 1], np.uint8), [2, 0, 1], []),
    ],
)
def test_class_order(
    num_classes: int, order: scenario.ClassOrder, first: list, last: list
) -> None:
    """Beginnings and ends as printed by the papers' code."""
    classes = scenario.class_order(num_classes, order)
    assert classes.dtype == np.int64
    assert classes[: len(first)].tolist() == first
    assert classes[num_classes - len(last) :].tolist() == last
    np.testing.assert_array_equal(np.sort(classes), np.arange(num_classes))


def test_published_orders(parity: Parity) -> None:
    file = parity("orders_and_schedules")
    for n in (10, 100, 200, 1000):
        np.testing.assert_array_equal(
            scenario.class_order(n), file[f"order_seed1993_{n}"]
        )
    np.testing.assert_array_equal(
        scenario.class_order(100, "icarl"), file["order_icarl_theano_cifar100"]
    )
    np.testing.assert_array_equal(
        scenario.imagenet_subset("lucir"), file["imagenet_subset_lucir_indices"]
    )


def test_seeds_differ_and_repeat() -> None:
    orders = [scenario.class_order(50, f"seed{n}").tolist() for n in (0, 1, 2**32 - 1)]
    assert len({tuple(order) for order in orders}) == 3
    assert scenario.class_order(50, "seed1").tolist() == orders[1]


def test_global_generator_is_untouched() -> None:
    np.random.seed(7)
    expected = np.random.random()
    np.random.seed(7)
    scenario.class_order(100)
    scenario.class_order(100, "icarl")
    scenario.imagenet_subset("lucir")
    assert np.random.random() == expected


@pytest.mark.parametrize(
    ("num_classes", "order"),
    [
        (100, "alphabetical"),
        (100, "seed"),
        (100, "seed-1"),
        (100, "seed1.5"),
        (100, f"seed{2**32}"),
        (10, "icarl"),
        (0, "natural"),
        (3, [0, 1]),
        (3, [0, 1, 1]),
        (3, [1, 2, 3]),
        (3, [0.0, 1.0, 2.0]),
        (2, [[0], [1]]),
        (2, []),
    ],
)
def test_bad_orders(num_classes: int, order: scenario.ClassOrder) -> None:
    with pytest.raises(UserError) as error:
        scenario.class_order(num_classes, order)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("num_classes", "base", "steps", "sizes"),
    [
        (100, 50, 5, [50] + [10] * 5),
        (100, 50, 10, [50] + [5] * 10),
        (100, 50, 25, [50] + [2] * 25),
        (1000, 500, 5, [500] + [100] * 5),
        (1000, 500, 10, [500] + [50] * 10),
        (1000, 100, 9, [100] * 10),
        (1000, 0, 10, [100] * 10),
        (10, 5, 5, [5, 1, 1, 1, 1, 1]),
        (10, 0, 1, [10]),
    ],
)
def test_published_scenarios(
    num_classes: int, base: int, steps: int, sizes: list[int]
) -> None:
    groups = scenario.class_groups(num_classes, base, steps)
    assert [len(group) for group in groups] == sizes


@settings(max_examples=60, deadline=None)
@given(st.integers(-1, 40), st.integers(-2, 42), st.integers(-1, 12))
def test_groups_partition_or_refuse(num_classes: int, base: int, steps: int) -> None:
    possible = (
        num_classes >= 1
        and steps >= 1
        and 0 <= base < num_classes
        and (num_classes - base) % steps == 0
    )
    if not possible:
        with pytest.raises(UserError):
            scenario.class_groups(num_classes, base, steps)
        return
    groups = scenario.class_groups(num_classes, base, steps)
    assert [p for group in groups for p in group] == list(range(num_classes))
    assert len(groups) == steps + (base > 0)
    assert len({len(group) for group in groups[base > 0 :]}) == 1
    assert len(groups[0]) == (base or num_classes // steps)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((100, 50, 7), "steps=7"),
        ((100, 50, 0), "steps=0"),
        ((100, 100, 5), "base_classes=100"),
        ((100, 120, 5), "base_classes=120"),
        ((100, -1, 5), "base_classes=-1"),
        ((0, 0, 1), "num_classes=0"),
    ],
)
def test_refusals_name_the_field(arguments: tuple, named: str) -> None:
    with pytest.raises(UserError, match=named):
        scenario.class_groups(*arguments)


def test_imagenet_subsets() -> None:
    assert scenario.imagenet_subset("first100").tolist() == list(range(100))
    lucir = scenario.imagenet_subset("lucir")
    assert lucir[:12].tolist() == [7, 11, 14, 44, 54, 62, 75, 77, 85, 105, 108, 123]
    assert lucir[-3:].tolist() == [989, 990, 999]
    with pytest.raises(UserError, match="first50"):
        scenario.imagenet_subset("first50")


def test_label_positions() -> None:
    positions = scenario.label_positions([4, 0, 2], 6)
    assert positions.dtype == np.int32
    assert positions.tolist() == [1, -1, 2, -1, 0, -1]


def test_label_positions_of_a_subset() -> None:
    """Composed with a subset, the table sends each class to its place."""
    subset = scenario.imagenet_subset("lucir")
    order = subset[scenario.class_order(100)]
    positions = scenario.label_positions(order, 1000)
    np.testing.assert_array_equal(positions[order], np.arange(100))
    assert (positions >= 0).sum() == 100


@pytest.mark.parametrize("order", [[0, 6], [-1, 2], [1, 1]])
def test_label_positions_refuse(order: list[int]) -> None:
    with pytest.raises(UserError, match="order"):
        scenario.label_positions(order, 6)
