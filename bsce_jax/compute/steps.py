"""The pure functions that get compiled: training, meta, evaluation and features."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from bsce_jax import log_prior, meta_alpha
from bsce_jax.compute import optim
from bsce_jax.compute.state import (
    Array,
    Batch,
    Images,
    PyTree,
    Rows,
    StepContext,
    TrainState,
)
from bsce_jax.losses.softmax_ce import softmax_cross_entropy

Outputs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Term:
    """A loss term: its name, function (see bsce_jax.losses) and options."""

    name: str
    function: Callable[..., tuple[Array, Array]]
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Meta:
    """The alpha update (Jodelet et al., Algorithm 1): see defaults.py, `meta`."""

    optimizer: optax.GradientTransformation
    every: int
    inner_learning_rate: float
    minimum: float
    maximum: float
    batch_norm: str
    logarithmic: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything static of the compiled functions.

    Attributes:
      model: the network.
      terms: of the loss.
      optimizer: of the parameters.
      train_images, test_images: transforms of uint8 images.
      meta: how alpha is learned, if it is.
      trainable: top-level names of the parameters with a gradient; () = all.
      batch_norm: "train", batch statistics move the running ones, or "eval".
    """

    model: nn.Module
    terms: tuple[Term, ...]
    optimizer: optax.GradientTransformation
    train_images: Callable[..., Array]
    test_images: Callable[..., Array]
    meta: Meta | None = None
    trainable: tuple[str, ...] = ()
    batch_norm: str = "train"


def _total(value: PyTree, axis_name: str | None) -> PyTree:
    """Sum over the devices."""
    return value if axis_name is None else jax.lax.psum(value, axis_name)


def _share(values: Array, weights: Array, axis_name: str | None) -> Array:
    """This device's share of the global weighted mean; 0 where all weights are 0."""
    total = _total(jnp.sum(weights), axis_name)
    return jnp.sum(values * weights) / jnp.where(total > 0, total, 1.0)


def _forward(
    model: nn.Module,
    params: PyTree,
    batch_stats: PyTree,
    batch: Batch,
    train: bool,
    axis_name: str | None,
) -> tuple[Outputs, PyTree]:
    """Outputs with "logits", and the new running statistics (train) or the old."""
    variables = {"params": params, "batch_stats": batch_stats}
    if not train:
        logits, out = model.apply(variables, batch.images, train=False)
        return {**out, "logits": logits}, batch_stats
    (logits, out), changed = model.apply(
        variables,
        batch.images,
        train=True,
        valid=batch.valid,
        axis_name=axis_name,
        mutable=["batch_stats"],
    )
    return {**out, "logits": logits}, changed["batch_stats"]


def _teacher_outputs(
    program: Program, context: StepContext, batch: Batch
) -> Outputs | None:
    """The newest teacher's outputs, in evaluation mode, without gradient."""
    if not context.teachers:
        return None
    teacher = context.teachers[-1]
    out, _ = _forward(
        program.model, teacher["params"], teacher["batch_stats"], batch, False, None
    )
    return jax.lax.stop_gradient(out)


def _loss(
    program: Program,
    params: PyTree,
    batch_stats: PyTree,
    alpha: Array,
    context: StepContext,
    batch: Batch,
    teacher: Outputs | None,
    axis_name: str | None,
) -> tuple[Array, tuple[PyTree, Array]]:
    """This device's share of the loss; the statistics and logits beside it."""
    if program.trainable:
        # Also spares the backward pass of all that stands before them.
        params = {
            name: part if name in program.trainable else jax.lax.stop_gradient(part)
            for name, part in params.items()
        }
    train = program.batch_norm == "train"
    student, batch_stats = _forward(
        program.model, params, batch_stats, batch, train, axis_name
    )
    prior = log_prior.with_alpha(context.log_prior, context.old, alpha)
    context = context.replace(log_prior=prior)
    loss = jnp.zeros((), jnp.float32)
    for term in program.terms:
        values, weights = term.function(
            student, teacher, batch, context, **term.options
        )
        loss += context.weights[term.name] * _share(values, weights, axis_name)
    return loss, (batch_stats, student["logits"])


