"""Trainings of a phase of a step, for tests of the loop that runs them."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from bsce_jax.config.fields import default_config
from bsce_jax.config.resolve import resolve
from bsce_jax.run import loop
from bsce_jax.run.phases import Phase, StepData
from tests.step_example import EVERY_GROUP

RATES = (0.1, 0.05, 0.01)
NONE = np.zeros(0, np.int32)


def config(**values) -> ConfigDict:
    c = default_config()
    c.terms = ConfigDict(
        {
            "softmax_ce": {"weight": "1-rho"},
            "kd": {"weight": "rho", "temperature": 2.0},
        }
    )
    c.data.mean, c.data.std, c.data.padding, c.data.flip = (0.5,), (0.25,), 0, False
    c.optim.batch_size = 4
    c.meta.every, c.meta.batch_size = 2, 6
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return resolve(c)


PHASE = Phase(
    name="incremental",
    steps="later",
    images="training",
    epochs=3,
    batch_size=4,
    first_epoch=0,
    rates=RATES,
    by_step="constant",
    sampling="uniform",
    replay=0,
    beside="",
    beside_size=0,
    teacher="before",
    rows="seen",
    rate=EVERY_GROUP,
    optimizer="new",
    begin="",
)


def data_of(step: int, train: np.ndarray, held_out=NONE, **changes) -> StepData:
    """The data of a phase, which `changes` make another one."""
    changed = dataclasses.replace(PHASE, **changes)
    counts = np.zeros(6, int)
    return StepData(changed, step, 0, 5, train, held_out, counts, exemplars=0)


def training(
    step=1, meta=False, images=11, batch_size=4, train=None, held_out=None, **changes
) -> loop.Training:
    """Three epochs of three updates, the last batch of an epoch partial."""
    if train is None:
        train = np.arange(100, 100 + images, dtype=np.int32)
    if held_out is None:
        held_out = np.arange(50, 55, dtype=np.int32) if meta else NONE
    return loop.Training(
        data=data_of(step, train, held_out, **changes),
        seed=3,
        batch_size=batch_size,
        alpha_every=2 if meta else 0,
        held_out_batch_size=6,
    )
