"""The two compilers of a pure step: jit over a mesh, and pmap.

The only module that knows how many devices and processes there are. Functions to
compile take and return pytrees that are either *replicated* or *batches*; a batch leaf
has the shape [updates, rows, ...] and its rows are divided over the devices of all
processes, in the order of the mesh. What a program returns every process has whole.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bsce_jax.compute.state import PyTree
from bsce_jax.errors import UserError

AXIS = "data"
Kind = Literal["replicated", "batch"]


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How compiled functions are spread over the devices.

    Attributes:
      mode: "jit" or "pmap".
      mesh: one axis, the devices of all processes.
    """

    mode: str
    mesh: Mesh

    @property
    def num_devices(self) -> int:
        """Devices of all processes."""
        return self.mesh.size

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu"."""
        return self.mesh.devices.flat[0].platform

    @property
    def num_processes(self) -> int:
        """Processes that have devices of the mesh."""
        return len({device.process_index for device in self.mesh.devices.flat})

    @functools.cached_property
    def placement(self) -> Mesh:
        """Where arrays are placed: pmap takes a process's share, jit the whole."""
        return self.mesh if self.mode == "jit" else self.mesh.local_mesh

    def sharding(self, *axes: str | None) -> NamedSharding:
        """A sharding over the devices on which arrays are placed."""
        return NamedSharding(self.placement, PartitionSpec(*axes))


def create(mode: str, devices: Sequence[jax.Device] | None = None) -> Parallel:
    """Data parallelism over devices (default: all of all processes).

    Raises:
      UserError: mode is not "jit" or "pmap".
    """
    if mode not in ("jit", "pmap"):
        raise UserError(f"parallel={mode!r}: expected jit or pmap")
    devices = jax.devices() if devices is None else devices
    # A process's devices stand together: pmap gives it consecutive rows.
    devices = sorted(devices, key=lambda device: device.process_index)
    # Explicit axes, the default of make_mesh, break gathers under grad in JAX 0.12.
    mesh = Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))
    return Parallel(mode, mesh)


def is_first() -> bool:
    """Whether this process is the one that logs and writes files."""
    return jax.process_index() == 0


def require_same(facts: Mapping[str, Any]) -> None:
    """Makes sure that every process has the same facts; each must call this.

    Args:
      facts: what they are -> anything with a `repr`.

    Raises:
      UserError: names a process and what it has otherwise than the first, in all.
    """
    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(repr(fact).encode()).digest() for fact in facts.values()]
    mine = np.stack([np.frombuffer(digest, np.uint8) for digest in digests])
    everyones = multihost_utils.process_allgather(mine)
    for process, theirs in enumerate(everyones):
        others = (theirs != everyones[0]).any(axis=1)
        if others.any():
            names = [n for n, other in zip(facts, others, strict=True) if other]
            raise UserError(
                f"process {process} has another {' and another '.join(names)} than "
                "process 0: expected the same on every host"
            )


def replicate(parallel: Parallel, tree: PyTree) -> PyTree:
    """Places arrays, whole, on every device, in a form that never compiles again.

    Every process must give the same values. Python numbers become strongly typed
    arrays; float64 and int64 become 32 bits unless JAX runs with 64.
    """
    sharding = parallel.sharding()

    def place(leaf: Any) -> jax.Array:
        placed = isinstance(leaf, jax.Array) and leaf.sharding == sharding
        if placed and not leaf.weak_type:
            return leaf
        value = np.asarray(leaf)
        value = value.astype(jax.dtypes.canonicalize_dtype(value.dtype))
        if sharding.is_fully_addressable:
            return jax.device_put(value, sharding)
        # device_put would compare the values of all processes, leaf by leaf.
        return jax.make_array_from_callback(value.shape, sharding, lambda _: value)

    return jax.tree.map(place, tree)


