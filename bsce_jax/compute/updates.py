"""Consecutive updates as one compiled function: batches, random keys, the loop."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bsce_jax.compute.inference import outputs_of
from bsce_jax.compute.state import (
    COMPANIONS,
    HELD_OUT,
    MEMORY,
    TRAIN,
    Array,
    Batch,
    Images,
    Network,
    Rows,
    Schedule,
    StepContext,
    TrainState,
)
from bsce_jax.compute.steps import (
    Program,
    fetch,
    meta_step,
    train_step,
)

# What the random keys of an update are for.
_IMAGES, _HELD_OUT_IMAGES, _GRADIENT_NOISE, _MEMORY_IMAGES = range(4)

_Outcome = tuple[TrainState, dict[str, Array]]
_Streams = Mapping[str, Rows]


def make_train_update(program: Program) -> Callable:
    """Returns update(state, context, data, count, schedule, streams, axis_name).

    It runs `count` consecutive updates of a plan of U on the stream TRAIN, and what
    streams there are beside it, and returns the state and metrics [U]. For U = 1 there
    is no loop: XLA:CPU runs the backward pass of a convolution inside a loop some 19
    times slower.
    """
    return _checked(_loop(program))


def _loop(program: Program) -> Callable:
    """As make_train_update, without the check of the network."""

    def update(
        state: TrainState,
        context: StepContext,
        data: Images | None,
        count: Array,
        schedule: Schedule,
        streams: _Streams,
        axis_name: str | None = None,
    ) -> _Outcome:
        def one(u: Array | int, carry: _Outcome) -> _Outcome:
            state, metrics = carry
            batch = _batch(program, data, schedule, streams, u, axis_name)
            rate, noise = schedule.learning_rate[u], _noise(program, schedule, u)
            state, new = train_step(program, state, context, batch, rate, noise)
            new["alpha"] = state.alpha
            return state, {
                k: metrics[k].at[u].set(new[k].astype(metrics[k].dtype))
                for k in metrics
            }

        updates = len(streams[TRAIN].indices)
        carry = (state, _no_metrics(updates, state))
        if updates == 1:
            return one(0, carry)
        return jax.lax.fori_loop(0, count, one, carry)

    return update


def make_meta_update(program: Program) -> Callable:
    """Returns update(state, context, data, count, schedule, streams, axis_name).

    As make_train_update, with an update of alpha before every meta.every-th update,
    from the first. Row g of the stream HELD_OUT belongs to the g-th of them.
    """
    meta = program.meta
    assert meta is not None
    train_update = _loop(program)

    def update(
        state: TrainState,
        context: StepContext,
        data: Images | None,
        count: Array,
        schedule: Schedule,
        streams: _Streams,
        axis_name: str | None = None,
    ) -> _Outcome:
        held_out, updates = streams[HELD_OUT], len(streams[TRAIN].indices)

        def alpha_update(state: TrainState, group: Array | int) -> TrainState:
            u = group * meta.every
            key = _key(schedule, u, _HELD_OUT_IMAGES)
            batch = _batch(program, data, schedule, streams, u, axis_name)
            balanced = fetch(program, data, held_out, group, key, axis_name)
            rate = schedule.learning_rate[u]
            return meta_step(program, state, context, batch, balanced, rate)

        if updates == 1:
            state = alpha_update(state, 0)
            return train_update(
                state, context, data, count, schedule, streams, axis_name
            )

        def one(u: Array, carry: _Outcome) -> _Outcome:
            state, metrics = carry
            at = lambda tree: jax.tree.map(lambda leaf: leaf[u][None], tree)  # noqa: E731
            only = {n: at(rows) for n, rows in streams.items() if n != HELD_OUT}
            state, new = train_update(
                state, context, data, count, at(schedule), only, axis_name
            )
            return state, {k: metrics[k].at[u].set(new[k][0]) for k in metrics}

        def group(g: Array, carry: _Outcome) -> _Outcome:
            carry = (alpha_update(carry[0], g), carry[1])
            first = g * meta.every
            last = jnp.minimum(first + meta.every, count)
            return jax.lax.fori_loop(first, last, one, carry)

        groups = (count + meta.every - 1) // meta.every
        carry = (state, _no_metrics(updates, state))
        return jax.lax.fori_loop(0, groups, group, carry)

    return _checked(update)


def _checked(update: Callable) -> Callable:
    """Adds the metric "finite" [U]: whether the network is, after the last update.

    A loss is that of the network before its update, and XLA:CPU's can be finite where
    the network is not.
    """

    def checked(*arguments: Any, axis_name: str | None = None) -> _Outcome:
        state, metrics = update(*arguments, axis_name=axis_name)
        leaves = [
            jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state.network)
        ]
        finite = jnp.all(jnp.stack(leaves))
        finite = jnp.broadcast_to(finite, metrics["loss"].shape)
        return state, metrics | {"finite": finite}

    return checked


def make_epoch_features(program: Program) -> Callable:
    """Returns features(network, context, data, schedule, rows, axis_name).

    The rows' `valid` [1, B], and float32 features [1, B, D] of the images as they are
    augmented for the one update of the schedule, in evaluation mode.
    """

    def features(
        network: Network,
        context: StepContext,
        data: Images | None,
        schedule: Schedule,
        rows: Rows,
        axis_name: str | None = None,
    ) -> tuple[Array, Array]:
        key = _key(schedule, 0, _IMAGES)
        batch = fetch(program, data, rows, 0, key, axis_name)
        out = outputs_of(program, network, batch, context)
        return rows.valid, out["features"][None].astype(jnp.float32)

    return features


def _batch(
    program: Program,
    data: Images | None,
    schedule: Schedule,
    streams: _Streams,
    update: Array | int,
    axis_name: str | None,
) -> Batch:
    """The training batch of one update, with what goes beside it.

    A companion is augmented as it is in its own place of the epoch.
    """
    key = _key(schedule, update, _IMAGES)
    batch = fetch(program, data, streams[TRAIN], update, key, axis_name)
    beside = {}
    if MEMORY in streams:
        key = _key(schedule, update, _MEMORY_IMAGES)
        beside[MEMORY] = fetch(program, data, streams[MEMORY], update, key, axis_name)
    if COMPANIONS in streams:
        rows = streams[COMPANIONS]
        assert rows.updates is not None
        keys = _keys_in_epoch(schedule, update, rows.updates[update].ravel())
        beside[COMPANIONS] = fetch(program, data, rows, update, keys, axis_name)
    return batch.replace(beside=beside)


def _key(schedule: Schedule, update: Array | int, purpose: int) -> Array:
    """The random key of one update and purpose."""
    key = jax.random.fold_in(_epoch_key(schedule, update), schedule.update[update])
    return jax.random.fold_in(key, purpose)


def _keys_in_epoch(schedule: Schedule, update: Array | int, others: Array) -> Array:
    """The keys of the images of other updates [N] of the same epoch, [N]."""
    of_epoch = _epoch_key(schedule, update)

    def key(other: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(of_epoch, other), _IMAGES)

    return jax.vmap(key)(others)


def _epoch_key(schedule: Schedule, update: Array | int) -> Array:
    """The random key of the epoch of an update."""
    key = jax.random.key(schedule.seed[update])
    for number in (schedule.step, schedule.epoch):
        key = jax.random.fold_in(key, number[update])
    return key


def _noise(
    program: Program, schedule: Schedule, update: Array | int
) -> tuple[Array, Array] | None:
    """Key and deviation of the noise on the summed gradient of an update."""
    if program.noise is None:
        return None
    deviation = program.noise.deviation(schedule.epoch[update])
    return _key(schedule, update, _GRADIENT_NOISE), deviation


def _no_metrics(updates: int, state: TrainState) -> dict[str, Array]:
    names = ("loss", "correct", "images", "alpha")
    return {name: jnp.zeros((updates,), state.alpha.dtype) for name in names}
