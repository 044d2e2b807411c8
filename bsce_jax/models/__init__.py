"""Networks: `create` builds one by name."""

import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from bsce_jax.errors import UserError
from bsce_jax.models import batch_norm, convolution, heads, resnet, resnet_cifar

__all__ = ["batch_norm", "convolution", "create", "heads", "resnet", "resnet_cifar"]


def create(
    name: str,
    num_classes: int,
    *,
    width: int | None = None,
    shortcut: str = "B",
    final_relu: bool = True,
    stem: str = "7x7",
    head: str = "linear",
    dtype: Any = jnp.float32,
    conv_chunks: int = 1,
) -> nn.Module:
    """Builds a network; `resnet.ResNet.__call__` says what it takes and returns.

    Args:
      name: "resnet18" or "resnet34" for large images, or "resnet<6n+2>" (resnet8,
        resnet20, resnet32, ...) for small ones of any size.
      num_classes: length of the class axis: all classes of the experiment.
      width: channels of the first stage; None is the published 64 and 16.
      shortcut: "B", 1x1 convolutions where the shape changes, or "A", zero padding.
      final_relu: keep the last block's ReLU.
      stem: first convolution of resnet18 and resnet34: "7x7" or "3x3".
      head: "linear".
      dtype: compute type, a name or a type: "float32" or "bfloat16" (float64 where
        jax has it switched on). Parameters and statistics are at least float32.
      conv_chunks: 1, or more on one CPU device: `convolution.default_chunks`.

    Raises:
      UserError: a name or an option is not one of the allowed ones.
    """
    match = re.fullmatch(r"resnet([1-9]\d*)", name)
    depth = int(match[1]) if match else 0
    if depth not in resnet.STAGES and not resnet_cifar.is_depth(depth):
        raise UserError(
            f"model={name!r} is unknown; allowed: resnet18, resnet34 and "
            "resnet<6n+2>, such as resnet8, resnet20, resnet32"
        )
    _check("shortcut", shortcut, resnet.SHORTCUTS)
    _check("stem", stem, resnet.STEMS)
    _check("head", head, heads.NAMES)
    for field, value in (("num_classes", num_classes), ("conv_chunks", conv_chunks)):
        _check_positive(field, value)
    if width is not None:
        _check_positive("width", width)
    options: dict[str, Any] = {
        "shortcut": shortcut,
        "final_relu": final_relu,
        "head": head,
        "dtype": _dtype(dtype),
        "conv_chunks": conv_chunks,
    }
    if depth in resnet.STAGES:
        return resnet.resnet(
            depth, num_classes, width=width or 64, stem=stem, **options
        )
    return resnet_cifar.resnet_cifar(depth, num_classes, width=width or 16, **options)


def _dtype(dtype: Any) -> jnp.dtype:
    allowed = ("float32", "bfloat16", "float64")
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    _check("dtype", name, allowed)
    return jnp.dtype(name)


def _check(field: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{field}={value!r} is unknown; allowed: {', '.join(allowed)}")


def _check_positive(field: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{field}={value!r} must be an integer of at least 1")
