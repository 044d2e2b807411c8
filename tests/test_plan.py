"""What a run will do: the data of each step, and which base steps are the same."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from bsce_jax.config.fields import default_config
from bsce_jax.config.hashes import flatten
from bsce_jax.config.resolve import resolve
from bsce_jax.errors import UserError
from bsce_jax.run import base_hash
from bsce_jax.run.dataset import Dataset, Split, class_order, exemplars_per_class, load
from bsce_jax.run.phases import (
    empty_ranking,
    finetune_data,
    has_finetuning,
    planned_phases,
    step_data,
)
from bsce_jax.scenario import class_groups
from tests import datasets

PRIORS = ("none", "balanced", "weighted", "meta", "relaxed")


def config(**values) -> ConfigDict:
    """The defaults with IL-Baseline's terms, one channel, and dotted fields changed."""
    c = default_config()
    c.terms = ConfigDict(
        {
            "softmax_ce": {"weight": "1-rho"},
            "kd": {"weight": "rho", "temperature": 2.0},
        }
    )
    c.data.mean, c.data.std = (0.5,), (0.5,)
    c.memory.per_class, c.epsilon = 4, 2.0
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return resolve(c)


def dataset(counts, base: int, steps: int, seed: int = 0) -> Dataset:
    """Empty images with shuffled labels, `counts` of each class."""
    classes = len(counts)
    labels = np.random.default_rng(seed).permutation(
        np.repeat(np.arange(classes), counts)
    )

    def split(name, labels):
        images = np.zeros((len(labels), 2, 2, 1), np.uint8)
        return Split(name, np.arange(len(labels)), labels.astype(np.int32), images)

    return Dataset(
        split("train", labels),
        split("test", np.arange(classes)),
        (2, 2, 1),
        tuple(f"class {i}" for i in range(classes)),
        np.arange(classes)[::-1],
        class_groups(classes, base, steps),
    )


def full_ranking(data: Dataset, width: int, seed: int = 1) -> np.ndarray:
    """A random order of each class's first images, as herding would leave one."""
    ranking = np.full((data.num_classes, width), -1, np.int32)
    rng = np.random.default_rng(seed)
    for position in range(data.num_classes):
        images = rng.permutation(np.flatnonzero(data.train_labels == position))[:width]
        ranking[position, : len(images)] = images
    return ranking


def test_a_step_has_its_new_images_and_the_exemplars():
    data = dataset([9, 7, 8, 6, 10, 5], base=2, steps=2)
    ranking = full_ranking(data, 4)
    ranking[2:] = -1  # not chosen yet
    base, first = (step_data(config(), data, ranking, s) for s in (0, 1))
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
        found = step_data(chosen, data, ranking, step)
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
    chosen = config(memory__per_class=2, sampling=kind)
    ranking = full_ranking(data, 2)
    base, later = (step_data(chosen, data, ranking, step) for step in (0, 2))
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
    without = step_data(config(memory__kind="none", sampling=kind), data, ranking, 2)
    assert without.sampler is None


def test_fine_tuning_data_are_the_exemplars_of_all_classes_seen():
    data = dataset([8] * 6, base=3, steps=3)
    chosen = config(memory__per_class=2, finetune__epochs=4)
    ranking = empty_ranking(chosen, data)
    for position in range(4):
        ranking[position] = np.flatnonzero(data.train_labels == position)[[5, 1]]
    found = finetune_data(chosen, data, ranking, 1)
    assert (found.phase, found.step, found.num_old, found.num_seen) == (
        "finetune",
        1,
        3,
        4,
    )
    np.testing.assert_array_equal(found.train, ranking[:4].reshape(-1))
    assert found.counts.tolist() == [2, 2, 2, 2, 0, 0] and found.exemplars == 6
    assert len(found.held_out) == 0
    steps = [has_finetuning(chosen, data, step) for step in range(4)]
    assert steps == [False, True, True, True]
    phases = [(d.step, d.phase) for d in planned_phases(chosen, data)]
    assert phases == [(0, "main")] + [
        (step, phase) for step in (1, 2, 3) for phase in ("main", "finetune")
    ]
    for changes in ({"finetune__epochs": 0}, {"memory__kind": "none"}):
        without = config(**{"finetune__epochs": 4, **changes})
        assert not has_finetuning(without, data, 1)


@pytest.mark.parametrize("prior", ["balanced", "meta"])
@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_planned_phases_are_as_large_as_the_real_ones(prior, kind):
    data = dataset([12, 9, 10, 11, 8], base=2, steps=3)
    chosen = config(
        prior=prior, memory__kind=kind, memory__per_class=4, memory__budget=16
    )
    planned = planned_phases(chosen, data)
    ranking = full_ranking(data, 8)
    assert [p.step for p in planned] == [0, 1, 2, 3]
    for found in planned:
        real = step_data(chosen, data, ranking, found.step)
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
        everything = step_data(plain, data, ranking, step)
        found = step_data(meta, data, ranking, step)
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
    base = step_data(meta, data, ranking, 0)
    assert len(base.held_out) == 0 and base.counts.sum() == sum(counts[:2])


