"""What a run's results say besides accuracies: speed, machine, source, configuration.

Telemetry is free in form: whatever is absent or of another type is left out.
"""

import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Results = Mapping[str, Any]


class Facts(NamedTuple):
    """Of one run; None and "" where the telemetry has nothing."""

    images_per_second: float | None  # in training, median over the steps
    seconds: float | None  # of wall clock, all steps that it has trained itself
    base_from: str  # name of the run whose base step it has taken over, or ""
    skipped: int  # test images that could not be read, in the step with most
    environment: "Environment"


class Environment(NamedTuple):
    """Where a run's newest step was trained."""

    device: str
    commit: str
    versions: tuple[tuple[str, str], ...]


class Setting(NamedTuple):
    """A field of a configuration, as text."""

    name: str
    value: str
    default: str | None  # None where there is no such field by default


def facts(results: Results) -> Facts:
    """Speed and environment of a run with or without finished steps."""
    records = [record["telemetry"] for record in results["steps"]]
    rates = _numbers(records, "images_per_second")
    seconds = _numbers(records, "seconds")
    newest: Mapping[str, Any] = records[-1] if records else {}
    versions = newest.get("versions")
    pairs = versions.items() if isinstance(versions, Mapping) else ()
    device = str(newest.get("device") or "")
    count = newest.get("devices")
    if device and isinstance(count, int) and count > 1:
        device = f"{count} × {device}"
    return Facts(
        statistics.median(rates) if rates else None,
        sum(seconds) if seconds else None,
        pathlib.PurePath(str(results["config"].get("init_from") or "")).name,
        int(max(_numbers(records, "skipped_test_images"), default=0)),
        Environment(
            device,
            str(newest.get("commit") or ""),
            tuple((str(name), str(value)) for name, value in pairs if value),
        ),
    )


def fields(
    runs: Sequence[Results], defaults: Mapping[str, Any]
) -> tuple[list[Setting], list[Setting]]:
    """Configuration of a cell's runs: what differs from the defaults, and the rest.

    A field in which the runs differ, the seed, has all their values. Left out is
    init_from: it says where a base step came from that the run would have trained.
    """
    changed: list[Setting] = []
    rest: list[Setting] = []
    names = dict.fromkeys(name for run in runs for name in run["config"])
    names.pop("init_from", None)
    for name in names:
        values = [run["config"].get(name) for run in runs]
        texts = list(dict.fromkeys(map(_text, values)))
        default = _text(defaults[name]) if name in defaults else None
        same = name in defaults and all(value == defaults[name] for value in values)
        (rest if same else changed).append(Setting(name, ", ".join(texts), default))
    return changed, rest


def learned(results: Results) -> list[str]:
    """What a method has learned beside the network: a text a step that has some."""
    texts = [
        (record["step"], own_values(record["result"])) for record in results["steps"]
    ]
    return [f"step {step}: {text}" for step, text in texts if text]


def own_values(result: Mapping[str, Any]) -> str:
    """The `own` of a step's result, as "scale 0.9, shift -0.1"; "" where it is {}."""
    return ", ".join(f"{name} {value:.4g}" for name, value in result["own"].items())


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 05 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02} min" if hours else f"{minutes} min"


def wall_time(known: Facts) -> str:
    """Of the steps that a run has trained itself; a dash where it is not known."""
    if known.seconds is None:
        return "–"
    return duration(known.seconds) + (" + base step" if known.base_from else "")


def rate(images_per_second: float) -> str:
    """With a thin space between thousands."""
    return f"{images_per_second:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def short_commit(commit: str) -> str:
    """The first ten digits, and whether the checkout was changed."""
    digits, _, dirty = commit.partition("-")
    return digits[:10] + (f"-{dirty}" if dirty else "")


def _numbers(records: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    values = [record.get(name) for record in records]
    numbers = [v for v in values if isinstance(v, int | float)]
    return [v for v in numbers if math.isfinite(v) and not isinstance(v, bool)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)
