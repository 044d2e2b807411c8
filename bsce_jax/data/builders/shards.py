"""Writes records to array_record files of limited size, each record once."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

SHARD_BYTES = 512 << 20
# Records one by one. Compressing images, which are compressed, takes six times as long
# and saves nothing.
OPTIONS = "group_size:1,uncompressed"


class Shards:
    """The files of a split, named as tfds names them.

    Attributes:
      num_bytes: of all records so far.
    """

    def __init__(self, folder: pathlib.Path, prefix: str) -> None:
        """Takes the folder of the files and "NAME-SPLIT", with which they begin."""
        self._folder, self._prefix = folder, prefix
        self._writer: Any = None
        self._lengths: list[int] = []
        self._bytes = 0  # of the file that is being written
        self.num_bytes = 0

    def add(self, record: bytes) -> None:
        """Appends a record.

        Raises:
          OSError: it, or one before, cannot be written.
        """
        if self._writer is None or self._bytes > SHARD_BYTES:
            self._finish()
            path = self._folder / f"{self._prefix}-{len(self._lengths)}"
            self._writer = self._call(ArrayRecordWriter, str(path), OPTIONS)
            self._lengths.append(0)
            self._bytes = 0
        self._call(self._writer.write, record)
        self._lengths[-1] += 1
        self._bytes += len(record)
        self.num_bytes += len(record)

    def close(self) -> list[int]:
        """Finishes the last file and returns the number of records of each.

        Raises:
          OSError: a record cannot be written.
        """
        self._finish()
        count = len(self._lengths)
        for i in range(count):
            name = f"{self._prefix}.array_record-{i:05d}-of-{count:05d}"
            os.rename(self._folder / f"{self._prefix}-{i}", self._folder / name)
        return self._lengths

    def _finish(self) -> None:
        if self._writer is not None:
            self._call(self._writer.close)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except RuntimeError as error:  # array_record's only one
            raise OSError(str(error).partition(";")[0]) from error
