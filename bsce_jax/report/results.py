"""WORKDIR/results.json: its schema, reading, writing and the summary of a run.

The file is one JSON object:

    schema        2
    name          label of the run, equal for runs that differ only in the seed
    status        "running" or "done"
    config        the resolved configuration
    config_hash   hash of all that can change the results
    base_hash     hash of all that can change the base step
    class_names   [classes] names, in class order
    class_order   [classes] labels of the data set, in class order
    steps         one record a finished step: {"step", "result", "telemetry"}
    summary       see `summary`

The `result` of a record is a function of the configuration alone; times, versions and
devices are in its `telemetry`, which is free in form. Accuracies are percentages over
the test images of the classes seen so far, classes are positions in the class order:

    num_old, num_seen         classes of earlier steps; and with this step's
    train_images              images in the step's training set, memory included
    memory_images             exemplars among them
    counts                    [num_seen] training images of each class
    top1, top5                top5 is null while fewer than six classes are seen
    top1_base, top1_old,      on the classes of the base step, of all earlier steps
    top1_new                  (null in the base step) and of this step
    top1_by_task              [step + 1] on the classes introduced in each step
    top1_nearest_mean         top-1 of the nearest mean of exemplars; null without a
                              memory (all other accuracies are of the highest logit)
    loss, train_accuracy      [epochs] means over each epoch of the main training
    finetune_loss             [epochs] of balanced fine-tuning; [] where there is none
    alpha                     [[update, value], ...], update counted from the start of
                              the step; [] where alpha is not learned
    parameters_sha256         of the parameters after the step
    confusion                 [[true, predicted, images], ...] in the newest record
                              only, pairs that never occur left out
"""

import contextlib
import json
import math
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from bsce_jax import metrics
from bsce_jax.errors import UserError

SCHEMA = 2
FILE_NAME = "results.json"


def write(workdir: epath.PathLike, results: Mapping[str, Any]) -> None:
    """Replaces WORKDIR/results.json; after a crash it is the old file or the new one.

    Raises:
      UserError: a field breaks the schema, or the file cannot be written.
    """
    validate(results)
    text = json.dumps(results, allow_nan=False) + "\n"
    replace(epath.Path(workdir) / FILE_NAME, text)


def replace(target: epath.Path, content: str | bytes, shared: bool = False) -> None:
    """Replaces a file; after a crash it is the old file or the new one.

    Args:
      target: the file.
      content: all of it.
      shared: several processes may do so at once; the last one's stays.

    Raises:
      UserError: it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if "://" in os.fspath(target):
            target.write_bytes(data)  # object stores replace a whole object at once
        else:
            # One fixed name: what a killed run left behind is overwritten by the next.
            own = f"{socket.gethostname()}-{os.getpid()}." if shared else ""
            _replace(target, target.with_name(f".{target.name}.{own}tmp"), data)
    except Exception as error:  # object stores raise others than OSError, too
        raise UserError(f"{target} cannot be written: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """One line: the operating system's own words if it has any."""
    words = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return " ".join(words.split())


def _replace(target: epath.Path, temporary: epath.Path, data: bytes) -> None:
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, survives a loss of power
    finally:
        os.close(folder)


def read(workdir: epath.PathLike) -> dict[str, Any]:
    """Reads and validates WORKDIR/results.json.

    Raises:
      UserError: there is none, it is not JSON, or it breaks the schema.
    """
    path = epath.Path(workdir) / FILE_NAME
    try:
        results = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist: expected a run's workdir") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error
    except ValueError as error:  # neither UTF-8 nor JSON
        raise UserError(f"{path} is not JSON: {error}") from None
    try:
        validate(results)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return results


def deterministic(results: Mapping[str, Any]) -> dict[str, Any]:
    """The part that a run killed and resumed shares, bit for bit, with any other run.

    Everything but the telemetry, and the configuration in favour of its hash (it may
    name folders).
    """
    part = {key: value for key, value in results.items() if key != "config"}
    part["steps"] = [
        {"step": record["step"], "result": record["result"]}
        for record in results["steps"]
    ]
    return part


