"""Orbax for one process: a folder of named arrays and JSON, and errors in one line.

Orbax writes under a temporary name and renames the folder; on gs:// it writes under the
final name, and `COMMITTED` last.
"""

import gc
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from bsce_jax.errors import UserError, one_line

_FILE = "data.json"
MANIFEST = f"manifest/{_FILE}"  # the JSON, in a folder written here
COMMITTED = "commit_success.txt"


def write(
    path: epath.Path, arrays: Mapping[str, np.ndarray], manifest: Mapping[str, Any]
) -> None:
    """Writes a new folder with arrays, not empty, by name, and a JSON."""
    items = ocp.args.Composite(
        arrays=ocp.args.PyTreeSave(dict(arrays)),
        manifest=ocp.args.JsonSave(manifest),
    )
    with _checkpointer() as checkpointer:
        checkpointer.save(path, items)


def read(path: epath.Path, wanted: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of a folder; `wanted` has their names, shapes and dtypes."""
    kinds = {name: ocp.RestoreArgs(np.ndarray) for name in wanted}
    items = ocp.args.Composite(
        arrays=ocp.args.PyTreeRestore(dict(wanted), kinds, partial_restore=True)
    )
    with _checkpointer() as checkpointer:
        return checkpointer.restore(path, items)["arrays"]


def _checkpointer() -> ocp.Checkpointer:
    """Orbax for this process alone, without barriers.

    Another process may be elsewhere, or gone; and in a background thread a collective
    would mix with those of the training. Orbax's v1 interface has one in each save.
    """
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process{process}",
    )
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
        arrays=ocp.PyTreeCheckpointHandler(
            # Compressed float32 weights are 7 % smaller and take twice as long.
            use_compression=False,
            multiprocessing_options=alone,
        ),
        manifest=ocp.JsonCheckpointHandler(_FILE, multiprocessing_options=alone),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def attempt(action: Callable[[], Any], failure: Callable[[str], Exception]) -> Any:
    """Calls Orbax; raises ``failure(reason)`` for whatever goes wrong.

    The reason is one line. A UserError is let through.

    Each layer below has its own exceptions for a full disk or a damaged file. When one
    gives up, operations in flight report to an event loop that is closed, and abandoned
    tasks complain when they are collected: both are waited for and silenced.
    """
    hook, log = sys.unraisablehook, logging.getLogger("asyncio")

    def quiet(event: Any) -> None:
        if str(event.exc_value) != "Event loop is closed":
            hook(event)

    sys.unraisablehook = quiet
    log.addFilter(_is_news)
    try:
        try:
            return action()
        except UserError:
            raise
        except Exception as error:
            said = reason(error)
        # After the handler, where nothing refers to Orbax's tasks any more.
        time.sleep(0.2)
        gc.collect()
        raise failure(said)
    finally:
        log.removeFilter(_is_news)
        sys.unraisablehook = hook


def reason(error: BaseException) -> str:
    """One line for an exception: the operating system's own words if it has any."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        if code := re.search(r"os_error_code='(\d+)'", str(cause)):  # TensorStore's
            return os.strerror(int(code[1]))
        error, hidden = cause, cause.__suppress_context__
        cause = cause.__cause__ or (None if hidden else cause.__context__)
    return f"{type(error).__name__}: {one_line(error)[:200]}"


def _is_news(record: logging.LogRecord) -> bool:
    """False for Orbax's dozens of lines a save; what matters is in its exceptions."""
    chatter = "/orbax/" in record.pathname or "never retrieved" in record.getMessage()
    return not chatter


absl.logging.get_absl_logger().addFilter(_is_news)
