"""The CIFAR family of residual networks: 6n + 2 layers (He et al. 2016, 4.2)."""

from typing import Any

from bsce_jax.models.resnet import ResNet


def is_depth(depth: int) -> bool:
    """Whether the family has a network of this many layers: 8, 14, 20, 26, 32, ..."""
    return depth >= 8 and depth % 6 == 2


def resnet_cifar(
    depth: int, num_classes: int, *, width: int = 16, **options: Any
) -> ResNet:
    """Three stages of (depth - 2) / 6 blocks after a 3x3 convolution with stride 1.

    Args:
      depth: number of layers, 6n + 2; ResNet-32 for CIFAR-100.
      num_classes: length of the class axis.
      width: channels of the first stage; the others have 2 and 4 times as many.
      **options: other attributes of `ResNet`.
    """
    widths = (width, 2 * width, 4 * width)
    return ResNet(num_classes, ((depth - 2) // 6,) * 3, widths, **options)