def test_the_split_of_meta_depends_on_seed_and_step_only():
    data = dataset([30] * 6, base=2, steps=4)
    ranking = full_ranking(data, 10)

    def held_out(step, **values):
        """Of the base classes' exemplars, which every step replays."""
        chosen = config(
            prior="meta", memory__per_class=10, meta__fraction=0.4, **values
        )
        found = step_data(chosen, data, ranking, step).held_out
        return set(found[data.train_labels[found] < 2].tolist())

    assert len(held_out(1)) == 8
    assert held_out(1) == held_out(1, alpha=0.5)
    assert held_out(1) != held_out(1, seed=1)
    assert held_out(1) != held_out(2)


DATA = dataset([8] * 6, base=3, steps=3)

# One other value for each field that reaches the base step.
RELEVANT = {
    "seed": 1,
    "matmul_precision": "highest",
    "data.name": "other",
    "data.train_split": "train[:50%]",
    "data.test_split": "validation",
    "data.image_size": 16,
    "data.max_per_class": 7,
    "data.validation_fraction": 0.1,
    "data.padding": 2,
    "data.flip": False,
    "data.brightness": 0.2,
    "data.loading": "streaming",
    "data.resize": 40,
    "data.random_resized_crop": False,
    "data.crop_area": (0.5, 1.0),
    "data.mean": (0.4,),
    "data.std": (0.4,),
    "model.name": "resnet20",
    "model.width": 8,
    "model.shortcut": "A",
    "model.final_relu": False,
    "model.head": "cosine",
    "model.proxies": 5,
    "model.stem": "3x3",
    "model.dtype": "bfloat16",
    "model.conv_chunks": 4,
    "optim.batch_size": 64,
    "optim.momentum": 0.8,
    "optim.weight_decay": 1e-3,
    "optim.decay": 0.2,
    "optim.clip": 5.0,
    "optim.schedule": "cosine",
    "optim.base_epochs": 3,
    "optim.base_learning_rate": 0.3,
    "optim.base_milestones": (2,),
    "terms.softmax_ce.weight": 0.5,
}
IRRELEVANT = {
    "name": "mine",
    "method": "lucir",
    "alpha": 0.5,
    "epsilon": 1.0,
    "epsilon_unit": "percent",
    "init_from": "/somewhere",
    "parallel": "pmap",
    "updates_per_call": 5,
    "deterministic": True,
    "print_plan": True,
    "log_seconds": 1.0,
    "compile_cache": False,
    "data.data_dir": "/elsewhere",
    "data.nominal_per_class": 8,
    "data.workers": 3,
    "data.timeout": 5.0,
    "data.corrupt": "skip",
    "scenario.subset": "lucir",  # counts by the class order
    "scenario.class_order": "icarl",
    "scenario.base_classes": 4,
    "scenario.steps": 7,
    "memory.kind": "fixed",
    "memory.per_class": 2,
    "memory.budget": 30,
    "memory.selection": "random",
    "classification": "softmax_ce",
    "sampling": "class",
    "optim.freeze_old_rows": True,
    "evaluation.nearest_mean": False,
    "finetune.when": "never",
    "finetune.epochs": 3,
    "finetune.learning_rate": 0.2,
    "finetune.milestones": (2,),
    "finetune.trainable": "all",
    "finetune.batch_norm": "train",
    "optim.epochs": 11,
    "optim.learning_rate": 0.7,
    "optim.milestones": (5,),
    "meta.every": 3,
    "meta.fraction": 0.2,
    "meta.batch_size": 3,
    "meta.inner_learning_rate": 0.3,
    "meta.optimizer": "adam",
    "meta.variable": "log_alpha",
    "meta.learning_rate": 0.3,
    "meta.minimum": 0.1,
    "meta.maximum": 2.0,
    "meta.batch_norm": "eval",
    "evaluation.batch_size": 3,
    "checkpoint.minutes": 3.0,
    "checkpoint.keep": 3,
    "terms.kd.weight": 0.5,
    "terms.kd.temperature": 3.0,
}
ONE_VALUE_ONLY = {"model.head"}


def test_every_field_is_sorted_into_one_of_the_two():
    sorted_fields = {*RELEVANT, *IRRELEVANT, *ONE_VALUE_ONLY, "prior"}
    assert sorted_fields == set(flatten(config()))


