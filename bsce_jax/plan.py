"""What a run will do, before it does it: data, classes of each step, exemplars."""

import dataclasses
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from bsce_jax import memory, scenario, terms
from bsce_jax.config import digest, flatten
from bsce_jax.data import resident, sampling, source
from bsce_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Split:
    """Some images of a split of the source.

    Attributes:
      name: of the source's split.
      records: int [N], the source's record of each image.
      labels: int32 [N], positions in the class order.
      images: uint8 [N, H, W, channels], or None where they are streamed.
    """

    name: str
    records: np.ndarray
    labels: np.ndarray
    images: np.ndarray | None

    def __getitem__(self, chosen: np.ndarray) -> "Split":
        """The images that a mask or indices choose."""
        images = None if self.images is None else self.images[chosen]
        return Split(self.name, self.records[chosen], self.labels[chosen], images)


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
class StepData:
    """The images of one phase of a step, as indices into the training images.

    Attributes:
      phase: "main", or "finetune" on the exemplars of all classes.
      step: 0 is the base step.
      num_old, num_seen: classes before the step, and with it.
      train: int32, D_t: new images and exemplars, without the held-out ones.
      held_out: int32, the balanced B_t of Meta; empty for every other prior.
      counts: int [C], images of each class in `train`.
      exemplars: how many of the old classes' images there are in `train` and
        `held_out` together.
      sampler: of `train`, where images are not drawn once an epoch each.
    """

    phase: str
    step: int
    num_old: int
    num_seen: int
    train: np.ndarray
    held_out: np.ndarray
    counts: np.ndarray
    exemplars: int
    sampler: sampling.Sampler | None = None


def load(config: ConfigDict) -> Dataset:
    """Reads the data set and puts it in class order.

    Raises:
      UserError: the data set is not there, or the scenario does not fit it.
    """
    data = config.data
    names = source.class_names(data.name, data.data_dir)
    used = np.arange(len(names))
    if config.scenario.subset != "all":
        used = scenario.imagenet_subset(config.scenario.subset)
        if len(names) != 1000:
            raise UserError(
                f"config.scenario.subset={config.scenario.subset!r}: expected all, "
                f"because {data.name} has {len(names)} classes, not 1000"
            )
    order = used[class_order(config, len(used))]
    groups = scenario.class_groups(
        len(order), config.scenario.base_classes, config.scenario.steps
    )
    position = scenario.label_positions(order, len(names))

    train = _read(config, data.train_split, position)
    if data.validation_fraction > 0:
        kept, held = resident.hold_out(
            train.labels, data.validation_fraction, config.seed
        )
        train, test = train[kept], train[held]
    else:
        test = _read(config, data.test_split, position)
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


def _read(config: ConfigDict, split: str, position: np.ndarray) -> Split:
    """The images of the classes in use: labels only where they are streamed."""
    data = config.data
    images = None
    if data.loading == "resident":
        images, labels = resident.load(data.name, split, data.data_dir, data.image_size)
    else:
        labels = source.labels(data.name, split, data.data_dir)
    found = Split(split, np.arange(len(labels)), position[labels], images)
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
        try:
            return scenario.class_order(num_classes, [int(x) for x in order.split(",")])
        except ValueError as error:
            raise UserError(f"config.scenario.class_order: {error}") from None
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
    images = dataset.images_per_class
    for group in dataset.groups:
        size = exemplars_per_class(config, group.stop)
        for position in range(group.stop):
            if size > images[position]:
                raise UserError(
                    f"config.memory: {size} exemplars a class, but class "
                    f"{dataset.class_names[position]!r} has {images[position]} "
                    "training images"
                )
    if config.prior == "meta":
        for group in dataset.groups[:-1]:
            size = exemplars_per_class(config, group.stop)
            memory.held_out_per_class(size, config.meta.fraction)


def exemplars_per_class(config: ConfigDict, num_seen: int) -> int:
    """Exemplars of each class kept after a step with `num_seen` classes seen."""
    m = config.memory
    return memory.quota(m.kind, m.per_class, m.budget, num_seen)


def empty_ranking(config: ConfigDict, dataset: Dataset) -> np.ndarray:
    """int32 [C, M] of -1: each class's exemplars in order of choice, none yet."""
    longest = max(exemplars_per_class(config, g.stop) for g in dataset.groups)
    return np.full((dataset.num_classes, longest), -1, np.int32)


