"""The procedures of the methods, on the host: new rows of the head, and others."""

import functools
from collections.abc import Mapping

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsce_jax import methods
from bsce_jax.compute.state import OWN, Batch, Network
from bsce_jax.errors import UserError
from bsce_jax.losses.softmax_ce import softmax_cross_entropy
from bsce_jax.methods import bic, geodl, icarl, lucir, ncm, podnet, spb, spb_i, spb_m
from bsce_jax.models import new_rows, rotations
from bsce_jax.nearest_mean import normalised

VIEWS = ("plain", "mirrored", *rotations.VIEWS)


def features(seed: int, sizes: tuple[int, ...], dimension: int = 6) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, dimension)).astype(np.float32) for n in sizes]


def test_every_method_is_found_and_another_is_refused_in_one_line():
    for name in ("il_baseline", "lucir", "podnet", "bic", "icarl", "ncm"):
        assert methods.module(name).__doc__
    with pytest.raises(UserError, match="config.method='lucid': expected one of bic,"):
        methods.module("lucid")
    assert not hasattr(methods.module("il_baseline"), "begin")
    assert methods.options("il_baseline") == {}


# A step as a method sees it: what is new, the exemplars, features of either.

ALL = methods.Sizes(classes=7, features=6, image=(8, 8, 1), new=3, exemplars=4)
SIZES, OLD = (5, 4), 3  # new classes and their images; three classes are old


def shown(head: Mapping[str, np.ndarray], extra=None, own=None, **changes):
    """A step whose image i has feature i of a table for each view."""
    rng = np.random.default_rng(11)
    table = {v: rng.normal(size=(60, 6)).astype(np.float32) for v in VIEWS}
    asked: list[str] = []

    def features(groups, view="plain"):
        asked.append(view)  # the first image of every group cannot be read
        return [(group[1:], table[view][group[1:]]) for group in groups]

    params = {"Conv_0": {"kernel": np.ones(2)}, "head": dict(head)}
    ends = np.cumsum((10, *SIZES))
    values = {
        "number": 1,
        "num_old": OLD,
        "num_seen": OLD + len(SIZES),
        "network": Network(
            params | ({OWN: own} if own else {}), {"norm": np.ones(3)}, extra or {}
        ),
        "new": [np.arange(a, b) for a, b in zip(ends, ends[1:], strict=False)],
        "exemplars": [np.arange(20 + 4 * c, 24 + 4 * c) for c in range(5)],
        "features": features,
        "options": {},
        "rng": np.random.default_rng(5),
        "mirrored": True,
        "images": None,
        "normalization": ((0.5,), (0.5,)),
        **changes,
    }
    return methods.Step(**values), table, asked


def new_features(step, table, view="plain"):
    return [table[view][images[1:]] for images in step.new]


def assert_only_the_head_changed(found: Network, before: Network) -> None:
    assert found.params["Conv_0"] is before.params["Conv_0"]
    assert found.params.keys() == before.params.keys()
    assert found.batch_stats is before.batch_stats and found.extra is before.extra


# Imprinting: LUCIR and those built on it


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
    imprinted = new_rows.imprint(head, found, old)
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
    found = new_rows.imprint(head, [np.zeros((4, 6))], 2)
    np.testing.assert_array_equal(found["kernel"][:, 2], 0)


