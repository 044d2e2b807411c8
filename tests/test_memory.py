"""Exemplar memory: budgets, herding, the store and the balanced split."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bsce_jax import memory
from bsce_jax.errors import UserError

Parity = Callable[[str], Mapping[str, np.ndarray]]
CASES = ("gauss", "relu", "dup")


def classical_herding(features: np.ndarray, m: int) -> list[int]:
    """iCaRL's loop in NumPy float64, completed greedily after 1000 picks."""
    norms = np.sqrt((features**2).sum(axis=1, keepdims=True))
    points = features / np.maximum(norms, 1e-12)
    mean = points.mean(axis=0)
    direction = mean
    chosen: list[int] = []
    picks = 0
    while len(chosen) < m:
        scores = (points * direction).sum(axis=1)
        if picks >= 1000:
            scores[chosen] = -np.inf
        best = int(scores.argmax())
        if best not in chosen:
            chosen.append(best)
        direction = direction + mean - points[best]
        picks += 1
    return chosen


def distinct(features: np.ndarray) -> bool:
    """Whether no two rows point the same way: rounding would decide between them."""
    norms = np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    cosines = (features / norms) @ (features / norms).T
    return bool((cosines - np.eye(len(features)) < 1 - 1e-9).all())


def features_of(seed: int, images: int = 30, dimension: int = 7) -> np.ndarray:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(images, dimension))
    return np.maximum(features, 0) if seed % 2 else features


@pytest.mark.parametrize("case", CASES)
def test_herding_parity(parity: Parity, case: str) -> None:
    """LUCIR, PODNet and PyCIL agree; float32 chooses the same images."""
    file = parity("herding")
    features = file[f"in_features_{case}"].astype(np.float32)
    chosen = memory.herd(features, 20)
    assert chosen.dtype == np.int32
    for source in ("lucir", "inclearn", "pycil"):
        np.testing.assert_array_equal(chosen, file[f"out_{source}_{case}"])


@pytest.mark.parametrize("case", CASES)
def test_herding_parity_float64(parity: Parity, x64: None, case: str) -> None:
    file = parity("herding")
    chosen = memory.herd(file[f"in_features_{case}"], 50)
    np.testing.assert_array_equal(chosen, file[f"out_inclearn_rank_all_{case}"])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_herding_oracle(seed: int) -> None:
    features = features_of(seed)
    assume(distinct(features))
    with jax.enable_x64(True):
        chosen = memory.herd(features, 12).tolist()
    assert chosen == classical_herding(features, 12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 5, 11]))
def test_smaller_budget_keeps_the_prefix(seed: int, k: int) -> None:
    features = features_of(seed).astype(np.float32)
    np.testing.assert_array_equal(
        memory.herd(features, 12)[:k], memory.herd(features, k)
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 7, 30]))
def test_padding_changes_nothing(seed: int, images: int) -> None:
    """Wherever the padding lies and whatever it holds."""
    features = features_of(seed, images).astype(np.float32)
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(40, images, replace=False))
    padded = rng.normal(size=(40, features.shape[1])).astype(np.float32) * 100
    padded[rows] = features
    valid = np.isin(np.arange(40), rows)
    chosen = np.asarray(memory.herd_padded(padded, valid, 30))
    expected = rows[np.array(memory.herd(features, images))]
    np.testing.assert_array_equal(chosen[:images], expected)
    np.testing.assert_array_equal(chosen[images:], -1)


def test_equal_images_tie_to_the_first() -> None:
    """Exactly, for any width: a duplicate's score may not differ by rounding."""
    for dimension in (3, 16, 37, 512):
        features = np.random.default_rng(dimension).normal(size=(60, dimension))
        twice = np.concatenate([features, features]).astype(np.float32)
        chosen = np.asarray(memory.herd(twice, 40))
        assert (chosen < 60).all()
        assert len(set(chosen.tolist())) == 40


@pytest.mark.parametrize("seed", range(4))
def test_a_class_of_one_image_repeated(seed: int) -> None:
    """61 copies: every score is equal, so the order is that of the rows."""
    image = np.random.default_rng(seed).normal(size=(1, 64)).astype(np.float32)
    chosen = memory.herd(np.tile(image, (61, 1)), 5)
    np.testing.assert_array_equal(chosen, np.arange(5))


