"""What enters compiled code: the network, the step's context and batches."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

PyTree = Any
# jax.Array on the devices, numpy.ndarray before it is placed there.
Array = Any

OWN = "own"
"""Name, among the top-level names of `Network.params`, of a method's own parameters."""


class Network(struct.PyTreeNode):
    """A network: the student, the teacher, and what is evaluated, saved or loaded.

    Attributes:
      params: float32 parameters of the model, and under "own" what a method trains
        beside it.
      batch_stats: running mean and variance of every BatchNorm.
      extra: what a method keeps besides: a dict of arrays, whose shapes are fixed from
        the start; {} for most.
    """

    params: PyTree
    batch_stats: PyTree
    extra: PyTree


class TrainState(struct.PyTreeNode):
    """All that training changes, checkpointed as one pytree.

    Attributes:
      network: in training.
      opt_state: of the optimiser of its parameters.
      alpha: [] float32, weight of the old classes' counts (Jodelet et al., Eq. 5).
      alpha_opt_state: of the optimiser of alpha.
    """

    network: Network
    opt_state: PyTree
    alpha: Array
    alpha_opt_state: PyTree


class StepContext(struct.PyTreeNode):
    """What is constant within a phase of a step: new values, never a new program.

    Attributes:
      log_prior: [C] float32, without alpha; EXCLUDED where a class is not seen.
      old: [C] bool, learned in an earlier step.
      seen: [C] bool, old or learned in this step.
      taught: [C] bool, classes that the teacher knows: `old`, or `seen` where it is
        the network of this step.
      counts: [C] float32, training images of each class in this phase.
      task_ids: [C] int32, the step that introduces each class.
      weights: term name -> [] float32.
      update_scale: like params, broadcastable leaves: the factor of each
        learning rate; 0 freezes.
      teacher: an earlier network, or None.
      decay: [] float32, factor of the weight decay.
    """

    log_prior: Array
    old: Array
    seen: Array
    taught: Array
    counts: Array
    task_ids: Array
    weights: dict[str, Array]
    update_scale: PyTree
    teacher: Network | None
    decay: Array = 1.0


TRAIN, HELD_OUT, MEMORY, COMPANIONS = "train", "held_out", "memory", "companions"
"""Streams of images: a phase's own; alpha's; and the two that may go beside its own,
exemplars of the old classes, and images that go with each image of the batch."""


class Batch(struct.PyTreeNode):
    """One batch on the devices; under pmap this device's rows of it.

    Attributes:
      images: [B, H, W, channels] float, augmented and normalised.
      labels: [B] int32, positions in the class order.
      valid: [B] float32, 0 for rows that only fill the batch.
      axis_name: static, name of the pmapped axis, or None.
      beside: the batch of another stream, by its name: of MEMORY, or of COMPANIONS,
        [B * K, ...], where the K of a row stand together.
    """

    images: Array
    labels: Array
    valid: Array
    axis_name: str | None = struct.field(pytree_node=False, default=None)
    beside: Mapping[str, "Batch"] = struct.field(default_factory=dict)

    def mean(self, values: Array) -> Array:
        """Mean over the valid rows of all devices, [B, ...] -> [...]."""
        weights = self.valid.reshape(self.valid.shape + (1,) * (values.ndim - 1))
        total = total_over_devices(jnp.sum(values * weights, axis=0), self.axis_name)
        count = total_over_devices(jnp.sum(self.valid), self.axis_name)
        return total / jnp.maximum(count, 1)

    def whole(self, values: Array) -> Array:
        """Rows of all devices, in the order of the batch: [B, ...] -> [B of all, ...].

        A term of the whole batch gives ``value[None]`` with a weight of 1 on every
        device; rows that only fill the batch have 0 in ``whole(valid)``.
        """
        if self.axis_name is None:
            return values
        return jax.lax.all_gather(values, self.axis_name, tiled=True)


Outputs = dict[str, Any]
"""What a forward pass gives: "logits" [B, C], "features" [B, D] and others by name."""
Apply = Callable[[Network, Array, Array], tuple[Outputs, Network]]
"""``(network, images, valid) -> (outputs, network)``: one pass of the model.

The outputs are those of the model and "logits"; the network that comes back has the new
running statistics, or is the same one in evaluation mode.
"""
Forward = Callable[[Apply, Network, Batch, StepContext], tuple[Outputs, Network]]
"""How a batch becomes outputs, see `bsce_jax.methods`."""


def total_over_devices(value: PyTree, axis_name: str | None) -> PyTree:
    """Sum over the devices of a pmapped axis; `value` itself without one."""
    return value if axis_name is None else jax.lax.psum(value, axis_name)


class Images(struct.PyTreeNode):
    """Images on the devices: uint8 [N, H, W, channels], and int32 labels [N]."""

    images: Array
    labels: Array


class Rows(struct.PyTreeNode):
    """Rows of consecutive batches of a plan, each [U, B]; U updates in one call.

    Those of companions are [U, B, K]: the K that go with a row stay on its device.

    Attributes:
      indices: int32 into Images.
      valid: float32, 0 for rows that only fill the batch.
      numbers: int32, row number in the global batch (for its random key).
      updates: int32, the update of its epoch whose key an image has, where that is not
        the update itself, else None.
      images: uint8 [U, B, H, W, channels] where they are streamed and there are no
        Images, else None.
      labels: int32, with `images`.
    """

    indices: Array
    valid: Array
    numbers: Array
    updates: Array | None = None
    images: Array | None = None
    labels: Array | None = None


class Schedule(struct.PyTreeNode):
    """What changes from update to update, [U] each, replicated.

    Attributes:
      seed, step, epoch, update: int32, folded into the update's random key.
      learning_rate: float32.
    """

    seed: Array
    step: Array
    epoch: Array
    update: Array
    learning_rate: Array
