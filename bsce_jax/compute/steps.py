"""The pure functions of training that get compiled: an update, and one of alpha."""

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
    COMPANIONS,
    OWN,
    Apply,
    Array,
    Batch,
    Forward,
    Images,
    Network,
    Outputs,
    PyTree,
    Rows,
    StepContext,
    TrainState,
    total_over_devices,
)
from bsce_jax.errors import UserError
from bsce_jax.losses.softmax_ce import softmax_cross_entropy


def plain(
    apply: Apply, network: Network, batch: Batch, context: StepContext
) -> tuple[Outputs, Network]:
    """The network alone: one pass over the batch."""
    return apply(network, batch.images, batch.valid)


@dataclasses.dataclass(frozen=True)
class Term:
    """A loss term: its name, function (see bsce_jax.losses) and options."""

    name: str
    function: Callable[..., tuple[Array, Array]]
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Meta:
    """The alpha update (Jodelet et al., Algorithm 1): META in config/sections.py."""

    optimizer: optax.GradientTransformation
    every: int
    inner_learning_rate: float
    minimum: float
    maximum: float
    batch_norm: str
    logarithmic: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything static of the compiled functions of a phase.

    Attributes:
      model: the network.
      terms: of the loss.
      optimizer: of the parameters.
      train_images, test_images: transforms of uint8 images; a phase without
        augmentation has the latter in the place of both.
      forward: how a batch becomes outputs; the teacher's do likewise.
      meta: how alpha is learned, if it is.
      frozen: groups of parameters (see `optim.group`) without a gradient.
      batch_norm: "train", batch statistics move the running ones, or "eval".
      noise: on the gradient, if there is any.
    """

    model: nn.Module
    terms: tuple[Term, ...]
    optimizer: optax.GradientTransformationExtraArgs
    train_images: Callable[..., Array]
    test_images: Callable[..., Array]
    forward: Forward = plain
    meta: Meta | None = None
    frozen: frozenset[str] = frozenset()
    batch_norm: str = "train"
    noise: optim.Noise | None = None


def _share(values: Array, weights: Array, axis_name: str | None) -> Array:
    """This device's share of the global weighted mean; 0 where all weights are 0."""
    total = total_over_devices(jnp.sum(weights), axis_name)
    return jnp.sum(values * weights) / jnp.where(total > 0, total, 1.0)


def applier(program: Program, train: bool, axis_name: str | None) -> Apply:
    """The model as a function of a network, in training or in evaluation mode.

    Args:
      program: of the phase.
      train: whether batch statistics are used, and move the running ones.
      axis_name: of the pmapped axis, or None.
    """

    def apply(network: Network, images: Array, valid: Array) -> tuple[Outputs, Network]:
        params = {k: part for k, part in network.params.items() if k != OWN}
        variables = {"params": params, "batch_stats": network.batch_stats}
        if not train:
            logits, out = program.model.apply(variables, images, train=False)
            return {**out, "logits": logits}, network
        (logits, out), changed = program.model.apply(
            variables,
            images,
            train=True,
            valid=valid,
            axis_name=axis_name,
            mutable=["batch_stats"],
        )
        moved = network.replace(batch_stats=changed["batch_stats"])
        return {**out, "logits": logits}, moved

    return apply


def scores(outputs: Outputs, seen: Array) -> Array:
    """The prediction rule: the class with the highest score is predicted.

    Args:
      outputs: of a forward pass: "scores" [B, C] where a method has its own, or else
        "logits".
      seen: [C] bool, the classes that may be predicted.

    Returns:
      [B, C], EXCLUDED (next to nothing) for classes that are not seen.
    """
    found = outputs["scores"] if "scores" in outputs else outputs["logits"]
    return found + log_prior.uniform(seen)[None, :]


def _teacher_outputs(
    program: Program, context: StepContext, batch: Batch
) -> Outputs | None:
    """The teacher's outputs, in evaluation mode, without gradient.

    It sees the memory's images too; companions are the student's alone.
    """
    if context.teacher is None:
        return None
    beside = {k: part for k, part in batch.beside.items() if k != COMPANIONS}
    batch = batch.replace(beside=beside)
    apply = applier(program, False, batch.axis_name)
    out, _ = program.forward(apply, context.teacher, batch, context)
    return jax.lax.stop_gradient(out)


def _without_gradient(params: PyTree, frozen: frozenset[str]) -> PyTree:
    """Parameters of which some groups are constants.

    Also spares the backward pass of all that stands before the others.
    """
    if not frozen:
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jax.lax.stop_gradient(leaf) if optim.group(path) in frozen else leaf
        ),
        params,
    )


def _loss(
    program: Program,
    state: TrainState,
    context: StepContext,
    batch: Batch,
    teacher: Outputs | None,
) -> tuple[Array, tuple[Network, Outputs]]:
    """This device's share of the loss; the moved network and the outputs beside it."""
    params = _without_gradient(state.network.params, program.frozen)
    apply = applier(program, program.batch_norm == "train", batch.axis_name)
    student, network = program.forward(
        apply, state.network.replace(params=params), batch, context
    )
    prior = log_prior.with_alpha(context.log_prior, context.old, state.alpha)
    context = context.replace(log_prior=prior)
    loss = jnp.zeros((), jnp.float32)
    for term in program.terms:
        values, weights = _values(term, student, teacher, batch, context)
        share = _share(values, weights, batch.axis_name)
        loss += context.weights[term.name] * share
    return loss, (network, student)


