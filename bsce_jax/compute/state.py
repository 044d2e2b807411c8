"""What enters compiled code: the training state, the step's context and batches."""

from typing import Any

from flax import struct

PyTree = Any
# jax.Array on the devices, numpy.ndarray before it is placed there.
Array = Any


class TrainState(struct.PyTreeNode):
    """All that training changes, checkpointed as one pytree.

    Attributes:
      params: float32 parameters.
      batch_stats: running mean and variance of every BatchNorm.
      opt_state: of the optimiser of `params`; new (zero momentum) in every step.
      alpha: [] float32, weight of the old classes' counts (Jodelet et al., Eq. 5).
      alpha_opt_state: of the optimiser of alpha.
      extra: what a method adds.
    """

    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    alpha: Array
    alpha_opt_state: PyTree
    extra: PyTree


class StepContext(struct.PyTreeNode):
    """What is constant within an incremental step: new values, never a new program.

    Attributes:
      log_prior: [C] float32, without alpha; EXCLUDED where a class is not seen.
      old: [C] bool, learned in an earlier step.
      seen: [C] bool, old or learned in this step.
      counts: [C] float32, training images of each class in this step.
      task_ids: [C] int32, the step that introduces each class.
      weights: term name -> [] float32.
      update_scale: like params, broadcastable leaves: 0 freezes, 1 trains.
      teachers: tuple of {"params", "batch_stats"}, networks of earlier steps.
    """

    log_prior: Array
    old: Array
    seen: Array
    counts: Array
    task_ids: Array
    weights: dict[str, Array]
    update_scale: PyTree
    teachers: tuple[PyTree, ...]


class Batch(struct.PyTreeNode):
    """One batch on the devices.

    Attributes:
      images: [B, H, W, channels] float, augmented and normalised.
      labels: [B] int32, positions in the class order.
      valid: [B] float32, 0 for rows that only fill the batch.
    """

    images: Array
    labels: Array
    valid: Array


class Images(struct.PyTreeNode):
    """Images on the devices: uint8 [N, H, W, channels], and int32 labels [N]."""

    images: Array
    labels: Array


class Rows(struct.PyTreeNode):
    """Rows of consecutive batches of a plan, each [U, B]; U updates in one call.

    Attributes:
      indices: int32 into Images.
      valid: float32, 0 for rows that only fill the batch.
      numbers: int32, row number in the global batch (for its random key).
      images: uint8 [U, B, H, W, channels] where they are streamed and there are no
        Images, else None.
      labels: int32, with `images`.
    """

    indices: Array
    valid: Array
    numbers: Array
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
