"""A trace of JAX's profiler, and the operations in it that take the most time."""

import pathlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.profiler import ProfileData


def trace(folder: pathlib.Path, run: Callable[[], Any]) -> list[list[Any]]:
    """Writes a trace of a call, for TensorBoard or Perfetto; returns `hottest` of it.

    Args:
      folder: made if need be.
      run: waits for the device itself; compiled already.
    """
    before = set(folder.rglob("*.xplane.pb"))
    with jax.profiler.trace(str(folder)):
        run()
    (new,) = set(folder.rglob("*.xplane.pb")) - before
    return hottest(ProfileData.from_file(str(new)))


def hottest(data: ProfileData, count: int = 10) -> list[list[Any]]:
    """Operations by their own time: [name, milliseconds, percent of the total].

    Those of the devices; of the threads that run XLA's operations where the device is
    a CPU. Names are XLA's (hlo_op) where the trace has them, else those of kernels.
    """
    planes = [plane for plane in data.planes if plane.name.startswith("/device:")]
    planes = [p for p in planes if any(True for line in p.lines for _ in line.events)]
    planes = planes or [p for p in data.planes if p.name == "/host:CPU"]
    spent: Counter[str] = Counter()
    for plane in planes:
        lines = list(plane.lines)
        for line in [x for x in lines if x.name.startswith("Stream")] or lines:
            own_times(line.events, spent)
    total = sum(spent.values())
    return [
        [name, round(ns / 1e6, 3), round(100 * ns / total, 1)]
        for name, ns in spent.most_common(count)
    ]


def own_times(events: Iterable[Any], spent: Counter[str]) -> None:
    """Adds the time of each operation without that of the operations inside it."""
    open_: list[tuple[float, str]] = []  # ends and names, outermost first
    for event in sorted(events, key=lambda e: (e.start_ns, -e.duration_ns)):
        stats = dict(event.stats)
        # On a GPU what is no operation of XLA's, such as a copy, has the number that
        # connects it with its launch; the host's own calls have neither.
        if "hlo_op" not in stats and "correlation_id" not in stats:
            continue
        name = str(stats.get("hlo_op") or event.name)
        while open_ and open_[-1][0] <= event.start_ns:
            open_.pop()
        if open_:
            spent[open_[-1][1]] -= event.duration_ns
        spent[name] += event.duration_ns
        open_.append((event.end_ns, name))
