"""SIGTERM and Ctrl-C ask a run to save and end."""

import signal
import threading
import types

from bsce_jax import terminal


class StopSignal:
    """SIGTERM and Ctrl-C ask the run to save and end; a second Ctrl-C ends it at once.

    A second SIGTERM changes nothing: a scheduler may send one to every process, and the
    parent of this one another. Who cannot wait has SIGKILL. Before there is anything to
    save, a signal ends the process at once.

    Use as a context manager in the main thread; elsewhere it never stops.
    """

    def __init__(self, waits: bool = True) -> None:
        """No signal yet (0); handlers are installed on entry.

        Args:
          waits: whether there is something to save from the start; else from
            `begin_to_wait` on.
        """
        self.number = 0
        self._waits = waits
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        """Installs the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        """Restores the earlier handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def begin_to_wait(self) -> None:
        """From now on there is something to save."""
        self._waits = True

    def ignore(self) -> None:
        """The run has stopped: signals that come late must not change its status."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)
        self._previous = {}

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if not self._waits:
            terminal.leave(number)
        self.number = self.number or number
        signal.signal(signal.SIGINT, self._previous[signal.SIGINT])  # type: ignore[arg-type]
