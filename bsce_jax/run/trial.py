"""Whether the losses of the incremental steps can be computed, before any training."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from bsce_jax.compute import steps
from bsce_jax.compute.state import COMPANIONS, MEMORY, Batch
from bsce_jax.run.context import has_teacher, phase_context
from bsce_jax.run.dataset import Dataset
from bsce_jax.run.loop import make_training
from bsce_jax.run.phases import StepData
from bsce_jax.run.programs import network_shapes, phase_program


def check_losses(
    config: ConfigDict, dataset: Dataset, model: nn.Module, planned: Sequence[StepData]
) -> None:
    """Follows the shapes through each phase's loss, so that no run fails there late.

    The base step's are left out: its training begins at once.

    Args:
      config: resolved configuration.
      dataset: the whole data set.
      model: the network.
      planned: see `phases.planned`.

    Raises:
      UserError: a term does not go together with what network and method give.
    """
    network = network_shapes(config, model, dataset.image_shape)
    last = {data.phase.name: data for data in planned if data.step}
    for name, data in last.items():
        program = phase_program(config, model, name)
        context = phase_context(config, dataset, data, network)
        if has_teacher(data):
            context = context.replace(teacher=network)
        batch = _batch(config, data, dataset.image_shape)
        steps.abstract_loss(program, network, context, batch)


def _batch(config: ConfigDict, data: StepData, shape: tuple[int, ...]) -> Batch:
    """The shapes of a phase's batch, and of what goes beside it."""
    dtype = jnp.dtype(config.model.dtype)

    def of(count: int) -> Batch:
        return Batch(
            images=jax.ShapeDtypeStruct((count, *shape), dtype),
            labels=jax.ShapeDtypeStruct((count,), jnp.int32),
            valid=jax.ShapeDtypeStruct((count,), jnp.float32),
        )

    size, beside = make_training(config, data).training_batches.size, {}
    if len(data.memory):
        beside[MEMORY] = of(data.phase.beside_size)
    if data.phase.beside == "companions":
        beside[COMPANIONS] = of(size * data.phase.beside_size)
    return of(size).replace(beside=beside)