@pytest.mark.parametrize("prior", ["none", "meta"])
def test_the_base_hash_covers_what_reaches_the_base_step(prior):
    plain = config(prior=prior)
    expected = base_hash.base_hash(plain, DATA)

    def changed(name, value):
        c = plain.copy_and_resolve_references()
        if name.startswith("terms."):
            c.terms[name.split(".")[1]] = {
                **c.terms[name.split(".")[1]].to_dict(),
                name.split(".")[2]: value,
            }
        else:
            c.update_from_flattened_dict({name: value})
        assert flatten(c) != flatten(plain), name
        return base_hash.base_hash(c, DATA)

    for name, value in RELEVANT.items():
        assert changed(name, value) != expected, name
    for name, value in IRRELEVANT.items():
        assert changed(name, value) == expected, name


def test_the_base_hash_of_all_priors_is_one_where_classes_are_equally_large():
    hashes = {base_hash.base_hash(config(prior=prior), DATA) for prior in PRIORS}
    assert len(hashes) == 1
    unequal = dataset([8, 8, 7, 8, 8, 8], base=3, steps=3)
    plain, *others = (base_hash.base_hash(config(prior=p), unequal) for p in PRIORS)
    assert len(set(others)) == 1 and plain != others[0]
    assert plain == hashes.pop()
    later = dataset([8, 8, 8, 8, 7, 8], base=3, steps=3)
    assert len({base_hash.base_hash(config(prior=p), later) for p in PRIORS}) == 1


def test_the_ablations_of_equally_large_classes_share_the_base_step():
    """The separated softmax is the softmax there, and rescaling multiplies by one."""

    def given(classification="auto", **terms) -> ConfigDict:
        c = config().copy_and_resolve_references()
        c.terms, c.classification = ConfigDict(terms), classification
        return resolve(c)

    softmax = {"weight": "1-rho", "rescale": False}
    plain = given(softmax_ce=softmax)
    rescaled = given(softmax_ce=softmax | {"rescale": True})
    separated = given("separated_softmax_ce", softmax_ce=softmax)
    both = given(softmax_ce={"weight": 0.5}, separated_softmax_ce={"weight": 0.5})
    expected = base_hash.base_hash(plain, DATA)
    assert base_hash.base_hash(rescaled, DATA) == expected
    assert base_hash.base_hash(separated, DATA) == expected
    assert base_hash.base_hash(both, DATA) != expected
    unequal = dataset([8, 8, 7, 8, 8, 8], base=3, steps=3)
    assert base_hash.base_hash(rescaled, unequal) != base_hash.base_hash(plain, unequal)
    assert base_hash.base_hash(separated, unequal) == base_hash.base_hash(
        plain, unequal
    )


