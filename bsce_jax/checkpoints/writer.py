"""Checkpoints written in the background, while the training goes on."""

import concurrent.futures
import json
import logging
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import jax
from etils import epath

from bsce_jax.checkpoints import store

_log = logging.getLogger(__name__)


class Writer:
    """Saves checkpoints in a thread of the first process, one at a time.

    The caller waits only for the copy of the arrays to the host, and for a save that
    is still running. No other process takes part: there, all methods do nothing.

    Use as a context manager: what is still to be written at the end of the program is
    lost otherwise. An error of the background is raised once, by whichever method is
    called next.

    Attributes:
      stalled: seconds that calls of `save` have taken, all together.
    """

    def __init__(self) -> None:
        """Nothing is written yet."""
        self.stalled = 0.0
        self._threads = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._running: concurrent.futures.Future[None] | None = None

    def save(
        self,
        directory: epath.PathLike,
        number: int,
        arrays: Any,
        meta: Mapping[str, Any],
        *,
        keep: int = 2,
        then: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """As `store.save`, but returns as soon as arrays and meta are copied.

        Args:
          directory, number, arrays, meta, keep: see there. The caller may change or
            donate the arrays, and change what meta holds, once this has returned.
          then: called with the copy of meta once the checkpoint is on the disk, in the
            background.

        Raises:
          CheckpointError, or what `then` raised: of the save before.
          TypeError: as there.
        """
        if jax.process_index() != 0:
            return
        started = time.monotonic()
        self.wait()
        fixed = json.loads(json.dumps(dict(meta)))
        copies = store.host_copy(arrays)

        def work() -> None:
            store.save(directory, number, copies, fixed, keep=keep)
            if then is not None:
                then(fixed)

        self._running = self._threads.submit(work)
        self.stalled += time.monotonic() - started

    def check(self) -> None:
        """Raises the error of a save that has ended; never waits."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Returns when everything is on the disk; raises the error of the save."""
        if self._running is not None:
            # Forgotten only when it has ended: an interrupted wait can be repeated.
            concurrent.futures.wait([self._running])
            running, self._running = self._running, None
            running.result()

    def wait_at_most(self, seconds: float) -> None:
        """As `wait`, for so long; from any thread. An error is not raised here."""
        running = self._running
        if running is not None:
            concurrent.futures.wait([running], seconds)

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Waits; an error of the save is raised, or logged where there is another."""
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            _log.warning("%s", failure)
        finally:
            self._threads.shutdown()
