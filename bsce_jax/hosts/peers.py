"""Notices that another process of a run is gone, and ends this one with a clear line.

A device that waits for a lost process waits for ever; JAX ends such a process after its
own time-out, with a stack trace. So process 0 holds a connection to every other one:
a closed connection, a report of failure or a long silence ends all of them, with
status 2 where what one of them reports is the user's to mend, else with LOST.
"""

import contextlib
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from bsce_jax.errors import one_line

_log = logging.getLogger("bsce_jax")

LOST = 3  # exit status where another process is gone
USER = 2  # exit status of an error that the same command would meet again
_BEAT = 1.0  # seconds between two signs of life
_CONNECT = 5.0  # seconds to try an address
_SAVE = 30.0  # seconds for `before_exit`, such as a save that is still running
_OUTLAST = 5.0  # seconds that process 0 gives the others to end before it does
_WIDTH = 512  # bytes of the first process's addresses
_DONE, _ALIVE, _FAILED = b"done", b"alive", b"failed "


class Peers:
    """The watch of one process; every process of the run starts one.

    Attributes:
      index: number of this process.
      count: of all processes.
      before_exit: called with a bound in seconds before this process is ended, by the
        watch or by `fail`; for what would be lost with it.
    """

    def __init__(self, patience: float) -> None:
        """Connects the processes.

        Args:
          patience: seconds of silence after which a process is lost.
        """
        self.index, self.count = jax.process_index(), jax.process_count()
        self.before_exit: Callable[[float], None] | None = None
        self._patience = patience
        self._ending = threading.Lock()  # held by the thread that decides how it ends
        self._closed = False
        self._leaving: set[int] = set()
        self._selector = selectors.DefaultSelector()
        self._heard: dict[int, float] = {}
        self._parts: dict[int, bytes] = {}
        self._connect()
        self._watch = threading.Thread(target=self._run, name="peers", daemon=True)
        self._watch.start()

    def close(self) -> None:
        """Ends the watch and tells the others that this process is done.

        They no longer mind its silence. Where the watch is ending this process
        already, for an error of another one, this never returns.
        """
        self._decide()
        self._tell(_DONE)

    def fail(self, message: str, status: int) -> NoReturn:
        """Says why this process ends, tells the others and ends it.

        They end too: with status 2 if that is this one's, else with LOST. Process 0
        waits some seconds for them to do so. Where the watch is ending this process
        already, it says its own reason instead.

        Args:
          message: one line.
          status: exit status of this process.
        """
        self._decide()
        self._exit(message, status, f"process {self.index} failed: {message}")

    def lost(self, error: Exception) -> NoReturn:
        """Ends this process, with LOST, for an error of a computation over all of them.

        What the others have to say about it is waited for, and said instead.
        """
        time.sleep(3 * _BEAT)
        self._decide()
        self._exit_for(f"a computation over all processes failed ({_line(error)})")

    def _connect(self) -> None:
        """Process 0 tells the others its addresses through JAX, and accepts them."""
        listener = socket.create_server(("", 0)) if self.index == 0 else None
        token = secrets.token_bytes(16) if listener else bytes(16)
        hosts = _addresses() if listener else []
        port = listener.getsockname()[1] if listener else 0
        told = f"{port} {' '.join(hosts)}".encode()[:_WIDTH].ljust(_WIDTH)
        mine = np.frombuffer(token + told, np.uint8)
        everyones = np.asarray(multihost_utils.broadcast_one_to_all(mine)).tobytes()
        token, told = everyones[:16], everyones[16:]
        if listener:
            self._accept(listener, token)
        else:
            self._reach(told.decode(), token)

    def _accept(self, listener: socket.socket, token: bytes) -> None:
        deadline = time.monotonic() + 4 * _CONNECT
        with listener:
            while len(self._heard) < self.count - 1:
                listener.settimeout(max(0.1, deadline - time.monotonic()))
                try:
                    connection, _ = listener.accept()
                    connection.settimeout(_CONNECT)
                    greeting = _receive(connection, 20)
                except OSError:
                    if time.monotonic() > deadline:
                        return self._unwatched("not all processes have connected")
                    continue
                if greeting[:16] != token:
                    connection.close()
                    continue
                self._add(int.from_bytes(greeting[16:], "big"), connection)
        return None

    def _reach(self, told: str, token: bytes) -> None:
        port, *hosts = told.split()
        for host in hosts:
            try:
                connection = socket.create_connection((host, int(port)), _CONNECT)
                connection.sendall(token + self.index.to_bytes(4, "big"))
            except OSError:
                continue
            return self._add(0, connection)
        return self._unwatched(f"cannot reach process 0 at {', '.join(hosts)}")

    def _unwatched(self, reason: str) -> None:
        _log.warning("%s: a lost process is noticed by JAX's time-out only", reason)

    def _add(self, number: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, number)
        self._heard[number], self._parts[number] = time.monotonic(), b""

    def _tell(self, message: bytes, besides: int = -1) -> None:
        """Sends a line to all connected processes; one that is gone is no error."""
        for key in list(self._selector.get_map().values()):
            if key.data != besides:
                with contextlib.suppress(OSError):
                    key.fileobj.send(message + b"\n")  # type: ignore[union-attr]

    def _run(self) -> None:
        beat = time.monotonic()
        while self._heard and not self._closed:
            for key, _ in self._selector.select(timeout=_BEAT / 2):
                self._listen(key)
            now = time.monotonic()
            if now - beat > _BEAT:
                beat = now
                self._tell(_ALIVE)
            for number, heard in self._heard.items():
                if number not in self._leaving and now - heard > self._patience:
                    self._end(
                        f"process {number} has given no sign of life for "
                        f"{self._patience:g} s",
                        number,
                    )

    def _listen(self, key: selectors.SelectorKey) -> None:
        number = key.data
        found = self._read(key)
        if not found:
            if number not in self._leaving:
                self._end(f"process {number} is gone", number)
            return
        self._heard[number] = time.monotonic()
        *lines, self._parts[number] = (self._parts[number] + found).split(b"\n")
        for line in lines:
            if line.startswith(_FAILED):
                self._told(number, line.removeprefix(_FAILED).decode(errors="replace"))
            elif line == _DONE:
                self._leaving.add(number)

    def _read(self, key: selectors.SelectorKey) -> bytes:
        """What a process has sent; nothing where it has hung up."""
        try:
            found = key.fileobj.recv(4096)  # type: ignore[union-attr]
        except OSError:
            found = b""
        if not found:
            self._selector.unregister(key.fileobj)
        return found

    def _told(self, number: int, report: str) -> None:
        """Ends this process for the failure that another one has reported."""
        status, _, reason = report.partition(" ")
        if status != str(USER):
            return self._end(reason, number)
        # All may meet the same error at once: each has the time to say its own.
        time.sleep(_BEAT)
        return self._end(reason, number, USER)

    def _decide(self) -> None:
        """The main thread decides how this process ends; waits if the watch does."""
        self._ending.acquire()
        self._closed = True
        self._watch.join()

    def _end(self, reason: str, source: int, status: int = LOST) -> None:
        """The watch decides how this process ends, unless the main thread does."""
        if self._ending.acquire(blocking=False):
            self._exit_for(reason, source, status)

    def _exit_for(self, reason: str, source: int = -1, status: int = LOST) -> NoReturn:
        line = f"process {self.index} ends: {reason}"
        if status == LOST:
            line += (
                ". The same command on every host continues from the last checkpoint"
            )
        self._exit(line, status, reason, source)

    def _exit(self, line: str, status: int, report: str, source: int = -1) -> NoReturn:
        """Ends the process even if the main thread is in a call that never returns.

        Args:
          line: for the user.
          status: exit status.
          report: for the other processes.
          source: the process that has given the reason.
        """
        with contextlib.suppress(OSError):  # a pipe that nobody reads any more
            sys.stderr.write(f"bsce_jax: {line}\n")
            sys.stderr.flush()
        text = " ".join(f"{status} {report}".split())
        self._tell(_FAILED + text.encode(), besides=source)
        if self.before_exit is not None:
            self.before_exit(_SAVE)
        if self.index == 0:
            self._outlast(source)
        os._exit(status)

    def _outlast(self, source: int) -> None:
        """Waits until the others have ended: JAX aborts them once process 0 has."""
        deadline = time.monotonic() + _OUTLAST
        while time.monotonic() < deadline:
            left = {key.data for key in self._selector.get_map().values()}
            if left <= {source}:
                return
            for key, _ in self._selector.select(timeout=_BEAT / 2):
                self._read(key)


def _addresses() -> list[str]:
    """Where other hosts may reach this one, the likeliest first."""
    found = []
    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: asks for the route
        found.append(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        found.append(socket.gethostbyname(socket.gethostname()))
    return list(dict.fromkeys([*found, socket.gethostname(), "127.0.0.1"]))


def _receive(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count and (part := connection.recv(count - len(found))):
        found += part
    return found


def _line(error: Exception) -> str:
    return one_line(error)[:160]
