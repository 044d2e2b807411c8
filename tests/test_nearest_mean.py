"""The nearest-mean-of-exemplars classifier against its formula, written out."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bsce_jax import nearest_mean


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(np.sqrt((vector.astype(float) ** 2).sum()), 1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 2))
def test_prediction_is_the_nearest_normalised_mean(seed, views):
    rng = np.random.default_rng(seed)
    labels = np.array([0, 2, 1, 1, 0, 2, 2])
    exemplars = [rng.normal(size=(7, 5)).astype(np.float32) for _ in range(views)]
    means = nearest_mean.class_means(exemplars, labels, 3)
    expected = []
    for c in range(3):
        points = [
            unit(view[i]) for view in exemplars for i in range(7) if labels[i] == c
        ]
        expected.append(unit(np.mean(points, axis=0)))
    np.testing.assert_allclose(means, expected, rtol=1e-12)
    tests = rng.normal(size=(20, 5)).astype(np.float32)
    distances = [[np.sum((unit(x) - m) ** 2) for m in expected] for x in tests]
    np.testing.assert_array_equal(
        nearest_mean.classify(tests, means), np.argmin(distances, axis=1)
    )
    np.testing.assert_array_equal(  # the length of a feature does not count
        nearest_mean.classify(100 * tests, means), nearest_mean.classify(tests, means)
    )


def test_a_class_without_exemplars_is_never_chosen():
    """As where none of its images can be read; even where all others are opposite."""
    exemplars = [np.array([[1.0, 0.0], [1.0, 0.2]])]
    means = nearest_mean.class_means(exemplars, np.array([1, 3]), 5)
    assert np.isnan(means[[0, 2, 4]]).all() and np.isfinite(means[[1, 3]]).all()
    tests = np.array([[1.0, 0.0], [1.0, 0.3], [-1.0, 0.0], [0.0, 0.0]])
    assert nearest_mean.classify(tests, means).tolist() == [1, 3, 3, 1]


def test_zero_features_have_no_nan():
    means = nearest_mean.class_means([np.zeros((2, 3))], np.array([0, 1]), 2)
    assert np.isfinite(means).all()
    assert nearest_mean.classify(np.zeros((1, 3)), means).tolist() == [0]
