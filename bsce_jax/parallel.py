"""The two compilers of a pure step: jit over a mesh, and pmap.

The only module that knows how many devices there are. Functions to compile take and
return pytrees that are either *replicated* or *batches*; a batch leaf has the shape
[updates, rows, ...] and its rows are divided over the devices.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bsce_jax.errors import UserError
from bsce_jax.state import PyTree

AXIS = "data"
Kind = Literal["replicated", "batch"]


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How compiled functions are spread over the devices."""

    mode: str
    mesh: Mesh

    @property
    def num_devices(self) -> int:
        """Devices of all hosts."""
        return self.mesh.size

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu"."""
        return self.mesh.devices.flat[0].platform


def create(mode: str, devices: Sequence[jax.Device] | None = None) -> Parallel:
    """Data parallelism over devices (default: all).

    Raises:
      UserError: mode is not "jit" or "pmap".
    """
    if mode not in ("jit", "pmap"):
        raise UserError(f"parallel={mode!r}: expected jit or pmap")
    devices = jax.devices() if devices is None else devices
    # Explicit axes, the default of make_mesh, break gathers under grad in JAX 0.12.
    mesh = jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)
    return Parallel(mode, mesh)


def replicate(parallel: Parallel, tree: PyTree) -> PyTree:
    """Places arrays, whole, on every device, in a form that never compiles again.

    Python numbers become strongly typed arrays; float64 and int64 become 32 bits
    unless JAX runs with 64.
    """
    sharding = NamedSharding(parallel.mesh, PartitionSpec())

    def place(leaf: Any) -> jax.Array:
        placed = isinstance(leaf, jax.Array) and leaf.sharding == sharding
        if placed and not leaf.weak_type:
            return leaf
        value = np.asarray(leaf)
        return jax.device_put(
            value.astype(jax.dtypes.canonicalize_dtype(value.dtype)), sharding
        )

    return jax.tree.map(place, tree)


def shard(parallel: Parallel, tree: PyTree) -> PyTree:
    """Places batches [updates, rows, ...], rows divided over the devices.

    Rows are filled up with zeros to a multiple of the number of devices, so that a
    zero must mean "not valid".
    """
    count = parallel.num_devices
    sharding = NamedSharding(parallel.mesh, PartitionSpec(None, AXIS))

    def place(leaf: np.ndarray) -> jax.Array:
        leaf = np.asarray(leaf)
        missing = -leaf.shape[1] % count
        if missing:
            widths = [(0, 0), (0, missing)] + [(0, 0)] * (leaf.ndim - 2)
            leaf = np.pad(leaf, widths)
        if parallel.mode == "pmap":
            leaf = leaf.reshape(leaf.shape[0], count, -1, *leaf.shape[2:])
        return jax.device_put(leaf, sharding)

    return jax.tree.map(place, tree)


def unshard(parallel: Parallel, tree: PyTree, rows: int) -> PyTree:
    """Fetches batches [updates, rows, ...] to the host, without the filled-up rows."""

    def fetch(leaf: jax.Array) -> np.ndarray:
        value = np.asarray(leaf)
        if parallel.mode == "pmap":
            value = value.reshape(value.shape[0], -1, *value.shape[3:])
        return value[:, :rows]

    return jax.tree.map(fetch, tree)


def compile_step(
    parallel: Parallel,
    function: Callable,
    *,
    name: str,
    inputs: Sequence[Kind],
    outputs: Sequence[Kind],
    donate: Sequence[int] = (),
) -> Callable:
    """Compiles `function(*args, axis_name=None) -> tuple`.

    Args:
      parallel: mode and devices.
      function: pure; with an axis name it reduces with collectives over that name,
        without, it sees the global batch.
      name: name of the compiled program, as the compile counts report it.
      inputs: kind of each positional argument.
      outputs: kind of each entry of the returned tuple.
      donate: positions of arguments whose buffers are reused.
    """
    if parallel.mode == "jit":
        program = functools.partial(function, axis_name=None)
        spec = {
            "replicated": NamedSharding(parallel.mesh, PartitionSpec()),
            "batch": NamedSharding(parallel.mesh, PartitionSpec(None, AXIS)),
        }
        return jax.jit(
            _named(program, name),
            in_shardings=tuple(spec[kind] for kind in inputs),
            out_shardings=tuple(spec[kind] for kind in outputs),
            donate_argnums=tuple(donate),
        )
    program = functools.partial(function, axis_name=AXIS)
    axis: dict[Kind, int | None] = {"replicated": None, "batch": 1}
    return jax.pmap(
        _named(program, name),
        axis_name=AXIS,
        in_axes=tuple(axis[kind] for kind in inputs),
        out_axes=tuple(axis[kind] for kind in outputs),
        devices=list(parallel.mesh.devices.flat),
        donate_argnums=tuple(donate),
    )


def _named(function: Callable, name: str) -> Callable:
    @functools.wraps(function, assigned=())
    def program(*args: Any) -> Any:
        return function(*args)

    program.__name__ = program.__qualname__ = name
    return program