def summary(steps: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The numbers of a run that papers report, in percent, from its step records.

    Returns:
      average_incremental_top1, average_incremental_top5,
        average_incremental_nearest_mean: mean over all steps, base step included;
        None where a step has none.
      final_top1, final_base_top1: after the newest step, on all classes and on those
        of the base step.
      forgetting: see `metrics.forgetting`; None before the first incremental step.
      All are None where no step is finished.
    """
    results = [record["result"] for record in steps]
    if not results:
        return dict.fromkeys(_SUMMARY)
    top5 = [result["top5"] for result in results]
    nearest = [result["top1_nearest_mean"] for result in results]
    matrix = [
        result["top1_by_task"] + [None] * (len(results) - len(result["top1_by_task"]))
        for result in results
    ]
    average = metrics.average_incremental_accuracy
    values = {
        "average_incremental_top1": average([result["top1"] for result in results]),
        "average_incremental_top5": None if None in top5 else average(top5),
        "average_incremental_nearest_mean": (
            None if None in nearest else average(nearest)
        ),
        "final_top1": results[-1]["top1"],
        "final_base_top1": results[-1]["top1_base"],
        "forgetting": metrics.forgetting(matrix) if len(results) > 1 else None,
    }
    return {
        name: None if value is None else float(value) for name, value in values.items()
    }


def validate(results: Any) -> None:
    """Checks every field but the contents of `config` and `telemetry`.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    _require(isinstance(results, Mapping), "the whole", results, "an object")
    _require(
        results.get("schema") == SCHEMA,
        "schema",
        results.get("schema"),
        f"{SCHEMA}, the one this version reads",
    )
    _check_fields(results, _FIELDS, "")
    order = results["class_order"]
    _require(
        len(order) == len(results["class_names"]),
        "class_order",
        order,
        "as many entries as class_names",
    )
    _require(len(set(order)) == len(order), "class_order", order, "distinct classes")
    seen = 0
    for index, record in enumerate(results["steps"]):
        name = f"steps[{index}]."
        _check_fields(record, _RECORD, name)
        _require(record["step"] == index, f"{name}step", record["step"], str(index))
        last = index == len(results["steps"]) - 1
        _check_result(record["result"], index, last, seen, len(order))
        seen = record["result"]["num_seen"]
    _check_fields(results["summary"], _SUMMARY, "summary.")


def _check_result(
    result: Mapping[str, Any], step: int, last: bool, old: int, classes: int
) -> None:
    name = f"steps[{step}].result."
    fields = _RESULT | _CONFUSION if last else _RESULT
    _check_fields(result, fields, name)
    num_seen = result["num_seen"]
    expected: dict[str, tuple[bool, str]] = {
        "num_old": (result["num_old"] == old, f"{old}, num_seen of the step before"),
        "num_seen": (old < num_seen <= classes, f"more than {old}, up to {classes}"),
        "counts": (len(result["counts"]) == num_seen, f"{num_seen} entries"),
        "top5": (
            (result["top5"] is None) == (num_seen < 6),
            "null below six classes and a percentage from there on",
        ),
        "top1_old": (
            (result["top1_old"] is None) == (step == 0),
            "null in the base step and a percentage after it",
        ),
        "top1_by_task": (
            len(result["top1_by_task"]) == step + 1,
            f"{step + 1} entries",
        ),
    }
    if last:
        inside = all(max(entry[:2]) < num_seen for entry in result["confusion"])
        expected["confusion"] = (inside, f"classes below {num_seen}")
    for field, (holds, allowed) in expected.items():
        _require(holds, name + field, result[field], allowed)


def _check_fields(value: Any, fields: Mapping[str, "_Kind"], prefix: str) -> None:
    whole = prefix.rstrip(".") or "the whole"
    _require(isinstance(value, Mapping), whole, value, "an object")
    for field, (allowed, check) in fields.items():
        if field not in value:
            raise UserError(f"results: {prefix}{field} is missing, expected {allowed}")
        _require(check(value[field]), prefix + field, value[field], allowed)
    for field in value:
        if field not in fields:
            known = ", ".join(fields)
            raise UserError(f"results: {prefix}{field} is unknown; known: {known}")


def _require(holds: bool, field: str, value: Any, allowed: str) -> None:
    if not holds:
        text = repr(value)
        shown = text if len(text) <= 60 else f"{text[:57]}..."
        raise UserError(f"results: {field} is {shown}, expected {allowed}")


_Kind = tuple[str, Callable[[Any], bool]]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _is_percentage(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 100


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def is_list(value: Any) -> bool:
        return isinstance(value, list | tuple) and all(map(check, value))

    return is_list


def _or_null(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_alpha(value: Any) -> bool:
    pair = isinstance(value, list | tuple) and len(value) == 2
    return pair and _is_count(value[0]) and _is_number(value[1])


def _is_triple(value: Any) -> bool:
    return _list_of(_is_count)(value) and len(value) == 3 and value[2] > 0


def _is_sha256(value: Any) -> bool:
    return _is_text(value) and bool(re.fullmatch("[0-9a-f]{64}", value))


_TEXT = ("text", _is_text)
_OBJECT = ("an object", _is_object)
_COUNT = ("a count, 0 or more", _is_count)
_COUNTS = ("a list of counts, each 0 or more", _list_of(_is_count))
_PERCENTAGE = ("a percentage, 0 to 100", _is_percentage)
_PERCENTAGES = ("a list of percentages, 0 to 100", _list_of(_is_percentage))
_PERCENTAGE_OR_NULL = ("a percentage, 0 to 100, or null", _or_null(_is_percentage))
_NUMBER_OR_NULL = ("a number or null", _or_null(_is_number))

_FIELDS: dict[str, _Kind] = {
    "schema": _COUNT,
    "name": _TEXT,
    "status": ("running or done", lambda value: value in ("running", "done")),
    "config": _OBJECT,
    "config_hash": _TEXT,
    "base_hash": _TEXT,
    "class_names": ("a list of texts", _list_of(_is_text)),
    "class_order": _COUNTS,
    "image_shape": ("three counts", _list_of(_is_count)),
    "steps": ("a list of records", _list_of(_is_object)),
    "summary": _OBJECT,
}
_RECORD: dict[str, _Kind] = {"step": _COUNT, "result": _OBJECT, "telemetry": _OBJECT}
_RESULT: dict[str, _Kind] = {
    "num_old": _COUNT,
    "num_seen": _COUNT,
    "train_images": _COUNT,
    "memory_images": _COUNT,
    "counts": _COUNTS,
    "top1": _PERCENTAGE,
    "top5": _PERCENTAGE_OR_NULL,
    "top1_base": _PERCENTAGE,
    "top1_old": _PERCENTAGE_OR_NULL,
    "top1_new": _PERCENTAGE,
    "top1_by_task": _PERCENTAGES,
    "top1_nearest_mean": _PERCENTAGE_OR_NULL,
    "loss": ("a list of finite numbers", _list_of(_is_number)),
    "train_accuracy": _PERCENTAGES,
    "finetune_loss": ("a list of finite numbers", _list_of(_is_number)),
    "alpha": ("a list of [update, value]", _list_of(_is_alpha)),
    "parameters_sha256": ("64 hexadecimal digits", _is_sha256),
}
_CONFUSION: dict[str, _Kind] = {
    "confusion": ("a list of [true, predicted, images > 0]", _list_of(_is_triple))
}
_SUMMARY: dict[str, _Kind] = {
    "average_incremental_top1": _NUMBER_OR_NULL,
    "average_incremental_top5": _NUMBER_OR_NULL,
    "average_incremental_nearest_mean": _NUMBER_OR_NULL,
    "final_top1": _NUMBER_OR_NULL,
    "final_base_top1": _NUMBER_OR_NULL,
    "forgetting": _NUMBER_OR_NULL,
}
