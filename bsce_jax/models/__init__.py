"""Networks: `create` builds one by name."""

import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from bsce_jax.errors import UserError
from bsce_jax.models import batch_norm, convolution, heads, podnet, resnet, resnet_cifar

__all__ = [
    "batch_norm",
    "convolution",
    "create",
    "heads",
    "podnet",
    "resnet",
    "resnet_cifar",
]


def create(
    name: str,
    num_classes: int,
    *,
    width: int | None = None,
    shortcut: str = "B",
    final_relu: bool = True,
    stem: str = "7x7",
    head: str = "linear",
    proxies: int = 10,
    auxiliary: int = 0,
    kernel_scales: bool = False,
    dtype: Any = jnp.float32,
    conv_chunks: int = 1,
) -> nn.Module:
    """Builds a network; `resnet.ResNet.__call__` says what it takes and returns.

    Args:
      name: "resnet18" or "resnet34" for large images, or "resnet<6n+2>" (resnet8,
        resnet20, resnet32, ...) for small ones of any size; PODNet's networks,
        "podnet18" for large images and "podnet<6n+2>" (podnet14, podnet20, podnet32,
        ...) for small ones, are as published: `shortcut`, `final_relu` and `stem` do
        not apply to them.
      num_classes: length of the class axis: all classes of the experiment.
      width: channels of the first stage; None is the published 64 and 16.
      shortcut: "B", 1x1 convolutions where the shape changes, or "A", zero padding.
      final_relu: keep the last block's ReLU.
      stem: first convolution of resnet18 and resnet34: "7x7" or "3x3".
      head: "linear", "cosine" (LUCIR's), "local_similarity" (PODNet's) or
        "perspectives" (SPB-M's four cosine heads).
      proxies: of a class, for the head "local_similarity".
      auxiliary: outputs of an auxiliary branch (SPB-I's has four); 0 = none.
      kernel_scales: give every kernel of a convolution a factor, 1 at first
        (Mnemonics).
      dtype: compute type, a name or a type: "float32" or "bfloat16" (float64 where
        jax has it switched on). Parameters and statistics are at least float32.
      conv_chunks: 1, or more on one CPU device: `convolution.default_chunks`.

    Raises:
      UserError: a name or an option is not one of the allowed ones.
    """
    family, depth = check_name(name)
    _check("shortcut", shortcut, resnet.SHORTCUTS)
    _check("stem", stem, resnet.STEMS)
    _check("head", head, tuple(heads.NAMES))
    _check_positive("num_classes", num_classes)
    options: dict[str, Any] = {"proxies": proxies, "conv_chunks": conv_chunks}
    if width is not None:
        options["width"] = width
    for field, value in options.items():
        _check_positive(field, value)
    options |= {"head": head, "dtype": _dtype(dtype), "auxiliary": auxiliary}
    options["kernel_scales"] = kernel_scales
    if family == "podnet":
        return podnet.podnet(depth, num_classes, **options)
    options |= {"shortcut": shortcut, "relu": "all" if final_relu else "not_last"}
    if depth in resnet.STAGES:
        return resnet.resnet(depth, num_classes, stem=stem, **options)
    return resnet_cifar.resnet_cifar(depth, num_classes, **options)


def check_name(name: str, what: str = "model") -> tuple[str, int]:
    """The family and number of layers that the name of a network says.

    Args:
      name: see `create`.
      what: a message calls it.

    Raises:
      UserError: there is no such network.
    """
    match = re.fullmatch(r"(resnet|podnet)([1-9]\d{0,3})", name)
    family, depth = (match[1], int(match[2])) if match else ("", 0)
    deepest = 1202  # of those that He et al. trained
    known = {
        "resnet": depth in resnet.STAGES or resnet_cifar.is_depth(depth),
        "podnet": podnet.is_depth(depth),
    }
    if depth > deepest or not known.get(family):
        raise UserError(
            f"{what}={name!r} is unknown; allowed: resnet18, resnet34, resnet<6n+2> "
            "such as resnet8 or resnet32, podnet18, podnet<6n+2> such as podnet14 or "
            "podnet32"
        )
    return family, depth


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
