"""FLOPs and bytes of a compiled program, library calls included."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun

SIZES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)$")
_SHAPE = re.compile(r"\b(\w+)\[([\d,]*)\]")


def flops_and_bytes(traced: Any, compiled: Any) -> tuple[float, float]:
    """Of one call of a program without loops, by XLA's count.

    XLA counts neither FLOPs nor bytes of calls of a library, which on GPUs all
    convolutions may be. The FLOPs are therefore those of the program before it was
    compiled, where that is more, and the calls' operands and results are added to the
    bytes.

    Args:
      traced: jax.stages.Traced.
      compiled: jax.stages.Compiled, of the same.
    """
    before, after = counted(traced), compiled.cost_analysis() or {}
    flops = max(before.get("flops", 0.0), after.get("flops", 0.0))
    moved = after.get("bytes accessed", 0.0) + library_bytes(compiled.as_text())
    return flops, moved


def counted(traced: Any) -> Mapping[str, float]:
    """XLA's counts of a program that is not compiled, lowered for the CPU.

    `Lowered.cost_analysis` has none where the device is a plugin's, such as CUDA's.
    """
    function = jax.jit(jaxpr_as_fun(traced.jaxpr))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in traced.jaxpr.in_avals]
    with jax.default_device(jax.devices("cpu")[0]):
        return function.lower(*shapes).cost_analysis() or {}


def library_bytes(text: str) -> float:
    """Bytes of operands and results of all custom calls in a program's HLO text.

    Workspaces are of type u8 and do not count, and each computation is seen once.
    """
    sizes, calls = {}, []
    for line in text.splitlines():
        if found := _LINE.match(line):
            name, shape, operation, rest = found.groups()
            sizes[name] = sum(
                SIZES.get(kind, 0) * math.prod(map(int, filter(None, edges.split(","))))
                for kind, edges in _SHAPE.findall(shape)
            )
            if operation == "custom-call":
                operands = re.findall(r"%([\w.-]+)", rest.partition(")")[0])
                calls.append((name, operands))
    return float(sum(sizes[n] + sum(sizes.get(o, 0) for o in ops) for n, ops in calls))