def test_the_base_hash_and_the_scenario():
    """Steps and the order of later classes do not count; the base classes do."""
    expected = base_hash.base_hash(config(), DATA)

    def found(**values):
        return base_hash.base_hash(config(), dataclasses.replace(DATA, **values))

    assert found(groups=class_groups(6, 3, 1)) == expected
    assert found(groups=class_groups(6, 2, 2)) != expected
    assert found(class_order=np.array([5, 4, 3, 0, 2, 1])) == expected
    assert found(class_order=np.array([4, 5, 3, 0, 2, 1])) != expected
    longer_head = np.array([5, 4, 3, 2, 1, 0, 6])
    assert found(class_order=longer_head) != expected
    # Weights count as numbers in the base step, whatever they are called.
    one = config()
    one.terms.softmax_ce = {"weight": 1.0}
    assert base_hash.base_hash(one, DATA) == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six classes of 5 to 10 images whose pixels say the class and the number."""
    folder = tmp_path_factory.mktemp("data")
    splits = {}
    for split, counts in (("train", [10, 9, 8, 7, 6, 5]), ("test", [3] * 6)):
        images, labels = [], []
        for number, label in itertools.product(range(10), range(6)):
            if number < counts[label]:
                image = np.zeros((4, 4, 1), np.uint8)
                image[0, 0], image[0, 1], image[0, 2] = label, number, split == "test"
                images.append(image)
                labels.append(label)
        splits[split] = (images, labels)
    datasets.write(folder, "marked", splits, names=[f"name{i}" for i in range(6)])
    return folder


@pytest.fixture
def marked(folder):
    """Makes a configuration for the data set."""

    def make(**values):
        chosen = {
            "data__name": "marked",
            "data__data_dir": str(folder),
            "scenario__class_order": "3,1,5,0,2,4",
            "scenario__base_classes": 2,
            "scenario__steps": 2,
            "memory__per_class": 4,
            **values,
        }
        return config(**chosen)

    return make


def marks(images) -> set:
    """(class, number, test) of each image."""
    return {tuple(int(v) for v in image[0, :3, 0]) for image in images}


def test_load_puts_the_classes_in_order(marked):
    data = load(marked())
    order = [3, 1, 5, 0, 2, 4]
    assert data.class_order.tolist() == order and data.num_classes == 6
    assert data.class_names == tuple(f"name{i}" for i in order)
    assert data.groups == (range(2), range(2, 4), range(4, 6))
    np.testing.assert_array_equal(data.images_per_class, [7, 9, 5, 10, 8, 6])
    for images, labels in (
        (data.train.images, data.train_labels),
        (data.test.images, data.test_labels),
    ):
        np.testing.assert_array_equal(np.array(order)[labels], images[:, 0, 0, 0])
    assert len(data.test_labels) == 18
    assert all(test == 1 for _, _, test in marks(data.test.images))


def test_validation_fraction_evaluates_held_out_training_images(marked):
    everything = marks(load(marked()).train.images)
    held_back = {"data__validation_fraction": 0.3, "memory__per_class": 2}
    data = load(marked(**held_back))
    train, held = marks(data.train.images), marks(data.test.images)
    assert not train & held and train | held == everything
    assert all(test == 0 for _, _, test in held)
    sizes = np.array([7, 9, 5, 10, 8, 6])
    held_out = np.bincount(data.test_labels)
    np.testing.assert_array_equal(held_out, [2, 3, 2, 3, 2, 2])
    np.testing.assert_array_equal(data.images_per_class, sizes - held_out)
    order = np.array([3, 1, 5, 0, 2, 4])
    for images, labels in (
        (data.train.images, data.train_labels),
        (data.test.images, data.test_labels),
    ):
        np.testing.assert_array_equal(order[labels], images[:, 0, 0, 0])
    again = load(marked(**held_back))
    assert marks(again.test.images) == held
    other = load(marked(**held_back, seed=5))
    assert marks(other.test.images) != held


def test_max_per_class_keeps_the_first_images_of_each_class(marked):
    everything = load(marked())
    data = load(marked(data__max_per_class=6))
    np.testing.assert_array_equal(data.images_per_class, [6, 6, 5, 6, 6, 6])
    for position in range(6):
        own, all_own = (
            d.train.images[d.train_labels == position] for d in (data, everything)
        )
        np.testing.assert_array_equal(own, all_own[: len(own)])
    assert len(data.test_labels) == 18  # test images are never cut
    both = load(
        marked(
            data__max_per_class=6, data__validation_fraction=0.3, memory__per_class=2
        )
    )
    np.testing.assert_array_equal(both.images_per_class, [5, 6, 3, 6, 6, 4])


REFUSALS = [
    ({"memory__per_class": 6}, "config.memory: 6 .*'name5' has 5 training images"),
    (
        {"data__max_per_class": 3, "memory__per_class": 4},
        "config.memory: 4 .*'name3' has 3 training images",
    ),
    (
        {"memory__kind": "fixed", "memory__budget": 16},
        "config.memory: 8 .*'name3' has 7 training images",
    ),
    ({"memory__kind": "fixed", "memory__budget": 5}, "budget=5: must be at least 6"),
    (
        {"prior": "meta", "memory__kind": "fixed", "memory__budget": 7},
        "m=1: .*at least 2 exemplars",
    ),
    (
        {"data__mean": (0.5, 0.5, 0.5), "data__std": (0.5, 0.5, 0.5)},
        r"config.data.mean=\(0.5, 0.5, 0.5\): expected 1 number",
    ),
    ({"scenario__subset": "first100"}, "config.scenario.subset='first100'.*6 classes"),
    ({"scenario__class_order": "0,1"}, "config.scenario.class_order: .* 2 classes"),
    ({"scenario__class_order": "0,a"}, "config.scenario.class_order: .*'a'"),
    ({"scenario__class_order": "best"}, "order='best'"),
    ({"scenario__steps": 3}, "steps=3"),
    ({"scenario__base_classes": 6}, "base_classes=6"),
    ({"data__train_split": "training"}, "'training' of marked does not exist"),
    ({"data__name": "unknown"}, "'unknown' is not on this machine"),
    ({"data__image_size": 5}, "image_size: 5 is not allowed"),
]


@pytest.mark.parametrize(("values", "message"), REFUSALS)
def test_refusals(marked, values, message):
    with pytest.raises(UserError, match=message) as caught:
        load(marked(**values))
    assert "\n" not in str(caught.value)


def test_a_class_order_by_name(marked):
    expected = np.random.RandomState(1993).permutation(6)
    found = class_order(marked(scenario__class_order="seed1993"), 6)
    np.testing.assert_array_equal(found, expected)
    found = class_order(marked(scenario__class_order="natural"), 6)
    np.testing.assert_array_equal(found, np.arange(6))
