"""Residual networks of basic blocks (He et al. 2016), NHWC, PyTorch conventions."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bsce_jax.models import heads
from bsce_jax.models.batch_norm import BatchNorm
from bsce_jax.models.convolution import Convolution

STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
SHORTCUTS = ("A", "B")
STEMS = ("7x7", "3x3")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Attributes:
      features: output channels.
      stride: of the first convolution and of the shortcut.
      shortcut: where the shape changes, "A" subsamples and appends zero channels, "B"
        is a strided 1x1 convolution with batch normalisation.
      relu: end with a ReLU.
      zero_init: start with a second normalisation of scale 0: only the shortcut counts.
      chunks: see `convolution.convolve`.
      dtype: compute type.
      kernel_scales: see `convolution.Convolution`, scaled.
    """

    features: int
    stride: int = 1
    shortcut: str = "B"
    relu: bool = True
    zero_init: bool = False
    chunks: int = 1
    dtype: jnp.dtype = jnp.float32
    kernel_scales: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, **batch_norm: Any) -> jax.Array:
        """[batch, height, width, channels] -> [batch, height', width', features].

        Args:
          x: input.
          **batch_norm: `train`, `valid` and `axis_name` of `BatchNorm`.
        """

        def convolve(
            x: jax.Array, size: int, stride: int, name: str, zero_init: bool = False
        ) -> jax.Array:
            conv = Convolution(
                self.features,
                size,
                stride,
                self.chunks,
                self.dtype,
                self.kernel_scales,
                name=name,
            )
            norm = BatchNorm(zero_init=zero_init, dtype=self.dtype, name=f"{name}_norm")
            return norm(conv(x), **batch_norm)

        y = nn.relu(convolve(x, 3, self.stride, "conv1"))
        y = convolve(y, 3, 1, "conv2", self.zero_init)
        if self.stride != 1 or x.shape[-1] != self.features:
            if self.shortcut == "A":
                x = _subsample(x, self.stride, self.features)
            else:
                x = convolve(x, 1, self.stride, "shortcut")
        y = y + x
        return nn.relu(y) if self.relu else y


class ResNet(nn.Module):
    """Stem, stages of basic blocks, global average pooling, head.

    Attributes:
      num_classes: length of the class axis.
      blocks: number of blocks of each stage.
      widths: channels of each stage; a stage that changes them halves the image.
      stem_size: window of the first convolution.
      stem_stride: stride of the first convolution.
      max_pool: follow the stem by a 3x3 maximum with stride 2.
      shortcut: see `BasicBlock`.
      relu: blocks that end with a ReLU: "all", "not_last" (all but the very last: then
        features can be negative), "first_of_stage" or "none".
      zero_init: see `BasicBlock`.
      head: name of the head, see `heads.create`.
      proxies: likewise.
      auxiliary: outputs of an auxiliary branch, two more blocks and a cosine head on
        the last map (SPB-I, Wu et al. 2021: its four rotations); 0 = none.
      dtype: compute type of the backbone; the head is at least float32.
      conv_chunks: see `convolution.convolve`.
      kernel_scales: see `convolution.Convolution`, scaled; not of the auxiliary branch.
    """

    num_classes: int
    blocks: Sequence[int]
    widths: Sequence[int]
    stem_size: int = 3
    stem_stride: int = 1
    max_pool: bool = False
    shortcut: str = "B"
    relu: str = "all"
    zero_init: bool = False
    head: str = "linear"
    proxies: int = 10
    auxiliary: int = 0
    dtype: jnp.dtype = jnp.float32
    conv_chunks: int = 1
    kernel_scales: bool = False

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        train: bool,
        valid: jax.Array | None = None,
        axis_name: str | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Logits of a batch of images, and what the losses of the methods look at.

        Args:
          images: [batch, height, width, channels], floating point.
          train: normalise by the batch's statistics and, where the collection
            `batch_stats` is mutable, update the running ones; else use the latter.
          valid: mask [batch], 0 for padding rows; None is all 1. Only the statistics
            need it: padding rows get logits like any others.
          axis_name: the pmap axis the batch is split over, or None.

        Returns:
          logits [batch, classes] float32 and a dict with "features" [batch, features]
          float32 (the head's input), "maps", the outputs of the stages, each
          [batch, height', width', channels'] of the compute type, what the head adds,
          and "rotations" [batch, auxiliary], the logits of the auxiliary branch.
        """
        batch_norm: dict[str, Any] = {
            "train": train,
            "valid": valid,
            "axis_name": axis_name,
        }
        x = Convolution(
            self.widths[0],
            self.stem_size,
            self.stem_stride,
            self.conv_chunks,
            self.dtype,
            self.kernel_scales,
            name="stem",
        )(images)
        x = nn.relu(BatchNorm(dtype=self.dtype, name="stem_norm")(x, **batch_norm))
        if self.max_pool:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        maps = []
        for stage, width in enumerate(self.widths):
            for block in range(self.blocks[stage]):
                x = BasicBlock(
                    width,
                    stride=1 if x.shape[-1] == width else 2,
                    shortcut=self.shortcut,
                    relu=self._ends_with_relu(stage, block),
                    zero_init=self.zero_init,
                    chunks=self.conv_chunks,
                    dtype=self.dtype,
                    kernel_scales=self.kernel_scales,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x, **batch_norm)
            maps.append(x)
        features = self._pooled(x)
        logits, out = heads.create(self.head, self.num_classes, self.proxies)(features)
        if self.auxiliary:
            out["rotations"] = self._auxiliary(x, batch_norm)
        return logits, {"features": features, "maps": maps} | out

    def _auxiliary(self, x: jax.Array, batch_norm: dict[str, Any]) -> jax.Array:
        """Logits of the auxiliary branch, [batch, auxiliary], from the last map."""
        for block in (1, 2):
            x = BasicBlock(
                x.shape[-1],
                chunks=self.conv_chunks,
                dtype=self.dtype,
                name=f"auxiliary_block{block}",
            )(x, **batch_norm)
        branch = heads.CosineHead(self.auxiliary, name="auxiliary_head")
        return branch(self._pooled(x))[0]

    def _pooled(self, x: jax.Array) -> jax.Array:
        """Mean over the positions of a map, at least float32: [batch, channels]."""
        return x.astype(jnp.promote_types(self.dtype, jnp.float32)).mean((1, 2))

    def _ends_with_relu(self, stage: int, block: int) -> bool:
        last = stage == len(self.blocks) - 1 and block == self.blocks[-1] - 1
        rules = {
            "all": True,
            "not_last": not last,
            "first_of_stage": block == 0,
            "none": False,
        }
        return rules[self.relu]


def resnet(
    depth: int,
    num_classes: int,
    *,
    width: int = 64,
    stem: str = "7x7",
    **options: Any,
) -> ResNet:
    """ResNet-18 or -34 for large images, as in torchvision.

    Args:
      depth: 18 or 34.
      num_classes: length of the class axis.
      width: channels of the first of the four stages.
      stem: "7x7" with stride 2, or "3x3" with stride 1 (four times the cost); both are
        followed by the maximum pooling.
      **options: other attributes of `ResNet`.
    """
    return ResNet(
        num_classes,
        STAGES[depth],
        tuple(width * 2**stage for stage in range(4)),
        stem_size=7 if stem == "7x7" else 3,
        stem_stride=2 if stem == "7x7" else 1,
        max_pool=True,
        **options,
    )


def _subsample(x: jax.Array, stride: int, features: int) -> jax.Array:
    """Every stride-th pixel, then zero channels: option A of He et al."""
    x = x[:, ::stride, ::stride, :]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))
