"""Metrics against hand-computed numbers and slow loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsce_jax import metrics
from bsce_jax.errors import UserError

NAN = float("nan")


def test_average_incremental_accuracy() -> None:
    """The base step counts like any other."""
    assert metrics.average_incremental_accuracy([0.9, 0.6, 0.3]) == pytest.approx(0.6)
    assert metrics.average_incremental_accuracy([0.5]) == 0.5


@pytest.mark.parametrize("accuracies", [[], [[0.1, 0.2]]])
def test_average_refuses(accuracies: list) -> None:
    with pytest.raises(UserError, match="accuracies"):
        metrics.average_incremental_accuracy(accuracies)


@pytest.mark.parametrize("blank", [None, NAN, 99.0])
def test_forgetting(blank: float | None) -> None:
    """Old tasks 0 and 1: best 0.9 and 0.8, final 0.5 and 0.6; the last is no part."""
    matrix = [[0.8, blank, blank], [0.9, 0.8, blank], [0.5, 0.6, 0.7]]
    assert metrics.forgetting(matrix) == pytest.approx((0.4 + 0.2) / 2)


def test_forgetting_may_be_negative() -> None:
    assert metrics.forgetting([[0.5, NAN], [0.7, 0.9]]) == pytest.approx(-0.2)


def test_nothing_is_forgotten_in_one_step() -> None:
    assert metrics.forgetting([[0.9]]) == 0


@pytest.mark.parametrize(
    "matrix", [[], [[0.1, 0.2]], [[NAN]], [[0.9, NAN], [NAN, 0.5]]]
)
def test_forgetting_refuses(matrix: list) -> None:
    with pytest.raises(UserError, match="matrix"):
        metrics.forgetting(matrix)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30),
)
def test_confusion_matrix(pairs: list[tuple[int, int]]) -> None:
    labels = np.array([p[0] for p in pairs], np.int32)
    predictions = np.array([p[1] for p in pairs], np.int32)
    expected = np.zeros((4, 4), np.int64)
    for label, prediction in pairs:
        expected[label, prediction] += 1
    confusion = metrics.confusion_matrix(labels, predictions, 4)
    assert confusion.dtype == np.int64
    np.testing.assert_array_equal(confusion, expected)


def test_confusion_of_narrow_integers() -> None:
    """Labels of 8 bits: label * num_classes does not fit them."""
    labels = np.array([99, 99], np.uint8)
    confusion = metrics.confusion_matrix(labels, labels, 100)
    assert confusion[99, 99] == 2 and confusion.sum() == 2


@pytest.mark.parametrize(
    ("labels", "predictions", "named"),
    [([0, 3], [0, 0], "labels"), ([0, 0], [0, -1], "predictions"), ([0], [0, 1], "la")],
)
def test_confusion_refuses(labels: list, predictions: list, named: str) -> None:
    with pytest.raises(UserError, match=named):
        metrics.confusion_matrix(labels, predictions, 3)


def test_group_accuracies() -> None:
    confusion = [[8, 1, 1], [5, 5, 0], [0, 2, 38]]
    assert metrics.accuracy(confusion) == pytest.approx(51 / 60)
    assert metrics.accuracy(confusion, slice(0, 2)) == pytest.approx(13 / 20)
    assert metrics.accuracy(confusion, slice(2, 3)) == pytest.approx(38 / 40)
    assert metrics.accuracy(confusion, [0, 2]) == pytest.approx(46 / 50)
    assert np.isnan(metrics.accuracy(confusion, slice(0, 0)))