@pytest.mark.parametrize(
    "features",
    [
        np.zeros((5, 3)),
        np.ones((5, 3)),
        np.array([[1.0, 0], [1, 0], [-1, 0], [0, 1], [0, 0]]),
    ],
)
def test_repeated_picks_are_completed(features: np.ndarray, x64: None) -> None:
    """Where the classical loop turns in circles, every image still gets its place."""
    chosen = memory.herd(features, 5).tolist()
    assert chosen == classical_herding(features, 5)
    assert sorted(chosen) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (
            [-1.4, 0.2, 1.5, 2.4, 0.2, 0.8, -0.9, -1.3, 0.2, -0.5, -1.7, 0.2],
            [0, 1, 3, 2, 4, 5],
        ),
        (
            [-1.4, -1.5, -0.1, -1.2, -0.5, -2.3, 0.6, -0.7, 0.4, -0.4, -1.1, -1.5],
            [1, 3, 0, 5, 2, 4],
        ),
    ],
)
def test_the_classical_loop_ends_after_1000_picks(
    features: list[float], expected: list[int], x64: None
) -> None:
    """Classes of 6 images whose last two places depend on the very number of picks."""
    points = np.reshape(features, (6, 2))
    assert memory.herd(points, 6).tolist() == expected
    assert classical_herding(points, 6) == expected


def test_herding_does_not_see_scale() -> None:
    features = features_of(4).astype(np.float32)
    scale = 2.0 ** np.random.default_rng(0).integers(-8, 8, size=(30, 1))
    np.testing.assert_array_equal(
        memory.herd(features, 10), memory.herd(features * scale.astype(np.float32), 10)
    )


def greedy_herding(features: np.ndarray, m: int) -> list[int]:
    """BiC's loop in NumPy float64: the mean of those chosen nearest to the class's."""
    chosen: list[int] = []
    for k in range(1, m + 1):
        means = (features[chosen].sum(axis=0) + features) / k
        distances = np.linalg.norm(features.mean(axis=0) - means, axis=1)
        distances[chosen] = np.inf
        chosen.append(int(distances.argmin()))
    return chosen


@pytest.mark.parametrize("seed", range(4))
def test_herding_of_features_as_they_are(seed: int, x64: None) -> None:
    lengths = np.random.default_rng(seed).uniform(0.1, 10, size=(30, 1))
    features = features_of(seed) * lengths
    padded = np.concatenate([features, np.full((5, 7), 100.0)])
    chosen = memory.herd_padded(jnp.asarray(padded), np.arange(35) < 30, 40, False)
    assert list(chosen[:30]) == greedy_herding(features, 30)
    assert (chosen[30:] == -1).all()
    assert list(memory.herd(features, 30)) != list(chosen[:30])


def test_herding_dtypes() -> None:
    """Half precision is computed in float32; herding can be traced."""
    features = features_of(6).astype(np.float16)
    expected = memory.herd(features.astype(np.float32), 10)
    np.testing.assert_array_equal(memory.herd(features, 10), expected)
    traced = jax.jit(memory.herd, static_argnums=1)(features, 10)
    np.testing.assert_array_equal(traced, expected)


def test_one_compilation_for_all_class_sizes() -> None:
    traces = []

    @jax.jit
    def choose(features: jax.Array, valid: jax.Array) -> jax.Array:
        traces.append(1)
        return memory.herd_padded(features, valid, 4)

    for images in (4, 9, 20):
        features = np.zeros((20, 3), np.float32)
        features[:images] = features_of(images, images, 3)
        chosen = np.asarray(choose(features, np.arange(20) < images))
        assert chosen.max() < images and chosen.min() >= 0
    assert len(traces) == 1


def test_classes_can_be_batched() -> None:
    features = np.stack([features_of(s).astype(np.float32) for s in range(3)])
    valid = np.ones(features.shape[:2], bool)
    batched = jax.vmap(lambda f, v: memory.herd_padded(f, v, 10))(features, valid)
    for one, chosen in zip(features, batched, strict=True):
        np.testing.assert_array_equal(chosen, memory.herd(one, 10))


@pytest.mark.parametrize("m", [0, -1, 6])
def test_herding_refuses(m: int) -> None:
    with pytest.raises(UserError, match=f"m={m}"):
        memory.herd(jnp.ones((5, 2)), m)
    with pytest.raises(UserError, match=f"m={m}"):
        memory.random_ranking(5, m, np.random.default_rng(0))


def test_random_ranking() -> None:
    """A prefix for a smaller budget too, and every image equally likely."""
    long = memory.random_ranking(50, 20, np.random.default_rng(3))
    short = memory.random_ranking(50, 5, np.random.default_rng(3))
    assert long.dtype == np.int32
    np.testing.assert_array_equal(long[:5], short)
    assert len(set(long.tolist())) == 20
    rng = np.random.default_rng(0)
    drawn = np.concatenate([memory.random_ranking(6, 2, rng) for _ in range(3000)])
    # 1000 of each expected, with a standard deviation of 26.
    assert np.abs(np.bincount(drawn, minlength=6) - 1000).max() < 130


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3000), st.integers(1, 1200))
def test_fixed_budget_is_never_exceeded(budget: int, seen: int) -> None:
    if budget < seen:
        with pytest.raises(UserError, match=f"budget={budget}"):
            memory.quota("fixed", 20, budget, seen)
        return
    quota = memory.quota("fixed", 20, budget, seen)
    assert 0 < quota * seen <= budget < (quota + 1) * seen


