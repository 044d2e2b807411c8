"""What WORKDIR/results.json must hold (see `bsce_jax.report.results`)."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bsce_jax.config import fields
from bsce_jax.config.declare import text_refusal
from bsce_jax.errors import UserError

SCHEMA = 3
_LONGEST = 4000  # characters of a text that is shown, or entries of a list of settings
_LARGEST = 1e39  # a number: more than float32 has
_LARGEST_COUNT = 10**12
_LARGEST_SIDE = 2**14
_SPLITS = {"training", "test"}


def upgraded(results: Any) -> Any:
    """Schema 3 of what a file of schema 2 holds; anything else as it is.

    What the data were was not written at first, which {} says.

    Raises:
      UserError: a field that becomes another one is not there or not valid.
    """
    if not isinstance(results, Mapping):
        return results
    if "data" not in results:
        results = {**results, "data": {}}
    if results.get("schema") != 2:
        return results
    steps = results.get("steps")
    if isinstance(steps, list):
        steps = [_upgraded_record(step, record) for step, record in enumerate(steps)]
    return {**results, "schema": SCHEMA, "steps": steps}


def _upgraded_record(step: int, record: Any) -> Any:
    if not isinstance(record, Mapping) or not isinstance(record.get("result"), Mapping):
        return record  # to be refused
    result = dict(record["result"])
    old = {name: result.pop(name) for name in _RESULT_2 if name in result}
    _check_fields(old, _RESULT_2, f"steps[{step}].result.")
    trained = {"loss": old["loss"], "accuracy": old["train_accuracy"]}
    phases = {"incremental" if step else "base": trained}
    if old["finetune_loss"]:
        phases["finetune"] = {"loss": old["finetune_loss"], "accuracy": []}
    return {**record, "result": {**result, "phases": phases, "own": {}}}


def validate(results: Any) -> None:
    """Checks every field; of `config` and `telemetry` what a report computes with.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    _require(isinstance(results, Mapping), "the whole", results, "an object")
    _require(
        results.get("schema") == SCHEMA,
        "schema",
        results.get("schema"),
        f"{SCHEMA}, or 2 in a file",
    )
    _check_fields(results, _FIELDS, "")
    for name, value in results["config"].items():
        known = fields.find(name)  # a class order of ImageNet is longer than others
        longest = max(_LONGEST, known.longest if known else 0)
        allowed = f"printable text, numbers, null, of {longest} entries at most"
        _require(_is_name(name), "config", name, allowed)
        _require(_is_setting(value, longest), f"config.{name[:60]}", value, allowed)
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
        _check_telemetry(record["telemetry"], f"{name}telemetry.")
        seen = record["result"]["num_seen"]
    _check_summary(results["summary"], [r["result"] for r in results["steps"]])


def _check_telemetry(telemetry: Mapping[str, Any], name: str) -> None:
    for field, (allowed, check) in _TELEMETRY.items():
        value = telemetry.get(field)
        _require(check(value), name + field, value, allowed)


