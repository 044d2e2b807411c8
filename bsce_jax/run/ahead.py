"""The programs that a run will call, and the shapes of what it will call them with."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bsce_jax import methods
from bsce_jax.compute import parallel
from bsce_jax.compute.state import Network, PyTree, TrainState
from bsce_jax.compute.views import VIEWS
from bsce_jax.data import batches
from bsce_jax.run import loop
from bsce_jax.run.context import evaluation_context, has_teacher, phase_context
from bsce_jax.run.dataset import Dataset
from bsce_jax.run.feed import Feed, Resident
from bsce_jax.run.phases import StepData, planned
from bsce_jax.run.programs import Programs, network_shapes

Call = tuple[Any, tuple[PyTree, ...]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run before it begins: see `setup.Run`."""

    config: ConfigDict
    dataset: Dataset
    programs: Programs
    train: Feed
    test: Feed


def calls(plan: Plan, base: bool) -> Iterator[Call]:
    """Programs and the shapes of their arguments, in the order of their first calls.

    Without those of the base step where it is not trained (`base`), and those that are
    not known, see `are_known`.
    """
    if not _are_placed(plan):
        return
    network = network_shapes(plan.config, plan.programs.model, plan.dataset.image_shape)
    # Of the last step: shapes are those of every step, and it has most images.
    last = {data.phase.name: data for data in planned(plan.config, plan.dataset)}
    for data in last.values():
        if base and not data.step:
            yield from _updates(plan, data, network)
    yield from _inference(plan, network)
    for data in last.values():
        if data.step:
            yield from _updates(plan, data, network)


def are_known(plan: Plan) -> bool:
    """Whether `calls` has all programs of a run.

    None under pmap or with streamed images, whose batches would have to be read; and
    not those of phases with companions, which depend on features.
    """
    beside = [section.beside for section in plan.config.phase.values()]
    return _are_placed(plan) and "companions" not in beside


def _are_placed(plan: Plan) -> bool:
    return plan.programs.devices.mode == "jit" and isinstance(plan.train, Resident)


def _updates(plan: Plan, data: StepData, network: Network) -> Iterator[Call]:
    """The calls of a phase: with an update of alpha, and where that is one, without."""
    programs, training = plan.programs, loop.make_training(plan.config, data)
    if training.with_companions:
        return
    context = phase_context(plan.config, plan.dataset, data, network)
    if has_teacher(data):
        context = context.replace(teacher=network)
    alone = bool(training.alpha_every) and programs.updates_per_call == 1
    whole = loop.Loop(programs, plan.train, training)
    for first in range(min(1 + alone, training.updates)):
        with contextlib.closing(loop.calls(whole, first)) as planned_calls:
            _, arguments = next(planned_calls)
        before = _state(programs, network), context, plan.train.resident
        yield loop.program(whole, first), _shapes(plan, (*before, *arguments))


def _state(programs: Programs, network: Network) -> TrainState:
    alpha = jax.ShapeDtypeStruct((), np.float32)
    return TrainState(
        network=network,
        opt_state=jax.eval_shape(programs.optimizer.init, network.params),
        alpha=alpha,
        alpha_opt_state=jax.eval_shape(programs.alpha_optimizer.init, alpha),
    )


def _inference(plan: Plan, network: Network) -> Iterator[Call]:
    """The calls of an evaluation, and of features of training images."""
    programs, size = plan.programs, plan.config.evaluation.batch_size
    context = evaluation_context(plan.dataset, programs.devices, 0)
    rows = [
        next(iter(feed.groups(batches.InOrder(np.arange(1), size))))
        for feed in (plan.test, plan.train)
    ]
    yield (
        programs.evaluate,
        _shapes(plan, (network, context, plan.test.resident, rows[0])),
    )
    hooks = {"begin", "finish"} & vars(methods.module(plan.config.method)).keys()
    if plan.config.memory.kind != "none" or hooks:
        view = parallel.replicate(programs.devices, np.int32(VIEWS.index("plain")))
        yield (
            programs.features,
            _shapes(plan, (network, context, plan.train.resident, view, rows[1])),
        )


def _shapes(plan: Plan, arguments: PyTree) -> Any:
    """Arguments as the compiler sees them, placed as `parallel.replicate` does."""
    whole = plan.programs.devices.sharding()

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        placed = leaf.sharding if isinstance(leaf, jax.Array) else whole
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=placed)

    return jax.tree.map(shape, arguments)