@pytest.mark.parametrize("method", [lucir, geodl, spb, spb_i])
def test_a_step_begins_with_imprinted_rows(method):
    """Of the features of the images that can be read; nothing else changes."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(6, 7)).astype(np.float32)
    step, table, asked = shown({"kernel": kernel, "scale": np.float32(2)})
    found = method.begin(step)
    expected = new_rows.imprint(step.head, new_features(step, table), OLD)
    np.testing.assert_array_equal(found.params["head"]["kernel"], expected["kernel"])
    assert np.any(found.params["head"]["kernel"] != kernel) and asked == ["plain"]
    assert found.params["head"]["scale"] == 2
    assert_only_the_head_changed(found, step.network)
    np.testing.assert_array_equal(step.head["kernel"], kernel)


def test_each_head_is_imprinted_on_the_rotation_it_sees():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(6, 4, 7)).astype(np.float32)
    step, table, asked = shown({"kernel": kernel, "scale": np.ones(4, np.float32)})
    found = spb_m.begin(step)
    assert asked == list(rotations.VIEWS)
    for head, view in enumerate(rotations.VIEWS):
        expected = new_rows.imprint(
            {"kernel": kernel[:, head]}, new_features(step, table, view), OLD
        )
        np.testing.assert_array_equal(
            found.params["head"]["kernel"][:, head], expected["kernel"]
        )
    assert found.params["head"]["scale"].shape == (4,)
    assert_only_the_head_changed(found, step.network)


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
    found = new_rows.k_means(head, [lengths * points], 3, np.random.default_rng(1))
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
        new_rows.k_means(
            proxies(), features(3, (60, 50)), 3, np.random.default_rng(seed)
        )
        for seed in (5, 5, 6)
    ]
    np.testing.assert_array_equal(found[0]["kernel"], found[1]["kernel"])
    assert np.any(found[0]["kernel"] != found[2]["kernel"])


@pytest.mark.parametrize("images", [1, 2, 3])
def test_a_class_of_fewer_images_than_proxies_repeats_its_centres(images):
    (of_class,) = features(4, (images,))
    found = new_rows.k_means(proxies(), [of_class], 3, np.random.default_rng(0))
    rows = np.unique(found["kernel"][:, :, 3].round(5), axis=1)
    assert rows.shape[1] == images
    same = new_rows.k_means(
        proxies(), [np.ones((20, 6))], 3, np.random.default_rng(0)
    )  # twenty equal images: one centre, no warning of the library
    assert np.unique(same["kernel"][:, :, 3].round(5), axis=1).shape[1] == 1


def test_a_step_of_podnet_begins_with_centres_of_new_classes():
    step, table, _ = shown(proxies(classes=7))
    found = podnet.begin(step)
    given = (step.head, new_features(step, table), OLD)
    expected = new_rows.k_means(*given, np.random.default_rng(5))
    np.testing.assert_array_equal(found.params["head"]["kernel"], expected["kernel"])
    assert_only_the_head_changed(found, step.network)


# BiC


def test_a_scale_and_a_shift_start_anew_on_the_new_classes():
    initial = bic.initial(ALL)
    assert initial.params == {"scale": 1, "shift": 0}
    assert all(v.dtype == np.float32 for v in initial.params.values())
    assert not initial.extra["corrected"].any() and len(initial.extra["corrected"]) == 7
    own = {"scale": np.float32(0.4), "shift": np.float32(-3)}
    step, *_ = shown(proxies(), extra={"corrected": np.arange(7) == 2}, own=own)
    found = bic.begin(step)
    assert found.params[OWN] == initial.params
    assert found.extra["corrected"].tolist() == [False] * 3 + [True] * 2 + [False] * 2
    assert found.params["head"] is step.network.params["head"]
    assert step.network.params[OWN] == own  # of the teacher


def test_a_scale_and_a_shift_are_those_of_the_port(x64, parity):
    file = parity("bic_bias_layer")
    z, labels = file["in_logits"], file["in_labels"]
    new = np.arange(z.shape[1]) >= 50

    def loss(z, own):
        network = Network({OWN: own}, {}, {"corrected": new})
        batch = Batch(z, labels, np.ones(len(z)))
        out, _ = bic.forward(lambda *_: ({"logits": z}, network), network, batch, None)
        values = softmax_cross_entropy(out["logits"], labels, np.zeros(z.shape[1]))
        return values.mean(), out["logits"]

    own = {"scale": file["in_alpha"], "shift": file["in_beta"]}
    found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(z, own)
    (value, logits), (by_logits, by_own) = found
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
    close(logits, file["out_logits"])
    close(value, file["out_ce"])
    close(by_logits, file["grad_logits"])
    close(by_own["scale"], file["grad_alpha"][0])
    close(by_own["shift"], file["grad_beta"][0])


# Means


@pytest.mark.parametrize("mirrored", [False, True])
def test_icarl_keeps_the_means_of_the_exemplars_of_all_classes_seen(mirrored):
    """Of normalised features, in both views where images are mirrored."""
    extra = icarl.initial(ALL).extra
    step, table, asked = shown(proxies(), extra=extra, mirrored=mirrored)
    found = icarl.finish(step)
    views = ["plain", "mirrored"][: 1 + mirrored]
    assert asked == views
    for c in range(5):
        images = step.exemplars[c][1:]
        means = [normalised(table[view][images]).mean(axis=0) for view in views]
        expected = normalised(np.mean(means, axis=0))
        np.testing.assert_allclose(found.extra["means"][c], expected, rtol=1e-5)
    assert not found.extra["means"][5:].any()
    assert found.extra["means"].dtype == np.float32
    assert found.params is step.network.params


def test_icarl_has_no_nan_where_no_exemplar_of_a_class_can_be_read():
    step, *_ = shown(proxies(), extra=icarl.initial(ALL).extra)
    one = [images[:1] if c == 1 else images for c, images in enumerate(step.exemplars)]
    means = icarl.finish(step._replace(exemplars=one)).extra["means"]
    assert np.isfinite(means).all() and not means[1].any() and means[0].any()


def test_ncm_adds_the_means_of_new_classes():
    before = np.arange(42, dtype=np.float32).reshape(7, 6)
    step, table, _ = shown(proxies(), extra={"means": before})
    means = ncm.finish(step).extra["means"]
    for position, found in enumerate(new_features(step, table), start=OLD):
        expected = normalised(found).mean(axis=0)
        np.testing.assert_allclose(means[position], expected, rtol=1e-5)
    others = [0, 1, 2, 5, 6]
    np.testing.assert_array_equal(means[others], before[others])
    assert before[3, 0] == 18  # not changed in place


def test_ncm_scores_are_the_distances():
    rng = np.random.default_rng(2)
    features = rng.normal(size=(5, 6)).astype(np.float32)
    means = rng.normal(size=(3, 6)).astype(np.float32)
    unit = normalised(features)
    expected = [[-np.sum((x - m) ** 2) for m in means] for x in unit]
    np.testing.assert_allclose(ncm.scores(features, means), expected, rtol=1e-4)