def train_step(
    program: Program,
    state: TrainState,
    context: StepContext,
    batch: Batch,
    learning_rate: Array,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One update of the network on one batch.

    Args:
      program: the static part.
      state: training state.
      context: the incremental step's constants.
      batch: with an axis name this device's rows, else the global batch.
      learning_rate: [] float32.
      axis_name: name of the pmapped axis, or None.

    Returns:
      The new state, and the global "loss", "correct" and "images" ([] float32).
    """
    teacher = _teacher_outputs(program, context, batch)

    def loss(params: PyTree) -> tuple[Array, tuple[PyTree, Array]]:
        return _loss(
            program,
            params,
            state.batch_stats,
            state.alpha,
            context,
            batch,
            teacher,
            axis_name,
        )

    (value, (batch_stats, logits)), gradient = jax.value_and_grad(loss, has_aux=True)(
        state.params
    )
    gradient = _total(gradient, axis_name)
    direction, opt_state = program.optimizer.update(
        gradient, state.opt_state, state.params
    )
    params = optim.apply(state.params, direction, learning_rate, context.update_scale)
    predicted = jnp.argmax(logits + log_prior.uniform(context.seen)[None, :], axis=-1)
    sums = {
        "loss": value,
        "correct": jnp.sum(batch.valid * (predicted == batch.labels)),
        "images": jnp.sum(batch.valid),
    }
    state = state.replace(params=params, batch_stats=batch_stats, opt_state=opt_state)
    return state, _total(sums, axis_name)


def meta_step(
    program: Program,
    state: TrainState,
    context: StepContext,
    batch: Batch,
    held_out: Batch,
    learning_rate: Array,
    axis_name: str | None = None,
) -> TrainState:
    """One update of alpha (Jodelet et al., Algorithm 1); the network stays.

    alpha <- alpha - lr_alpha d/dalpha CE(Z(theta*), Y) on a batch of B_t, with
    theta* = theta - lr dL(theta, alpha)/dtheta on the training batch, where frozen
    parameters stay. The running statistics of both passes are discarded.

    Args:
      program: with `meta`.
      state: training state.
      context: the incremental step's constants.
      batch: training batch, from D_t.
      held_out: batch of the balanced B_t.
      learning_rate: [] float32, of the inner step unless program.meta fixes one.
      axis_name: name of the pmapped axis, or None.
    """
    meta = program.meta
    assert meta is not None
    teacher = _teacher_outputs(program, context, batch)
    seen = log_prior.uniform(context.seen)

    def train_loss(params: PyTree, alpha: Array) -> Array:
        rest = (context, batch, teacher, axis_name)
        return _loss(program, params, state.batch_stats, alpha, *rest)[0]

    def validation_loss(params: PyTree) -> Array:
        train = meta.batch_norm == "train"
        out, _ = _forward(
            program.model, params, state.batch_stats, held_out, train, axis_name
        )
        values = softmax_cross_entropy(out["logits"], held_out.labels, seen)
        return _share(values, held_out.valid, axis_name)

    gradient = meta_alpha.gradient(
        train_loss,
        validation_loss,
        state.params,
        state.alpha,
        meta.inner_learning_rate or learning_rate,
        axis_name=axis_name,
        scale=context.update_scale,
    )
    alpha, alpha_opt_state = meta_alpha.update(
        state.alpha,
        gradient,
        state.alpha_opt_state,
        meta.optimizer,
        meta.minimum,
        meta.maximum,
        meta.logarithmic,
    )
    return state.replace(alpha=alpha, alpha_opt_state=alpha_opt_state)


def fetch(
    program: Program,
    data: Images | None,
    rows: Rows,
    update: Array | int,
    key: Array | None,
) -> Batch:
    """The batch of one update; augmented where a random key is given.

    Gathered from `data`, or without it the rows' own images.
    """
    if data is None:
        assert rows.images is not None and rows.labels is not None
        images, labels = rows.images[update], rows.labels[update]
    else:
        indices = rows.indices[update]
        images, labels = data.images[indices], data.labels[indices]
    if key is None:
        images = program.test_images(images)
    else:
        images = program.train_images(images, key, rows.numbers[update])
    return Batch(images, labels, rows.valid[update])


def make_evaluate(program: Program) -> Callable:
    """Returns evaluate(params, batch_stats, seen, data, rows, axis_name).

    It gives, for [1, B] rows, whether there is an image (float32 [1, B], the rows'
    `valid`), the class of the highest logit among the seen classes (int32 [1, B]),
    whether the label is among the five highest (bool [1, B]) and the features
    (float32 [1, B, D]), at the highest matmul precision like all features.
    """

    def evaluate(
        params: PyTree,
        batch_stats: PyTree,
        seen: Array,
        data: Images | None,
        rows: Rows,
        axis_name: str | None = None,
    ) -> tuple[Array, Array, Array, Array]:
        batch = fetch(program, data, rows, 0, None)
        out = _test_outputs(program, params, batch_stats, batch, axis_name)
        logits = out["logits"] + log_prior.uniform(seen)[None, :]
        of_label = jnp.take_along_axis(logits, batch.labels[:, None], axis=1)
        higher = jnp.sum(logits > of_label, axis=1)
        predicted = jnp.argmax(logits, axis=1).astype(jnp.int32)
        features = out["features"].astype(jnp.float32)
        return rows.valid, predicted[None], (higher < 5)[None], features[None]

    return evaluate


def make_features(program: Program) -> Callable:
    """Returns features(params, batch_stats, data, flip, rows, axis_name).

    The rows' `valid` [1, B], and float32 features [1, B, D] of the test transform, of
    the mirrored images where `flip` ([] bool) says so.
    """

    def features(
        params: PyTree,
        batch_stats: PyTree,
        data: Images | None,
        flip: Array,
        rows: Rows,
        axis_name: str | None = None,
    ) -> tuple[Array, Array]:
        batch = fetch(program, data, rows, 0, None)
        mirrored = jnp.where(flip, batch.images[:, :, ::-1], batch.images)
        batch = batch.replace(images=mirrored)
        out = _test_outputs(program, params, batch_stats, batch, axis_name)
        return rows.valid, out["features"][None].astype(jnp.float32)

    return features


def _test_outputs(
    program: Program,
    params: PyTree,
    batch_stats: PyTree,
    batch: Batch,
    axis_name: str | None,
) -> Outputs:
    """Outputs in evaluation mode, at the highest matmul precision.

    What exemplars are selected from, and what is predicted, must not depend on TF32.
    """
    with jax.default_matmul_precision("highest"):
        out, _ = _forward(program.model, params, batch_stats, batch, False, axis_name)
    return out
