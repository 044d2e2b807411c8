"""A trace of JAX's profiler, and the operations in it that take the most time."""

import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.profiler import ProfileData

_NUMBER = re.compile(r"[.\d]+$")  # of one operation among its like


def trace(folder: pathlib.Path, run: Callable[[], Any]) -> dict[str, Any]:
    """Writes a trace of a call, for TensorBoard or Perfetto; returns `summary` of it.

    Args:
      folder: made if need be.
      run: waits for the device itself; compiled already.
    """
    before = set(folder.rglob("*.xplane.pb"))
    with jax.profiler.trace(str(folder)):
        run()
    (new,) = set(folder.rglob("*.xplane.pb")) - before
    return summary(ProfileData.from_file(str(new)))


def summary(data: ProfileData, count: int = 10) -> dict[str, Any]:
    """Where a device's time goes.

    Of the devices; of the threads that run XLA's operations where the device is a CPU.
    Operations are named as XLA names them (hlo_op), without their numbers, or else as
    their kernels are.

    Returns:
      {"hottest": [[name, times it ran, milliseconds, percent of the busy time], ...],
      "operations": how many ran, "busy_ms": their own time, over all lines of the
      trace, "span_ms": from the first one's start to the last one's end,
      "idle_percent": of the span, in which the busiest line does nothing}.
    """
    planes = [plane for plane in data.planes if plane.name.startswith("/device:")]
    planes = [p for p in planes if any(True for line in p.lines for _ in line.events)]
    planes = planes or [p for p in data.planes if p.name == "/host:CPU"]
    spent: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    starts, ends, busiest = [], [], 0.0
    for plane in planes:
        lines = list(plane.lines)
        for line in [x for x in lines if x.name.startswith("Stream")] or lines:
            events = operations(line.events)
            before = sum(spent.values())
            own_times(events, spent)
            busiest = max(busiest, sum(spent.values()) - before)
            runs.update(name for _, _, name in events)
            starts += [start for start, _, _ in events]
            ends += [end for _, end, _ in events]
    total = sum(spent.values())
    span = max(ends) - min(starts) if ends else 0.0
    return {
        "hottest": [
            [name, runs[name], round(ns / 1e6, 3), round(100 * ns / total, 1)]
            for name, ns in spent.most_common(count)
        ],
        "operations": sum(runs.values()),
        "busy_ms": round(total / 1e6, 3),
        "span_ms": round(span / 1e6, 3),
        "idle_percent": round(100 * (1 - busiest / span), 1) if span else None,
    }


def operations(events: Iterable[Any]) -> list[tuple[float, float, str]]:
    """Start and end, in nanoseconds, and name of a line's operations, outermost first.

    On a GPU what is no operation of XLA's, such as a copy, has the number that connects
    it with its launch; the host's own calls have neither.
    """
    found = []
    for event in sorted(events, key=lambda e: (e.start_ns, -e.duration_ns)):
        stats = dict(event.stats)
        if "hlo_op" in stats or "correlation_id" in stats:
            name = str(stats.get("hlo_op") or event.name)
            found.append((event.start_ns, event.end_ns, _NUMBER.sub("", name)))
    return found


def own_times(events: Iterable[tuple[float, float, str]], spent: Counter[str]) -> None:
    """Adds the time of each operation without that of the operations inside it."""
    open_: list[tuple[float, str]] = []  # ends and names, outermost first
    for start, end, name in events:
        while open_ and open_[-1][0] <= start:
            open_.pop()
        if open_:
            spent[open_[-1][1]] -= end - start
        spent[name] += end - start
        open_.append((end, name))
