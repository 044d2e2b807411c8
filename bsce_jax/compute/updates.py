"""Consecutive updates as one compiled function: batches, random keys, the loop."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bsce_jax.compute.state import (
    Array,
    Images,
    Rows,
    Schedule,
    StepContext,
    TrainState,
)
from bsce_jax.compute.steps import Program, fetch, meta_step, train_step

TRAIN, HELD_OUT = "train", "held_out"
"""Streams of images of a phase: D_t, and the balanced B_t that alpha is learned on."""

_Outcome = tuple[TrainState, dict[str, Array]]
_Streams = Mapping[str, Rows]


def make_train_update(program: Program) -> Callable:
    """Returns update(state, context, data, count, schedule, streams, axis_name).

    It runs `count` consecutive updates of a plan of U on the stream TRAIN, and returns
    the state and metrics [U]. For U = 1 there is no loop: XLA:CPU runs the backward
    pass of a convolution inside a loop some 19 times slower.
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
        rows = streams[TRAIN]

        def one(u: Array | int, carry: _Outcome) -> _Outcome:
            state, metrics = carry
            key = _key(schedule, u, 0)
            batch = fetch(program, data, rows, u, key, axis_name)
            rate, noise = schedule.learning_rate[u], _noise(program, schedule, u)
            state, new = train_step(program, state, context, batch, rate, noise)
            new["alpha"] = state.alpha
            return state, {
                k: metrics[k].at[u].set(new[k].astype(metrics[k].dtype))
                for k in metrics
            }

        carry = (state, _no_metrics(len(rows.indices), state))
        if len(rows.indices) == 1:
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
        rows, held_out = streams[TRAIN], streams[HELD_OUT]

        def alpha_update(state: TrainState, group: Array | int) -> TrainState:
            u = group * meta.every
            key, held_out_key = _key(schedule, u, 0), _key(schedule, u, 1)
            batch = fetch(program, data, rows, u, key, axis_name)
            balanced = fetch(program, data, held_out, group, held_out_key, axis_name)
            rate = schedule.learning_rate[u]
            return meta_step(program, state, context, batch, balanced, rate)

        if len(rows.indices) == 1:
            state = alpha_update(state, 0)
            return train_update(
                state, context, data, count, schedule, streams, axis_name
            )

        def one(u: Array, carry: _Outcome) -> _Outcome:
            state, metrics = carry
            at = lambda tree: jax.tree.map(lambda leaf: leaf[u][None], tree)  # noqa: E731
            only = {TRAIN: at(rows)}
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
        carry = (state, _no_metrics(len(rows.indices), state))
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


def _key(schedule: Schedule, update: Array | int, purpose: int) -> Array:
    """The random key of one update and purpose."""
    key = jax.random.key(schedule.seed[update])
    for number in (schedule.step, schedule.epoch, schedule.update):
        key = jax.random.fold_in(key, number[update])
    return jax.random.fold_in(key, purpose)


def _noise(
    program: Program, schedule: Schedule, update: Array | int
) -> tuple[Array, Array] | None:
    """Key and deviation of the noise on the summed gradient of an update."""
    if program.noise is None:
        return None
    deviation = program.noise.deviation(schedule.epoch[update])
    return _key(schedule, update, 2), deviation


def _no_metrics(updates: int, state: TrainState) -> dict[str, Array]:
    names = ("loss", "correct", "images", "alpha")
    return {name: jnp.zeros((updates,), state.alpha.dtype) for name in names}