def _values(
    term: Term,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    context: StepContext,
) -> tuple[Array, Array]:
    """What a term gives; one of somebody's own is told what is wrong with it.

    Raises:
      UserError: names the term, and the output that it misses or both shapes.
    """
    where = f"config.terms.{term.name}"
    try:
        values, weights = term.function(
            student, teacher, batch, context, **term.options
        )
    except KeyError as error:
        missing = error.args[0] if error.args else None
        found = student if missing not in student else teacher or student
        if missing in found:
            raise  # a mistake of another kind
        known = ", ".join(sorted(found))
        raise UserError(
            f"{where} needs the output {missing!r}, but there are only {known}"
        ) from error
    if values.shape != weights.shape:
        raise UserError(
            f"{where} gives values of shape {values.shape} and weights of shape "
            f"{weights.shape}: expected both alike, one of each an image"
        )
    return values, weights


def abstract_loss(
    program: Program, network: Network, context: StepContext, batch: Batch
) -> jax.ShapeDtypeStruct:
    """The shape of the loss of a batch, of shapes; runs and compiles nothing.

    Raises:
      UserError: a term does not go together with the outputs.
    """

    def loss(network: Network, context: StepContext, batch: Batch) -> Array:
        state = TrainState(network, None, jnp.ones(()), None)
        teacher = _teacher_outputs(program, context, batch)
        return _loss(program, state, context, batch, teacher)[0]

    return jax.eval_shape(loss, network, context, batch)


def _with_params(state: TrainState, params: PyTree) -> TrainState:
    return state.replace(network=state.network.replace(params=params))


def train_step(
    program: Program,
    state: TrainState,
    context: StepContext,
    batch: Batch,
    learning_rate: Array,
    noise: tuple[Array, Array] | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One update of the network on one batch.

    Args:
      program: the static part.
      state: training state.
      context: the constants of the step's phase.
      batch: with an axis name this device's rows, else the global batch.
      learning_rate: [] float32.
      noise: random key and standard deviation, [], of noise on the summed gradient.

    Returns:
      The new state, and the global "loss", "correct" and "images" ([] float32).
    """
    teacher = _teacher_outputs(program, context, batch)
    params = state.network.params

    def loss(params: PyTree) -> tuple[Array, tuple[PyTree, PyTree, Array]]:
        value, (network, student) = _loss(
            program, _with_params(state, params), context, batch, teacher
        )
        predicted = jnp.argmax(scores(student, context.seen), axis=-1)
        return value, (network.batch_stats, network.extra, predicted)

    (value, (batch_stats, extra, predicted)), gradient = jax.value_and_grad(
        loss, has_aux=True
    )(params)
    gradient = total_over_devices(gradient, batch.axis_name)
    images = total_over_devices(jnp.sum(batch.valid), batch.axis_name)
    if noise is not None:
        key, deviation = noise
        gradient = optim.noise(key, gradient, deviation / jnp.maximum(images, 1))
    direction, opt_state = program.optimizer.update(
        gradient, state.opt_state, params, decay=context.decay
    )
    params = optim.apply(params, direction, learning_rate, context.update_scale)
    sums = {
        "loss": value,
        "correct": jnp.sum(batch.valid * (predicted == batch.labels)),
        "images": jnp.sum(batch.valid),
    }
    network = Network(params, batch_stats, extra)
    state = state.replace(network=network, opt_state=opt_state)
    return state, total_over_devices(sums, batch.axis_name)


def meta_step(
    program: Program,
    state: TrainState,
    context: StepContext,
    batch: Batch,
    held_out: Batch,
    learning_rate: Array,
) -> TrainState:
    """One update of alpha (Jodelet et al., Algorithm 1); the network stays.

    alpha <- alpha - lr_alpha d/dalpha CE(Z(theta*), Y) on a batch of B_t, with
    theta* = theta - lr dL(theta, alpha)/dtheta on the training batch, where frozen
    parameters stay. What moves besides, the running statistics, is discarded.

    Args:
      program: with `meta`.
      state: training state.
      context: the constants of the step's phase.
      batch: training batch, from D_t.
      held_out: batch of the balanced B_t.
      learning_rate: [] float32, of the inner step unless program.meta fixes one.
    """
    meta = program.meta
    assert meta is not None
    teacher = _teacher_outputs(program, context, batch)
    seen = log_prior.uniform(context.seen)

    def train_loss(params: PyTree, alpha: Array) -> Array:
        moved = _with_params(state, params).replace(alpha=alpha)
        return _loss(program, moved, context, batch, teacher)[0]

    def validation_loss(params: PyTree) -> Array:
        apply = applier(program, meta.batch_norm == "train", held_out.axis_name)
        network = state.network.replace(params=params)
        out, _ = program.forward(apply, network, held_out, context)
        values = softmax_cross_entropy(out["logits"], held_out.labels, seen)
        return _share(values, held_out.valid, held_out.axis_name)

    gradient = meta_alpha.gradient(
        train_loss,
        validation_loss,
        state.network.params,
        state.alpha,
        meta.inner_learning_rate or learning_rate,
        axis_name=batch.axis_name,
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
    axis_name: str | None = None,
) -> Batch:
    """The batch of one update; augmented where a random key is given.

    Gathered from `data`, or without it the rows' own images. The key is the update's,
    or one for each image.
    """
    numbers, valid = rows.numbers[update].ravel(), rows.valid[update].ravel()
    if data is None:
        assert rows.images is not None and rows.labels is not None
        shape = rows.images.shape[-3:]
        images, labels = rows.images[update].reshape(-1, *shape), rows.labels[update]
        labels = labels.ravel()
    else:
        indices = rows.indices[update].ravel()
        images, labels = data.images[indices], data.labels[indices]
    if key is None:
        images = program.test_images(images)
    else:
        images = program.train_images(images, key, numbers)
    return Batch(images, labels, valid, axis_name)