def _check_summary(
    summary: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> None:
    """There is an average of what all steps have, and of nothing else."""
    _check_fields(summary, SUMMARY, "summary.")
    absent = dict.fromkeys(SUMMARY, not results) | {
        "average_incremental_top5": any(r["top5"] is None for r in results),
        "average_incremental_nearest_mean": any(
            r["top1_nearest_mean"] is None for r in results
        ),
        "forgetting": len(results) < 2,
    }
    for field, value in summary.items():
        allowed = "null" if absent[field] else "a number"
        _require((value is None) == absent[field], f"summary.{field}", value, allowed)


def _check_result(
    result: Mapping[str, Any], step: int, last: bool, old: int, classes: int
) -> None:
    name = f"steps[{step}].result."
    fields = _RESULT | _CONFUSION if last else _RESULT
    _check_fields(result, fields, name)
    for phase, history in result["phases"].items():
        _check_phase(history, f"{name}phases.{phase}.")
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


def _check_phase(history: Any, name: str) -> None:
    _check_fields(history, _PHASE, name)
    accuracy, epochs = history["accuracy"], len(history["loss"])
    allowed = f"{epochs} entries, as loss, or none"
    _require(len(accuracy) in (0, epochs), f"{name}accuracy", accuracy, allowed)


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
    # JSON may have halves of characters, which nothing can write or draw.
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _is_name(value: Any, longest: int = _LONGEST) -> bool:
    return isinstance(value, str) and not text_refusal(value, longest)


def _is_setting(value: Any, longest: int = _LONGEST) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= _LONGEST and all(map(_is_setting, value))
    plain = value is None or isinstance(value, bool) or _is_number(value)
    return plain or _is_name(value, longest)


def _is_count(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and 0 <= value <= _LARGEST_COUNT


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= _LARGEST  # NaN is not


def _is_shape(value: Any) -> bool:
    sides = _list_of(_is_count)(value) and len(value) == 3
    return sides and all(0 < side <= _LARGEST_SIDE for side in value)


def _is_percentage(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 100


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _object_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def is_object(value: Any) -> bool:
        return isinstance(value, Mapping) and all(map(check, value.values()))

    return is_object


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


def _are_splits(value: Any) -> bool:
    return _object_of(_is_split)(value) and value.keys() in (set(), _SPLITS)


def _is_split(value: Any) -> bool:
    return (
        _is_object(value)
        and value.keys() == {"images", "digest"}
        and _is_count(value["images"])
        and _is_text(value["digest"])
    )


_TEXT = ("text", _is_text)
_OBJECT = ("an object", _is_object)
_COUNT = ("a count, 0 or more", _is_count)
_COUNTS = ("a list of counts, each 0 or more", _list_of(_is_count))
_PERCENTAGE = ("a percentage, 0 to 100", _is_percentage)
_PERCENTAGES = ("a list of percentages, 0 to 100", _list_of(_is_percentage))
_NUMBERS = ("a list of finite numbers", _list_of(_is_number))
_PERCENTAGE_OR_NULL = ("a percentage, 0 to 100, or null", _or_null(_is_percentage))
_NUMBER_OR_NULL = ("a number or null", _or_null(_is_number))

_FIELDS: dict[str, _Kind] = {
    "schema": _COUNT,
    "name": (f"text of {_LONGEST} printable characters or less", _is_name),
    "status": ("running or done", lambda value: value in ("running", "done")),
    "config": _OBJECT,
    "config_hash": _TEXT,
    "base_hash": _TEXT,
    "class_names": ("a list of texts", _list_of(_is_text)),
    "class_order": _COUNTS,
    "image_shape": (f"three counts, 1 to {_LARGEST_SIDE}", _is_shape),
    "data": ("an object of images and digest of each split", _are_splits),
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
    "phases": ("an object of objects", _object_of(_is_object)),
    "alpha": ("a list of [update, value]", _list_of(_is_alpha)),
    "own": ("an object of finite numbers", _object_of(_is_number)),
    "parameters_sha256": ("64 hexadecimal digits", _is_sha256),
}
_PHASE: dict[str, _Kind] = {"loss": _NUMBERS, "accuracy": _PERCENTAGES}
# What schema 3 has as phases.
_RESULT_2: dict[str, _Kind] = {
    "loss": _NUMBERS,
    "train_accuracy": _PERCENTAGES,
    "finetune_loss": _NUMBERS,
}
_TELEMETRY = dict.fromkeys(
    ("seconds", "images_per_second", "skipped_test_images"), _NUMBER_OR_NULL
)
_CONFUSION: dict[str, _Kind] = {
    "confusion": ("a list of [true, predicted, images > 0]", _list_of(_is_triple))
}
SUMMARY: dict[str, _Kind] = {
    "average_incremental_top1": _NUMBER_OR_NULL,
    "average_incremental_top5": _NUMBER_OR_NULL,
    "average_incremental_nearest_mean": _NUMBER_OR_NULL,
    "final_top1": _NUMBER_OR_NULL,
    "final_base_top1": _NUMBER_OR_NULL,
    "forgetting": _NUMBER_OR_NULL,
}
