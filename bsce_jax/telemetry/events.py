"""TensorBoard event files, written by the first process."""

import contextlib
import io
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from etils import epath

logger = logging.getLogger("bsce_jax")


class Timeline:
    """TensorBoard events of a run, written without TensorFlow.

    Written through at each flush: tensorboardX's own SummaryWriter keeps points in a
    queue that its flush does not empty, so that a killed run would lose some for good.
    A full or unwritable disk ends the events with a warning, not the run.
    """

    def __init__(
        self, folder: epath.PathLike, update: int = 0, enabled: bool = True
    ) -> None:
        """Opens a new event file.

        Args:
          folder: of the event files; made if it does not exist.
          update: the first update that this process writes. TensorBoard drops what a
            killed process wrote from there on, so that no point is double.
          enabled: whether to write at all: one of several processes does.
        """
        self._writer: Any = None
        if not enabled:
            return
        # Loaded here: it looks for PyTorch and cloud libraries, which takes seconds.
        from tensorboardX import record_writer
        from tensorboardX.proto import event_pb2

        self._event = event_pb2.Event
        folder = epath.Path(folder)
        # TensorBoard reads the files of a folder in the order of their names.
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}"
        # tensorboardX's own way to gs:// needs another library and its credentials.
        record_writer.register_writer_factory("store", _StoreFile)
        prefix = "store:" if "://" in os.fspath(folder) else ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = record_writer.RecordWriter(prefix + os.fspath(folder / name))
        except OSError as error:
            logger.warning("no TensorBoard events: %s", error)
        self._write(file_version="brain.Event:2")
        self._write(step=update, session_log={"status": "START"})
        self.flush()

    def scalars(self, update: int, values: Mapping[str, float]) -> None:
        """Adds values by name at an update, counted over the whole run."""
        points = [
            {"tag": name, "simple_value": float(value)}
            for name, value in values.items()
        ]
        self._write(step=update, summary={"value": points})

    def flush(self) -> None:
        """Puts all points on the disk."""
        self._try(lambda writer: writer.flush())

    def close(self) -> None:
        """Flushes and closes the file; later points are dropped."""
        self.flush()
        self._try(lambda writer: writer.close())
        self._writer = None

    def _write(self, **fields: Any) -> None:
        if self._writer is not None:
            event = self._event(wall_time=time.time(), **fields).SerializeToString()
            self._try(lambda writer: writer.write(event))

    def _try(self, action: Callable[[Any], None]) -> None:
        if self._writer is None:
            return
        try:
            action(self._writer)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None
            logger.warning("no more TensorBoard events: %s", error)


class _StoreFile:
    """A file on an object store, which takes whole files only: at each flush."""

    def __init__(self, path: epath.Path) -> None:
        self._path, self._content = path, io.BytesIO()

    def write(self, data: bytes) -> None:
        self._content.write(data)

    def flush(self) -> None:
        try:
            self._path.write_bytes(self._content.getvalue())
        except Exception as error:  # each store has its own
            raise OSError(" ".join(f"{self._path}: {error}".split())) from error

    close = flush

    @classmethod
    def open(cls, path: str) -> Self:
        """What tensorboardX calls for "store:PATH"."""
        return cls(epath.Path(path.partition(":")[2]))
