"""CUDA graphs: which of an update's kernels XLA launches together.

An update of a small network is hundreds of kernels of a few microseconds each, which
the host launches no faster than the device runs them. What is in a graph is launched
once; the kernels, and so the results, are the same.
"""

import logging
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bsce_jax.compute import parallel
from bsce_jax.compute.state import PyTree
from bsce_jax.errors import UserError, one_line

logger = logging.getLogger("bsce_jax")

_LIST, _MODE = "xla_gpu_enable_command_buffer", "xla_gpu_command_buffer_scheduling_mode"
# XLA takes a whole list in the place of its own, and nothing to add to that.
_USUAL = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,DYNAMIC_SLICE_FUSION"
_WHOLE = f"{_USUAL},CONVOLUTION,WHILE"

# XLA's options of each kind, from those that graphs have least of an update in.
OPTIONS: dict[str, dict[str, str]] = {
    "default": {},
    "convolutions": {_LIST: f"{_USUAL},CONVOLUTION"},
    "whole": {_LIST: _WHOLE},
    "concurrent": {_LIST: _WHOLE, _MODE: "CONCURRENT"},
}
AUTO = "auto"
SECONDS = 60.0  # for the choice; no program is begun that could end later
WARM, TIMED = 2, 5  # calls of each program: the first ones build its graphs

_FAILED = 2**31 - 1  # instead of microseconds


class Graphs:
    """Compiles all training programs of a run with the same kind of graphs.

    Attributes:
      kind: one of OPTIONS, or AUTO until the first program was timed with each.
    """

    def __init__(self, kind: str, devices: parallel.Parallel) -> None:
        """Takes one of OPTIONS or AUTO.

        Other devices than GPUs have no graphs, and pmap on several hosts has XLA's own:
        its programs cannot be compiled before they are called.

        Raises:
          UserError: an unknown kind, or one that these devices do not have.
        """
        if kind not in (known := (AUTO, *OPTIONS)):
            raise UserError(f"gpu_graphs={kind!r}: expected one of {', '.join(known)}")
        lacking = ""
        if devices.platform != "gpu":
            lacking = f"on a {devices.platform}"
        elif devices.mode == "pmap" and devices.num_processes > 1:
            lacking = "with pmap on several hosts"
        if lacking and kind not in (AUTO, "default"):
            raise UserError(
                f"config.gpu_graphs={kind!r}: expected auto or default {lacking}"
            )
        self.kind = "default" if lacking else kind
        self._devices = devices
        self._made: dict[Any, Update] = {}

    def compiled(self, jitted: Any) -> Callable:
        """The function, compiled with the options; the same one for the same function.

        Args:
          jitted: `(state, *arguments) -> (state, metrics)`, of jit or pmap; it donates
            the state.

        Returns:
          The same function. A call raises UserError where XLA does not take the
          options of the kind.
        """
        if self.kind == "default":
            return jitted
        return self._made.setdefault(jitted, Update(self, jitted))

    def fastest(
        self, lowered: Any, state: PyTree, arguments: tuple[PyTree, ...]
    ) -> tuple[str, Callable]:
        """The kind and the program whose calls take least, the same on every process.

        From then on `kind` is that one. The state stays. The more of an update a kind
        has in graphs, the earlier it is tried, until the time is up; one that fails is
        passed over.
        """
        began, longest = time.monotonic(), 0.0
        best: tuple[int, str, Callable] | None = None
        found = []
        for kind in reversed(OPTIONS):
            start = time.monotonic()
            if best and self._latest(start - began + longest) > SECONDS:
                break
            try:
                program = _compile(lowered, kind)
                took = int(1e6 * _seconds(program, state, arguments))
            except jax.errors.JaxRuntimeError as error:
                if kind == "default" and best is None:
                    raise
                logger.warning(
                    "gpu_graphs=auto passes over %s: %s", kind, one_line(error)
                )
                took = _FAILED
            took = int(parallel.largest(self._devices, (took,))[0])
            if took < _FAILED:
                found.append(f"{kind} {took / 1e3:.1f}")
                if best is None or took < best[0]:
                    best = took, kind, program
            longest = max(longest, time.monotonic() - start)
        assert best is not None
        logger.info("gpu_graphs=%s, ms a call: %s", best[1], ", ".join(found))
        self.kind = best[1]
        return best[1:]

    def _latest(self, seconds: float) -> float:
        """The largest of all processes, whose clocks differ."""
        return int(parallel.largest(self._devices, (int(1e3 * seconds),))[0]) / 1e3


class Update:
    """A training program; a call waits for a compile of it that is under way."""

    def __init__(self, graphs: Graphs, jitted: Any) -> None:
        """Compiles nothing yet."""
        self._graphs, self._jitted = graphs, jitted
        self._lock = threading.Lock()
        self._programs: dict[Hashable, Callable] = {}

    def __call__(self, state: PyTree, *arguments: PyTree) -> tuple[PyTree, PyTree]:
        """Calls the function, which is compiled where it is not."""
        key = shapes_of((state, *arguments))
        with self._lock:
            if key not in self._programs:
                lowered = self._jitted.lower(state, *arguments)
                if self._graphs.kind == AUTO:
                    _, program = self._graphs.fastest(lowered, state, arguments)
                else:
                    program = _as_asked(lowered, self._graphs.kind)
                self._programs[key] = program
            return self._programs[key](state, *arguments)

    def compile(self, shapes: tuple[PyTree, ...]) -> bool:
        """Compiles the function for arguments of such shapes, if the kind is known.

        Returns:
          Whether it is compiled.
        """
        key = shapes_of(shapes)
        with self._lock:
            if key not in self._programs and self._graphs.kind != AUTO:
                lowered = self._jitted.lower(*shapes)
                self._programs[key] = _as_asked(lowered, self._graphs.kind)
            return key in self._programs


def shapes_of(arguments: tuple[PyTree, ...]) -> Hashable:
    """Structure, shapes and types of arguments: what a compiled program is for."""
    leaves, structure = jax.tree.flatten(arguments)
    return structure, tuple((np.shape(leaf), _dtype(leaf)) for leaf in leaves)


def _dtype(leaf: Any) -> str:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return str(jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True))


def _compile(lowered: Any, kind: str) -> Callable:
    """The program of a lowered one with the options of a kind of graphs."""
    return lowered.compile(compiler_options=OPTIONS[kind] or None)


def _as_asked(lowered: Any, kind: str) -> Callable:
    """As `_compile`, of a kind that the user has chosen.

    Raises:
      UserError: XLA does not compile it so.
    """
    try:
        return _compile(lowered, kind)
    except jax.errors.JaxRuntimeError as error:
        names = " and ".join(OPTIONS[kind])
        if not names:
            raise
        raise UserError(
            f"gpu_graphs={kind!r}: this XLA does not compile with {names} "
            f"({one_line(error)}); gpu_graphs=default leaves it its own choice"
        ) from None


def _seconds(program: Callable, state: PyTree, arguments: tuple[PyTree, ...]) -> float:
    """The least time of a call, of several from a copy of the state on."""
    state = jax.tree.map(jnp.copy, state)
    times = []
    for _ in range(WARM + TIMED):
        start = time.monotonic()
        state, metrics = program(state, *arguments)
        jax.block_until_ready((state, metrics))
        times.append(time.monotonic() - start)
    return min(times[WARM:])
