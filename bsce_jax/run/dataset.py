"""What a run learns from: images in class order, and the classes of each step."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from bsce_jax import scenario
from bsce_jax.data import decode, resident, source
from bsce_jax.errors import UserError, field_error, named_section
from bsce_jax.run import quotas

_SHOWN = 5  # classes named in a message


@dataclasses.dataclass(frozen=True)
class Split:
    """Some images of a split of the source.

    Attributes:
      name: of the source's split.
      records: int [N], the source's record of each image.
      labels: int32 [N], positions in the class order.
      images: uint8 [N, H, W, channels], or None where they are streamed.
      digest: of the source's whole split, hexadecimal.
    """

    name: str
    records: np.ndarray
    labels: np.ndarray
    images: np.ndarray | None
    digest: str = ""

    def __getitem__(self, chosen: np.ndarray) -> "Split":
        """The images that a mask or indices choose."""
        images = None if self.images is None else self.images[chosen]
        return dataclasses.replace(
            self,
            records=self.records[chosen],
            labels=self.labels[chosen],
            images=images,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in the class order of an experiment; labels are positions in it.

    Attributes:
      train: N images.
      test: M images; held-out training images where data.validation_fraction is not 0.
      image_shape: height, width and channels that the network sees.
      class_names: C names.
      class_order: int [C], the source's label at each position.
      groups: positions that each step introduces, the base step's first.
    """

    train: Split
    test: Split
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    class_order: np.ndarray
    groups: tuple[range, ...]

    @property
    def train_labels(self) -> np.ndarray:
        """Positions of the training images' classes, int32 [N]."""
        return self.train.labels

    @property
    def test_labels(self) -> np.ndarray:
        """Positions of the test images' classes, int32 [M]."""
        return self.test.labels

    @property
    def num_classes(self) -> int:
        """Length of the class axis."""
        return len(self.class_order)

    @property
    def images_per_class(self) -> np.ndarray:
        """Training images of each class, int [C]."""
        return np.bincount(self.train_labels, minlength=self.num_classes)


