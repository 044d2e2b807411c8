"""What runs of one process share, and that nothing is taken for something else."""

import functools
import math
from unittest import mock

import numpy as np
import pytest
from etils import epath

from bsce_jax import experiment
from bsce_jax.compute import optim, parallel
from bsce_jax.config.flags import parse
from bsce_jax.config.resolve import resolve
from bsce_jax.data import resident
from bsce_jax.errors import UserError
from bsce_jax.hosts.stop import StopSignal
from bsce_jax.run.identity import identity
from bsce_jax.run.shared import Shared
from bsce_jax.telemetry.compiles import compile_counter
from tests import example_jobs, runs


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return example_jobs.write_config(tmp_path_factory.mktemp("shared"))


def configuration(small, arguments: str, *overrides: str):
    flags = ["test", f"--config={small}:{arguments}", *overrides]
    return resolve(parse(flags).config)


def made(factor, offset=0):
    def function(x):
        return factor * x + offset

    return function


class Unknown:
    pass


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (made(2), made(2)),
        (functools.partial(made(2), 3), functools.partial(made(2), 3)),
        (optim.sgd(0.9, 1e-4), optim.sgd(0.9, 1e-4)),
        (optim.Noise(0.1, 2), optim.Noise(0.1, 2)),
        ({"a": 1, "b": (2.0,)}, {"b": (2.0,), "a": 1}),
        (np.arange(3), np.arange(3)),
        (frozenset({"a", "b"}), frozenset({"b", "a"})),
        (math.nan, math.nan),
        (Shared.load, Shared.load),
    ],
)
def test_functions_of_the_same_code_and_values_are_one(one, other):
    assert identity(one) == identity(other)
    assert hash(identity(one)) == hash(identity(other))


SAME = Unknown()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (made(2), made(3)),
        (made(2), made(2, 1)),
        (made(1), made(True)),
        (made(1), made(1.0)),
        (lambda x: x + 1, lambda x: x + 2),
        (functools.partial(made(2), 3), functools.partial(made(2), 4)),
        (functools.partial(made(2), x=3), functools.partial(made(2), 3)),
        (optim.sgd(0.9, 1e-4), optim.sgd(0.9, 2e-4)),
        (optim.sgd(0.9, 1e-4), optim.sgd(0.9, 1e-4, clip=5.0)),
        (optim.Noise(0.1, 2), optim.Noise(0.1, 3)),
        ({"a": 1}, {"a": 2}),
        ((1, 2), [1, 2]),
        (np.arange(3), np.arange(3.0)),
        (0.0, -0.0),
        (Unknown(), Unknown()),
        (made(Unknown()), made(Unknown())),
        (Unknown().__eq__, SAME.__eq__),
    ],
)
def test_other_code_or_values_are_another(one, other):
    assert identity(one) != identity(other)
    assert identity(SAME) == identity(SAME)


def test_priors_share_programs_and_meta_adds_its_own(small):
    shared = Shared()
    devices = parallel.create("jit")
    with runs.small_network():
        none, balanced, weighted, meta = (
            shared.parts.build(
                configuration(small, f"prior={prior},memory=4"), devices, 6
            )
            for prior in ("none", "balanced", "weighted,alpha=0.25", "meta")
        )
        lucir = shared.parts.build(configuration(small, "method=lucir"), devices, 6)
        more = ["--config.optim.weight_decay=0.1"]
        decayed = shared.parts.build(configuration(small, "", *more), devices, 6)
    for other in (balanced, weighted, meta):
        assert other.updates == none.updates
        assert (other.evaluate, other.features) == (none.evaluate, none.features)
    assert len(meta.meta_updates) == 1 and not balanced.meta_updates
    for other in (lucir, decayed):
        assert not set(other.updates.values()) & set(none.updates.values())
    assert lucir.evaluate is not none.evaluate  # its head is another


def test_images_are_read_and_placed_once(small):
    shared, devices = Shared(), parallel.create("jit")
    config = configuration(small, "memory=4")
    steps = configuration(small, "memory=2,steps=1", "--config.scenario.steps=1")
    fewer = configuration(small, "memory=4", "--config.data.max_per_class=5")
    with mock.patch.object(resident, "load", wraps=resident.load) as load:
        data, other, less = map(shared.load, (config, steps, fewer))
        assert load.call_count == 4  # two splits, with and without the limit
        with pytest.raises(UserError, match="memory"):
            shared.load(configuration(small, "", "--config.memory.per_class=9"))
    assert [len(d.groups) for d in (data, other, less)] == [3, 2, 3]
    assert other.train is data.train and len(less.train.labels) == 30
    feeds = [
        shared.parts.create(c, devices, d.train, d.image_shape)
        for c, d in ((config, data), (steps, other), (fewer, less))
    ]
    assert feeds[0] is feeds[1] and feeds[0] is not feeds[2]
    held = [
        shared.load(
            configuration(
                small, f"memory=4,seed={s}", "--config.data.validation_fraction=0.5"
            )
        )
        for s in (0, 1)
    ]
    assert not np.array_equal(held[0].train.records, held[1].train.records)


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["balanced", "meta"])
@pytest.mark.parametrize("width", [1, 4])
def test_a_run_compiles_none_of_what_was_compiled_ahead(small, tmp_path, prior, width):
    arguments = f"memory=4,prior={prior}"
    config = configuration(small, arguments, f"--config.updates_per_call={width}")
    with Shared() as shared, runs.small_network():
        shared.compile_ahead(config, True).result()
        with experiment.prepared(config, epath.Path(tmp_path), shared.parts) as run:
            counts = compile_counter()
            experiment.carry_out(run, StopSignal())
    trained = ("base_update", "incremental_update", "incremental_meta_update")
    names = (*trained, "evaluate", "features")
    assert not set(counts) & set(names)
