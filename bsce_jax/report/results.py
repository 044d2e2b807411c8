"""WORKDIR/results.json: its schema, reading, writing and the summary of a run.

The file is one JSON object:

    schema        3
    name          label of the run, equal for runs that differ only in the seed
    status        "running" or "done"
    config        the resolved configuration
    config_hash   hash of all that can change the results
    base_hash     hash of all that can change the base step
    class_names   [classes] names, in class order
    class_order   [classes] labels of the data set, in class order
    image_shape   [3] height, width and channels of the images
    data          {"training": {"images": N, "digest": text}, "test": ...}, the digest
                  of the records and their order; {} in runs of before it was written
    steps         one record a finished step: {"step", "result", "telemetry"}
    summary       see `summary`

The `result` of a record is a function of the configuration alone; times, versions and
devices are in its `telemetry`, free in form but for the numbers that the report shows.
Accuracies are percentages over the test images of the classes seen so far, classes are
positions in the class order:

    num_old, num_seen         classes of earlier steps; and with this step's
    train_images              images in the step's training set, memory included
    memory_images             exemplars among them
    counts                    [num_seen] training images of each class
    top1, top5                top5 is null while fewer than six classes are seen
    top1_base, top1_old,      on the classes of the base step, of all earlier steps
    top1_new                  (null in the base step) and of this step
    top1_by_task              [step + 1] on the classes introduced in each step
    top1_nearest_mean         top-1 of the nearest mean of exemplars; null without a
                              memory (all other accuracies are of the highest score)
    phases                    {name: {"loss": [epochs], "accuracy": [epochs]}} of the
                              phases in the order in which they ran, means over each
                              epoch of training; {} where the step trains nothing
    alpha                     [[update, value], ...], update counted from the start of
                              the phase that learns it; [] where alpha is not learned
    own                       {name: value} of the scalars that the method has learned
                              beside the network; {} for most methods
    parameters_sha256         of all arrays of the network after the step
    confusion                 [[true, predicted, images], ...] in the newest record
                              only, pairs that never occur left out

`read` turns a file of schema 2 into schema 3, so that nothing else need know it: `loss`
and `train_accuracy` become the phase "base" or "incremental", a `finetune_loss` that is
not empty the phase "finetune" without accuracies, and `own` is {}.
"""

import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from bsce_jax import metrics, untrusted
from bsce_jax.errors import UserError
from bsce_jax.report.schema import SCHEMA, SUMMARY, upgraded, validate

__all__ = [
    "FILE_NAME",
    "SCHEMA",
    "deterministic",
    "read",
    "replace",
    "summary",
    "validate",
    "write",
]

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
        own = f"{socket.gethostname()}-{os.getpid()}." if shared else ""
        untrusted.replace(target, data, own)
    except Exception as error:  # object stores raise others than OSError, too
        raise UserError(f"{target} cannot be written: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """One line: the operating system's own words if it has any."""
    words = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return " ".join(words.split())


def read(workdir: epath.PathLike) -> dict[str, Any]:
    """Reads, upgrades and validates WORKDIR/results.json.

    Raises:
      UserError: there is none, it is not JSON, or it breaks the schema.
    """
    path = epath.Path(workdir) / FILE_NAME
    results = untrusted.read_json(path, "a run's workdir")
    try:
        results = upgraded(results)
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
        return dict.fromkeys(SUMMARY)
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
