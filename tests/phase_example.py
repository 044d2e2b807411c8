"""Data sets without images, and configurations for them: tests of phases and hashes."""

import numpy as np
from ml_collections import ConfigDict

from bsce_jax.config.fields import default_config, phase
from bsce_jax.config.resolve import resolve
from bsce_jax.run.dataset import Dataset, Split
from bsce_jax.run.phases import StepData, configured, step_data
from bsce_jax.scenario import class_groups

HELD_OUT = {"bias": phase(images="held_out", epochs=2)}
"""A phase on held-out images, for `config`."""


def config(phases: dict[str, ConfigDict] | None = None, **values) -> ConfigDict:
    """The defaults with IL-Baseline's terms, one channel, and dotted fields changed.

    `phases` come after those of the defaults, those of the base step first.
    """
    c = default_config()
    c.terms = ConfigDict(
        {
            "softmax_ce": {"weight": "1-rho"},
            "kd": {"weight": "rho", "temperature": 2.0},
        }
    )
    c.data.mean, c.data.std = (0.5,), (0.5,)
    c.memory.per_class, c.epsilon = 4, 2.0
    for name, section in (phases or {}).items():
        c.phase[name] = section
    names = (*c.phases, *(phases or {}))
    c.phases = tuple(sorted(names, key=lambda name: c.phase[name].steps != "base"))
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


def data_of(
    chosen: ConfigDict, data: Dataset, ranking: np.ndarray, step: int, name: str = ""
) -> StepData:
    """The data of a phase of a step: that with a name, or the first."""
    kind = "later" if step else "base"
    found = [p for p in configured(chosen) if p.steps == kind and name in ("", p.name)]
    return step_data(chosen, data, ranking, step, found[0])