def facts(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """What a run's data are: number of images and digest of each split, for JSON."""
    return {
        name: {"images": len(split.labels), "digest": split.digest}
        for name, split in (("training", dataset.train), ("test", dataset.test))
    }


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What makes two `facts` differ, in a few words; "" where they agree.

    A run of before there were any agrees with all.
    """
    for name in theirs:
        then, now = theirs[name], ours[name]
        if then["images"] != now["images"]:
            return f"{now['images']} {name} images here, {then['images']} there"
        if then["digest"] != now["digest"]:
            return f"other {name} images, labels or order of them here than there"
    return ""


def load(config: ConfigDict, processes: int = 1) -> Dataset:
    """Reads the data set and puts it in class order.

    Args:
      config: resolved configuration.
      processes: see `resident.load`.

    Raises:
      UserError: the data set is not there, or the scenario does not fit it.
    """
    data = config.data
    try:
        names = source.class_names(data.name, data.data_dir)
    except UserError as error:
        raise UserError(f"config.data.name={data.name!r}: {error}") from None
    used = np.arange(len(names))
    if config.scenario.subset != "all":
        used = scenario.imagenet_subset(config.scenario.subset)
        if len(names) != 1000:
            raise UserError(
                f"config.scenario.subset={config.scenario.subset!r}: expected all, "
                f"because {data.name} has {len(names)} classes, not 1000"
            )
    with named_section("scenario"):
        order = used[class_order(config, len(used))]
        groups = scenario.class_groups(
            len(order), config.scenario.base_classes, config.scenario.steps
        )
    position = scenario.label_positions(order, len(names))

    train = _read(config, "train_split", position, processes)
    _check_every_class(config, names, order, "train_split", train)
    if data.validation_fraction > 0:
        _check_can_be_split(config, names, order, train)
        kept, held = resident.hold_out(
            train.labels, data.validation_fraction, config.seed
        )
        train, test = train[kept], train[held]
    else:
        test = _read(config, "test_split", position, processes)
        _check_every_class(config, names, order, "test_split", test)
        both = source.shared_images(data.name, train.name, test.name, data.data_dir)
        if both:
            allowed = f"none of the images of config.data.train_split={train.name!r}, "
            allowed += f"but {both} are in both"
            raise field_error("data.test_split", test.name, allowed)
    if data.max_per_class > 0:
        train = train[resident.subset(train.labels, data.max_per_class)]
    dataset = Dataset(
        train,
        test,
        _image_shape(config, train),
        tuple(names[i] for i in order),
        order,
        groups,
    )
    check(config, dataset)
    return dataset


def test_images(config: ConfigDict, data: Dataset, chosen: np.ndarray) -> np.ndarray:
    """Some test images as the network sees them, uint8 [n, H, W, channels].

    Raises:
      UserError: one cannot be read.
    """
    if data.test.images is not None:
        return data.test.images[chosen]
    size, _, channels = data.image_shape
    records, _ = source.open_encoded(
        config.data.name, data.test.name, config.data.data_dir
    )
    found = np.zeros((len(chosen), *data.image_shape), np.uint8)
    for image, record in zip(found, data.test.records[chosen], strict=True):
        encoded, _ = records[int(record)]
        try:
            image[:] = decode.test_crop(
                encoded, size, resize=config.data.resize, channels=channels
            )
        except decode.DecodeError as error:
            raise UserError(f"{records.name(int(record))}: {error}") from None
    return found


def regrouped(config: ConfigDict, dataset: Dataset) -> Dataset:
    """The same images in the same class order, in the steps of another configuration.

    Raises:
      UserError: the scenario does not fit the data set.
    """
    s = config.scenario
    with named_section("scenario"):
        groups = scenario.class_groups(dataset.num_classes, s.base_classes, s.steps)
    found = dataclasses.replace(dataset, groups=groups)
    check(config, found)
    return found


def _check_every_class(
    config: ConfigDict,
    names: Sequence[str],
    order: np.ndarray,
    field: str,
    split: Split,
) -> None:
    """Refuses a split in which a class has no image, before anything is trained.

    Raises:
      UserError: names the split and classes.
    """
    counts = np.bincount(split.labels, minlength=len(order))
    empty = [names[order[position]] for position in np.flatnonzero(counts == 0)]
    if empty:
        shown = ", ".join(repr(name) for name in empty[:_SHOWN])
        more = f" and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
        raise field_error(
            f"data.{field}",
            split.name,
            f"images of every class, but there are none of {shown}{more} in "
            f"{config.data.name}",
        )


def _check_can_be_split(
    config: ConfigDict, names: Sequence[str], order: np.ndarray, split: Split
) -> None:
    counts = np.bincount(split.labels, minlength=len(order))
    for position in np.flatnonzero(counts == 1):
        raise field_error(
            "data.validation_fraction",
            config.data.validation_fraction,
            f"0, or two images or more of class {names[order[position]]!r}, which has "
            "a single one",
        )


def _read(
    config: ConfigDict, field: str, position: np.ndarray, processes: int
) -> Split:
    """The images of the classes in use: labels only where they are streamed."""
    data, split = config.data, config.data[field]
    known = source.split_error(data.name, split, data.data_dir)
    if known:
        raise field_error(f"data.{field}", split, known)
    images = None
    if data.loading == "resident":
        images, labels, digest = resident.load(
            data.name, split, data.data_dir, data.image_size, processes
        )
    else:
        labels = source.labels(data.name, split, data.data_dir)
        digest = source.digest(data.name, split, data.data_dir, labels)
    found = Split(split, np.arange(len(labels)), position[labels], images, digest)
    used = found.labels >= 0
    return found if used.all() else found[used]


def _image_shape(config: ConfigDict, train: Split) -> tuple[int, int, int]:
    if train.images is not None:
        return train.images.shape[1:]
    size = config.data.image_size
    return size, size, source.channels(config.data.name, config.data.data_dir)


def class_order(config: ConfigDict, num_classes: int) -> np.ndarray:
    """The configured order; "3,1,2" is a list of labels."""
    order = config.scenario.class_order
    if "," in order:
        labels = order.split(",")
        if not all(re.fullmatch(r"\s*\d{1,9}\s*", label) for label in labels):
            allowed = "labels separated by commas, each a number"
            raise field_error("scenario.class_order", order, allowed)
        return scenario.class_order(num_classes, [int(label) for label in labels])
    return scenario.class_order(num_classes, order)


def check(config: ConfigDict, dataset: Dataset) -> None:
    """Checks that scenario and memory fit a data set.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    channels = dataset.image_shape[2]
    if len(config.data.mean) != channels:
        raise UserError(
            f"config.data.mean={config.data.mean!r}: expected {channels} numbers, one "
            f"a channel of {config.data.name}"
        )
    if config.data.loading == "streaming" and channels not in (1, 3):
        allowed = f"resident for images of {channels} channels"
        raise field_error("data.loading", "streaming", allowed)
    images = dataset.images_per_class
    field = "per_class" if config.memory.kind == "growing" else "budget"
    with named_section("memory"):
        for group in dataset.groups:
            quotas.memory_per_class(config, group.stop)
    most = quotas.most_held_out(config, dataset.groups)
    reserved = most if quotas.held_once(config) else 0
    for group in dataset.groups:
        size = quotas.exemplars_per_class(config, group.stop) + reserved
        few = np.flatnonzero(images[: group.stop] < size)
        if len(few):
            raise field_error(
                f"memory.{field}",
                config.memory[field],
                f"no more than the training images: {size} exemplars a class, but "
                f"class {dataset.class_names[few[0]]!r} has {images[few[0]]}",
            )
