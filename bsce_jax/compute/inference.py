"""The pure functions of inference that get compiled: evaluation and features."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bsce_jax.compute.state import (
    Array,
    Batch,
    Images,
    Network,
    Outputs,
    Rows,
    StepContext,
)
from bsce_jax.compute.steps import Program, applier, fetch, scores
from bsce_jax.compute.views import viewed


def make_evaluate(program: Program) -> Callable:
    """Returns evaluate(network, context, data, rows, axis_name).

    It gives, for [1, B] rows, whether there is an image (float32 [1, B], the rows'
    `valid`), the predicted class (int32 [1, B]; see `scores`), whether the label is
    among the five highest scores (bool [1, B]) and the features (float32 [1, B, D]), at
    the highest matmul precision like all features.
    """

    def evaluate(
        network: Network,
        context: StepContext,
        data: Images | None,
        rows: Rows,
        axis_name: str | None = None,
    ) -> tuple[Array, Array, Array, Array]:
        batch = fetch(program, data, rows, 0, None, axis_name)
        out = outputs_of(program, network, batch, context)
        found = scores(out, context.seen)
        of_label = jnp.take_along_axis(found, batch.labels[:, None], axis=1)
        higher = jnp.sum(found > of_label, axis=1)
        predicted = jnp.argmax(found, axis=1).astype(jnp.int32)
        features = out["features"].astype(jnp.float32)
        return rows.valid, predicted[None], (higher < 5)[None], features[None]

    return evaluate


def make_features(program: Program) -> Callable:
    """Returns features(network, context, data, view, rows, axis_name).

    The rows' `valid` [1, B], and float32 features [1, B, D] of the test transform, of
    the view that `view` ([] int32) numbers in VIEWS. Only square images are rotated.
    """

    def features(
        network: Network,
        context: StepContext,
        data: Images | None,
        view: Array,
        rows: Rows,
        axis_name: str | None = None,
    ) -> tuple[Array, Array]:
        batch = fetch(program, data, rows, 0, None, axis_name)
        batch = batch.replace(images=viewed(batch.images, view))
        out = outputs_of(program, network, batch, context)
        return rows.valid, out["features"][None].astype(jnp.float32)

    return features


def outputs_of(
    program: Program, network: Network, batch: Batch, context: StepContext
) -> Outputs:
    """Outputs in evaluation mode, at the highest matmul precision.

    What exemplars are selected from, and what is predicted, must not depend on TF32.
    """
    with jax.default_matmul_precision("highest"):
        apply = applier(program, False, batch.axis_name)
        out, _ = program.forward(apply, network, batch, context)
    return out