def test_quota() -> None:
    assert memory.quota("growing", 20, 0, 70) == 20
    assert memory.quota("none", 20, 2000, 70) == 0
    assert [memory.quota("fixed", 0, 20_000, n) for n in (100, 300, 1000)] == [
        200,
        66,
        20,
    ]
    with pytest.raises(UserError, match="kind='ring'"):
        memory.quota("ring", 20, 2000, 70)
    with pytest.raises(UserError, match="per_class=-1"):
        memory.quota("growing", -1, 2000, 70)


def test_store_and_exemplars() -> None:
    empty = np.full((4, 3), -1, np.int32)
    ranking = memory.store(empty, 0, [7, 5, 9])
    ranking = memory.store(ranking, 1, np.array([100, 200, 300]))
    ranking = memory.store(ranking, 2, [41])
    assert (empty == -1).all(), "the ranking before is not changed"
    indices, labels = memory.exemplars(ranking, 2, 2)
    assert indices.dtype == labels.dtype == np.int32
    assert indices.tolist() == [7, 5, 100, 200]
    assert labels.tolist() == [0, 0, 1, 1]
    assert memory.exemplars(ranking, 3, 3)[0].tolist() == [7, 5, 9, 100, 200, 300, 41]
    assert memory.exemplars(ranking, 3, 3)[1].tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert memory.exemplars(ranking, 2, 0)[0].tolist() == []
    again = memory.store(ranking, 0, [1])
    assert again[0].tolist() == [1, -1, -1]


def test_store_and_exemplars_refuse() -> None:
    ranking = np.full((2, 3), -1, np.int32)
    with pytest.raises(UserError, match="4 exemplars"):
        memory.store(ranking, 0, [1, 2, 3, 4])
    for quota in (-1, 4):
        with pytest.raises(UserError, match=f"quota={quota}"):
            memory.exemplars(ranking, 1, quota)


@pytest.mark.parametrize(
    ("m", "held_out"), [(2, 1), (5, 1), (10, 1), (14, 1), (15, 2), (20, 2), (50, 5)]
)
def test_held_out_per_class(m: int, held_out: int) -> None:
    assert memory.held_out_per_class(m) == held_out


@pytest.mark.parametrize(
    ("m", "fraction"), [(0, 0.1), (1, 0.1), (2, 0.9), (20, 0.0), (20, 1.0), (20, -0.1)]
)
def test_held_out_refuses(m: int, fraction: float) -> None:
    with pytest.raises(UserError):
        memory.held_out_per_class(m, fraction)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(3, 12), min_size=1, max_size=5),
    st.integers(1, 2),
    st.integers(0, 1000),
)
def test_balanced_split(sizes: list[int], held_out: int, seed: int) -> None:
    """Disjoint, complete, balanced, and in the order given."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    indices = rng.permutation(1000)[: len(labels)]
    train, held = memory.balanced_split(
        indices, labels, held_out, np.random.default_rng(seed)
    )
    assert sorted([*train, *held]) == sorted(indices)
    label_of = dict(zip(indices.tolist(), labels.tolist(), strict=True))
    counts = np.bincount([label_of[i] for i in held.tolist()], minlength=len(sizes))
    assert (counts == held_out).all()
    is_held = np.isin(indices, held)
    np.testing.assert_array_equal(train, indices[~is_held])
    np.testing.assert_array_equal(held, indices[is_held])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_split_of_a_class_ignores_the_others(seed: int) -> None:
    """Neither the order of the images nor other classes change what is drawn."""
    labels = np.repeat([0, 1, 2], 8)
    indices = np.arange(100, 124)
    _, held = memory.balanced_split(indices, labels, 2, np.random.default_rng(seed))
    order = np.random.default_rng(seed + 1).permutation(24)
    _, shuffled = memory.balanced_split(
        indices[order], labels[order], 2, np.random.default_rng(seed)
    )
    assert sorted(shuffled) == sorted(held)
    _, alone = memory.balanced_split(
        indices[8:16], labels[8:16], 2, np.random.default_rng(seed)
    )
    np.testing.assert_array_equal(alone, held[(held >= 108) & (held < 116)])


def test_splits_differ_by_seed_and_class() -> None:
    labels, indices = np.repeat(np.arange(20), 10), np.arange(200)
    splits = [
        memory.balanced_split(indices, labels, 1, np.random.default_rng(seed))[1]
        for seed in (0, 1)
    ]
    assert (splits[0] != splits[1]).any()
    assert len(set((splits[0] % 10).tolist())) > 1


@pytest.mark.parametrize("held_out", [0, 3, 4])
def test_balanced_split_refuses(held_out: int) -> None:
    with pytest.raises(UserError, match=f"held_out={held_out}.*class 1"):
        memory.balanced_split(
            np.arange(3), np.ones(3, int), held_out, np.random.default_rng(0)
        )
