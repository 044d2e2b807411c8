"""Networks of PODNet (Douillard et al. 2020), as in the authors' code inclearn.

They end their blocks without a ReLU, so that features and maps are signed, and start
with every block's residual branch at 0.
"""

from typing import Any

from bsce_jax.models.resnet import ResNet, resnet


def is_depth(depth: int) -> bool:
    """Whether there is a network of this many layers: 18, and 14, 20, 26, 32, ..."""
    return depth == 18 or (depth >= 14 and depth % 6 == 2)


def podnet(
    depth: int, num_classes: int, *, width: int | None = None, **options: Any
) -> ResNet:
    """ResNet-18 for large images, or 6n + 2 layers for small ones.

    ResNet-18 is that of `resnet.resnet` with the 3x3 stem, and a ReLU at the end of the
    first block of each stage only. The others, "rebuffi" in inclearn, have n, n, n - 1
    and 1 blocks, the last stage without a change of shape, shortcut A and no ReLU at
    the end of any block.

    Args:
      depth: number of layers: 18 (ImageNet), or 6n + 2 with n >= 2 (32 for CIFAR-100).
      num_classes: length of the class axis.
      width: channels of the first stage; None is the published 64 and 16.
      **options: attributes of `ResNet` that have nothing to do with its structure.
    """
    if depth == 18:
        return resnet(
            depth,
            num_classes,
            width=width or 64,
            stem="3x3",
            relu="first_of_stage",
            zero_init=True,
            **options,
        )
    n, width = (depth - 2) // 6, width or 16
    return ResNet(
        num_classes,
        (n, n, n - 1, 1),
        (width, 2 * width, 4 * width, 4 * width),
        shortcut="A",
        relu="none",
        zero_init=True,
        **options,
    )
