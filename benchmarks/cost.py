"""FLOPs and bytes of a compiled program, library calls included."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend.core import jaxpr_as_fun

SIZES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)$")
_SHAPE = re.compile(r"\b(\w+)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)(-start)?"
)


class Operation(NamedTuple):
    """A line of a program's HLO text.

    Attributes:
      name: of its result.
      sizes: bytes of each array of the result; 0 for types that do not count.
      kind: as HLO names it.
      rest: what stands after the opening bracket.
    """

    name: str
    sizes: list[int]
    kind: str
    rest: str


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
    for name, parts, kind, rest in _operations(text):
        sizes[name] = sum(parts)
        if kind == "custom-call":
            operands = re.findall(r"%([\w.-]+)", rest.partition(")")[0])
            calls.append((name, operands))
    return float(sum(sizes[n] + sum(sizes.get(o, 0) for o in ops) for n, ops in calls))


def collectives(text: str) -> dict[str, list[int]]:
    """Bytes of the result of each exchange between devices, by its kind.

    One that was combined from several counts once, with the bytes of all. Each
    computation is seen once.
    """
    found: dict[str, list[int]] = {}
    for operation in _operations(text):
        if match := _COLLECTIVE.fullmatch(operation.kind):
            found.setdefault(match[1], []).append(sum(operation.sizes))
    return found


def _operations(text: str) -> Iterator[Operation]:
    for line in text.splitlines():
        if found := _LINE.match(line):
            name, shape, kind, rest = found.groups()
            sizes = [
                SIZES.get(kind, 0) * math.prod(map(int, filter(None, edges.split(","))))
                for kind, edges in _SHAPE.findall(shape)
            ]
            yield Operation(name, sizes, kind, rest)