def step_data(
    config: ConfigDict, dataset: Dataset, ranking: np.ndarray, step: int
) -> StepData:
    """The training set of a step: its new classes' images and the exemplars.

    Args:
      config: resolved configuration.
      dataset: the whole data set.
      ranking: int32 [C, M], the old classes' exemplars in order of choice.
      step: 0 is the base step.
    """
    group = dataset.groups[step]
    labels = dataset.train_labels
    train = np.flatnonzero((labels >= group.start) & (labels < group.stop))
    train = train.astype(np.int32)
    num_old = group.start
    size = exemplars_per_class(config, num_old) if num_old else 0
    stored, _ = memory.exemplars(ranking, num_old, size)
    train = np.concatenate([train, stored.astype(np.int32)])
    held_out = np.zeros(0, np.int32)
    if config.prior == "meta" and num_old:
        held = memory.held_out_per_class(size, config.meta.fraction)
        rng = np.random.default_rng([config.seed, step, _HELD_OUT])
        train, held_out = memory.balanced_split(train, labels[train], held, rng)
    counts = np.bincount(labels[train], minlength=dataset.num_classes)
    kept = len(stored)
    sampler = None
    if kept and config.sampling == "memory":
        sampler = sampling.memory(labels[train], num_old)
    elif kept and config.sampling == "class":
        sampler = sampling.classes(labels[train])
    return StepData(
        "main", step, num_old, group.stop, train, held_out, counts, kept, sampler
    )


def has_finetuning(config: ConfigDict, dataset: Dataset, step: int) -> bool:
    """Whether an incremental step ends with fine-tuning on exemplars of all classes."""
    size = exemplars_per_class(config, dataset.groups[step].stop)
    return step > 0 and config.finetune.epochs > 0 and size > 0


def finetune_data(
    config: ConfigDict, dataset: Dataset, ranking: np.ndarray, step: int
) -> StepData:
    """The balanced training set of a step's fine-tuning: the exemplars it leaves.

    Arguments as for `step_data`, with the new classes ranked too.
    """
    group = dataset.groups[step]
    size = exemplars_per_class(config, group.stop)
    train, labels = memory.exemplars(ranking, group.stop, size)
    counts = np.bincount(labels, minlength=dataset.num_classes)
    nothing = np.zeros(0, np.int32)
    old = group.start
    return StepData(
        "finetune", step, old, group.stop, train, nothing, counts, old * size
    )


def planned_phases(config: ConfigDict, dataset: Dataset) -> list[StepData]:
    """Every phase's data, with stand-ins for exemplars that are not chosen yet."""
    ranking = empty_ranking(config, dataset)
    for position in range(dataset.num_classes):
        images = np.flatnonzero(dataset.train_labels == position)
        ranking[position] = images[: ranking.shape[1]]
    planned = []
    for step in range(len(dataset.groups)):
        planned.append(step_data(config, dataset, ranking, step))
        if has_finetuning(config, dataset, step):
            planned.append(finetune_data(config, dataset, ranking, step))
    return planned


_HELD_OUT = 1  # keeps this stream of random numbers apart from the epoch orders'


_BASE_SECTIONS = ("data.", "model.", "optim.base_")
_BASE_FIELDS = (
    "seed",
    "matmul_precision",
    "optim.batch_size",
    "optim.momentum",
    "optim.weight_decay",
    "optim.decay",
    "optim.clip",
    "optim.schedule",
)
_NOT_BASE = (
    "data.data_dir",
    "data.nominal_per_class",
    "data.workers",
    "data.timeout",
    "data.corrupt",
)


def reaches_base(name: str) -> bool:
    """Whether a field, by its dotted name, reaches the base step as it stands."""
    chosen = name in _BASE_FIELDS or name.startswith(_BASE_SECTIONS)
    return chosen and name not in _NOT_BASE


def base_hash(config: ConfigDict, dataset: Dataset) -> str:
    """Identifies all that reaches the base step: equal hashes may share one.

    The class order counts as far as it decides the base classes and the head's rows;
    the log-prior counts up to an additive constant; terms that need old classes, the
    memory and the later steps do not count.
    """
    fields = flatten(config)
    part = {name: fields[name] for name in fields if reaches_base(name)}
    base = dataset.groups[0].stop
    part["class_order"] = [int(i) for i in dataset.class_order[:base]]
    part["num_classes"] = dataset.num_classes
    counts = dataset.images_per_class[:base]
    equal = bool(np.all(counts == counts[0]))
    part["terms"] = _base_terms(config, base, equal)
    if config.prior != "none" and not equal:
        part["counts"] = [int(n) for n in counts]
    return digest(part)


def _base_terms(config: ConfigDict, base: int, equal: bool) -> dict[str, Any]:
    """What each term is in the base step; rescaling has no effect on equal classes."""
    found = {}
    for name, term in config.terms.items():
        what, weight = terms.in_base_step(name), terms.weight(name, term, 0, base)
        if what and weight:
            options = {**term.to_dict(), "weight": weight}
            if equal:
                options |= {k: False for k in terms.RESCALING if k in options}
            found[name if what in config.terms else what] = options
    return found
