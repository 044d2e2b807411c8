"""Reading a data set: its class order, what is held back or cut, what is refused."""

import itertools

import numpy as np
import pytest

from bsce_jax.errors import UserError
from bsce_jax.run.dataset import class_order, load
from tests import datasets
from tests.phase_example import config


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
    ({"memory__per_class": 6}, "config.memory.per_class=6: .*'name5' has 5"),
    (
        {"data__max_per_class": 3, "memory__per_class": 4},
        "config.memory.*: .*4 exemplars.*'name3' has 3",
    ),
    (
        {"memory__kind": "fixed", "memory__budget": 16},
        "config.memory.*: .*8 exemplars.*'name3' has 7",
    ),
    ({"memory__kind": "fixed", "memory__budget": 5}, "budget=5: must be at least 6"),
    (
        {"prior": "meta", "memory__kind": "fixed", "memory__budget": 7},
        "config.memory.budget=7: expected 2 exemplars or more of each of 4 classes",
    ),
    (
        {"data__mean": (0.5, 0.5, 0.5), "data__std": (0.5, 0.5, 0.5)},
        r"config.data.mean=\(0.5, 0.5, 0.5\): expected 1 number",
    ),
    ({"scenario__subset": "first100"}, "config.scenario.subset='first100'.*6 classes"),
    ({"scenario__class_order": "0,1"}, "config.scenario.class_order: 2 classes"),
    (
        {"scenario__class_order": "0,a"},
        "config.scenario.class_order='0,a': ",
    ),
    ({"scenario__class_order": "best"}, "config.scenario.class_order='best'"),
    ({"scenario__steps": 3}, "steps=3"),
    ({"scenario__base_classes": 6}, "base_classes=6"),
    (
        {"data__train_split": "training"},
        "config.data.train_split='training': .* split",
    ),
    (
        {"data__test_split": "train"},
        "config.data.test_split='train': expected none of the images of "
        "config.data.train_split='train', but 45 are in both",
    ),
    (
        {"data__train_split": "train[:24]", "data__test_split": "train[20:]"},
        "data.test_split='train.20:.': .*, but 4 are in both",
    ),
    ({"data__name": "unknown"}, "'unknown' is not on this machine"),
    ({"data__image_size": 5}, "config.data.image_size=5: expected no more"),
]


@pytest.mark.parametrize(("values", "message"), REFUSALS)
def test_refusals(marked, values, message):
    with pytest.raises(UserError, match=message) as caught:
        load(marked(**values))
    assert "\n" not in str(caught.value)


def test_parts_of_one_split_may_be_learned_and_tested(marked):
    parts = {"data__train_split": "train[:20]", "data__test_split": "train[20:]"}
    data = load(marked(**parts, memory__per_class=1))
    assert len(data.train_labels) == 20 and len(data.test_labels) == 25
    assert not marks(data.train.images) & marks(data.test.images)
    held = {"data__validation_fraction": 0.3, "data__test_split": "train"}
    load(marked(**held, memory__per_class=2))  # which is not read then


def test_four_channels_are_not_streamed(tmp_path):
    images = list(np.zeros((6, 4, 4, 4), np.uint8))
    splits = {name: (images, [0, 1, 2] * 2) for name in ("train", "test")}
    datasets.write(tmp_path, "four", splits)
    values = {
        "data__name": "four",
        "data__data_dir": str(tmp_path),
        "data__mean": (0.5,) * 4,
        "data__std": (0.5,) * 4,
        "data__image_size": 4,
        "scenario__base_classes": 1,
        "scenario__steps": 2,
        "memory__per_class": 1,
    }
    assert load(config(**values)).image_shape == (4, 4, 4)
    with pytest.raises(UserError, match="loading='streaming': expected resident for "):
        load(config(**values, data__loading="streaming"))


def test_a_class_order_by_name(marked):
    expected = np.random.RandomState(1993).permutation(6)
    found = class_order(marked(scenario__class_order="seed1993"), 6)
    np.testing.assert_array_equal(found, expected)
    found = class_order(marked(scenario__class_order="natural"), 6)
    np.testing.assert_array_equal(found, np.arange(6))