def local_rows(parallel: Parallel, rows: int) -> np.ndarray:
    """The rows of a batch that are this process's, int [n], ascending.

    Numbers from `rows` on are those that fill the batch up to a multiple of the number
    of devices.
    """
    each = -(-rows // parallel.num_devices)
    first, count = _own_devices(parallel)
    return np.arange(first * each, (first + count) * each)


def _own_devices(parallel: Parallel) -> tuple[int, int]:
    """Position in the mesh of this process's first device, and their number."""
    processes = [device.process_index for device in parallel.mesh.devices.flat]
    own = jax.process_index()
    return processes.index(own), processes.count(own)


def shard(parallel: Parallel, tree: PyTree) -> PyTree:
    """Places batches [updates, rows, ...], rows divided over the devices.

    Every process gives the whole batch. Rows are filled up with zeros to a multiple of
    the number of devices, so that a zero must mean "not valid".
    """

    def place(leaf: np.ndarray) -> jax.Array:
        leaf = np.asarray(leaf)
        missing = -leaf.shape[1] % parallel.num_devices
        if missing:
            widths = [(0, 0), (0, missing)] + [(0, 0)] * (leaf.ndim - 2)
            leaf = np.pad(leaf, widths)
        own = local_rows(parallel, leaf.shape[1])
        return _place_own(parallel, leaf[:, own[0] : own[-1] + 1])

    return jax.tree.map(place, tree)


def shard_own(parallel: Parallel, tree: PyTree) -> PyTree:
    """As `shard`, where each process gives its `local_rows` only."""
    return jax.tree.map(functools.partial(_place_own, parallel), tree)


def _place_own(parallel: Parallel, leaf: np.ndarray) -> jax.Array:
    _, count = _own_devices(parallel)
    sharding = parallel.sharding(None, AXIS)
    if parallel.mode == "pmap":
        leaf = leaf.reshape(leaf.shape[0], count, -1, *leaf.shape[2:])
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    rows = leaf.shape[1] // count * parallel.num_devices
    shape = (leaf.shape[0], rows, *leaf.shape[2:])
    return jax.make_array_from_process_local_data(sharding, leaf, shape)


def fetch(tree: PyTree, rows: int) -> PyTree:
    """Brings returned batches [updates, rows, ...] to the host, without filled rows."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:, :rows], tree)


def largest(parallel: Parallel, values: Sequence[int]) -> np.ndarray | jax.Array:
    """The largest of each number over all processes, int32 [len(values)].

    Does not wait: the result is on its way. Every process must call it equally often
    and between the same programs.
    """
    mine = np.asarray(values, np.int32)
    if parallel.num_processes == 1:
        return mine
    sharding = NamedSharding(parallel.mesh, PartitionSpec(AXIS))
    _, count = _own_devices(parallel)
    everyone = jax.make_array_from_process_local_data(
        sharding, np.tile(mine, (count, 1)), (parallel.num_devices, len(mine))
    )
    return _largest(parallel.mesh)(everyone)


@functools.cache
def _largest(mesh: Mesh) -> Callable:
    def largest(values: jax.Array) -> jax.Array:
        return jax.numpy.max(values, axis=0)

    return jax.jit(largest, out_shardings=NamedSharding(mesh, PartitionSpec()))


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
      outputs: kind of each entry of the returned tuple; a batch is gathered, so that
        every process can read all of it.
      donate: positions of arguments whose buffers are reused.
    """
    if parallel.mode == "jit":
        whole = parallel.sharding()
        spec = {"replicated": whole, "batch": parallel.sharding(None, AXIS)}
        return jax.jit(
            _named(functools.partial(function, axis_name=None), name),
            in_shardings=tuple(spec[kind] for kind in inputs),
            out_shardings=tuple(whole for _ in outputs),
            donate_argnums=tuple(donate),
        )

    def gather(leaf: jax.Array) -> jax.Array:
        return jax.lax.all_gather(leaf, AXIS, axis=1, tiled=True)

    def program(*args: Any) -> tuple:
        found = function(*args, axis_name=AXIS)
        return tuple(
            jax.tree.map(gather, value) if kind == "batch" else value
            for value, kind in zip(found, outputs, strict=True)
        )

    axis: dict[Kind, int | None] = {"replicated": None, "batch": 1}
    return jax.pmap(
        _named(program, name),
        axis_name=AXIS,
        in_axes=tuple(axis[kind] for kind in inputs),
        out_axes=(None,) * len(outputs),
        devices=list(parallel.mesh.devices.flat),
        donate_argnums=tuple(donate),
    )


def _named(function: Callable, name: str) -> Callable:
    @functools.wraps(function, assigned=())
    def program(*args: Any) -> Any:
        return function(*args)

    program.__name__ = program.__qualname__ = name
    return program
