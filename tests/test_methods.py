"""The procedures of the methods: new rows of the head before an incremental step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsce_jax import methods
from bsce_jax.errors import UserError
from bsce_jax.methods import lucir, podnet


def features(seed: int, sizes: tuple[int, ...], dimension: int = 6) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, dimension)).astype(np.float32) for n in sizes]


def test_every_method_is_found_and_another_is_refused_in_one_line():
    for name in ("il_baseline", "lucir", "podnet"):
        assert methods.module(name).__doc__
    with pytest.raises(UserError, match="config.method='icarl': expected one of il_b"):
        methods.module("icarl")
    assert not hasattr(methods.module("il_baseline"), "begin")


# LUCIR


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 4), st.integers(1, 3))
def test_imprinted_rows_are_the_formula(seed, old, new):
    """Row c = mean length of old rows * normalised mean of normalised features."""
    rng = np.random.default_rng(seed)
    head = {
        "kernel": rng.normal(size=(6, old + new + 2)).astype(np.float32),
        "scale": np.float32(3.0),
    }
    found = features(seed, tuple(range(3, 3 + new)))
    imprinted = lucir.begin(head, found, old, rng)
    length = np.mean(
        [np.sqrt((head["kernel"][:, c].astype(float) ** 2).sum()) for c in range(old)]
    )
    for c, of_class in enumerate(found):
        total = np.zeros(6)
        for f in of_class.astype(float):
            total += f / np.sqrt((f**2).sum())
        expected = length * total / np.sqrt((total**2).sum())
        np.testing.assert_allclose(
            imprinted["kernel"][:, old + c], expected, rtol=1e-5, atol=1e-6
        )
    others = [c for c in range(old + new + 2) if not old <= c < old + new]
    np.testing.assert_array_equal(
        imprinted["kernel"][:, others], head["kernel"][:, others]
    )
    assert imprinted["scale"] == 3.0 and imprinted["kernel"].dtype == np.float32


def test_imprinting_survives_features_of_zeros():
    head = {"kernel": np.ones((6, 3), np.float32), "scale": np.float32(1)}
    found = lucir.begin(head, [np.zeros((4, 6))], 2, np.random.default_rng(0))
    np.testing.assert_array_equal(found["kernel"][:, 2], 0)


# PODNet


def proxies(classes: int = 5, count: int = 4, dimension: int = 6) -> dict:
    rng = np.random.default_rng(9)
    kernel = rng.normal(size=(dimension, count, classes)).astype(np.float32)
    return {"kernel": kernel, "scale": np.float32(1.0)}


def test_new_proxies_are_the_centres_of_well_separated_clusters():
    """Four tight bundles of directions: the centres are the bundles' means."""
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(6, 6)))[0][:4]
    bundle = np.repeat(np.arange(4), 12)
    points = directions[bundle] + 0.01 * rng.normal(size=(48, 6))
    lengths = rng.uniform(0.5, 4.0, (48, 1))  # which normalising takes away
    head = proxies()
    found = podnet.begin(head, [lengths * points], 3, np.random.default_rng(1))
    mean_length = np.mean(
        np.sqrt((head["kernel"][:, :, :3].astype(float) ** 2).sum(axis=0))
    )
    unit = points / np.sqrt((points**2).sum(axis=1, keepdims=True))
    expected = [mean_length * unit[bundle == b].mean(axis=0) for b in range(4)]
    for centre in expected:
        distances = np.abs(found["kernel"][:, :, 3].T - centre).max(axis=1)
        assert (distances < 1e-5).sum() == 1
    keep = [0, 1, 2, 4]
    np.testing.assert_array_equal(
        found["kernel"][:, :, keep], head["kernel"][:, :, keep]
    )
    assert found["scale"] == 1.0 and found["kernel"].dtype == np.float32


def test_k_means_depends_on_the_seed_alone():
    found = [
        podnet.begin(proxies(), features(3, (60, 50)), 3, np.random.default_rng(seed))
        for seed in (5, 5, 6)
    ]
    np.testing.assert_array_equal(found[0]["kernel"], found[1]["kernel"])
    assert np.any(found[0]["kernel"] != found[2]["kernel"])


@pytest.mark.parametrize("images", [1, 2, 3])
def test_a_class_of_fewer_images_than_proxies_repeats_its_centres(images):
    (of_class,) = features(4, (images,))
    found = podnet.begin(proxies(), [of_class], 3, np.random.default_rng(0))
    rows = np.unique(found["kernel"][:, :, 3].round(5), axis=1)
    assert rows.shape[1] == images
    same = podnet.begin(
        proxies(), [np.ones((20, 6))], 3, np.random.default_rng(0)
    )  # twenty equal images: one centre, no warning of the library
    assert np.unique(same["kernel"][:, :, 3].round(5), axis=1).shape[1] == 1
