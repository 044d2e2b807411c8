"""Notices that another process of a run is gone, and ends this one with a clear line.

A device that waits for a lost process waits for ever; JAX ends such a process after its
own time-out, with a stack trace. So process 0 holds a connection to every other one:
a closed connection, a report of failure or a long silence ends all of them.
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

import jax
import numpy as np
from jax.experimental import multihost_utils

_log = logging.getLogger("bsce_jax")

LOST = 3  # exit status where another process is gone
_BEAT = 1.0  # seconds between two signs of life
_CONNECT = 5.0  # seconds to try an address
_WIDTH = 512  # bytes of the first process's addresses
_DONE, _ALIVE, _FAILED = b"done", b"alive", b"failed "


class Peers:
    """The watch of one process; every process of the run starts one."""

    def __init__(self, patience: float) -> None:
        """Connects the processes.

        Args:
          patience: seconds of silence after which a process is lost.
        """
        self.index, self.count = jax.process_index(), jax.process_count()
        self._patience = patience
        self._closed = False
        self._leaving: dict[int, bytes] = {}
        self._selector = selectors.DefaultSelector()
        self._heard: dict[int, float] = {}
        self._parts: dict[int, bytes] = {}
        self._connect()
        if self._heard:
            name = "peers"
            threading.Thread(target=self._run, name=name, daemon=True).start()

    def close(self) -> None:
        """This process is done: its silence means nothing any more."""
        self._closed = True
        self._tell(_DONE)

    def fail(self, message: str) -> None:
        """Tells the others why this process ends."""
        self._closed = True
        self._tell(_FAILED + " ".join(message.split()).encode())

    def lost(self, error: Exception) -> None:
        """Ends this process for an error of a computation over all of them.

        What the others have to say about it is waited for, and said instead.
        """
        time.sleep(3 * _BEAT)
        self._end(f"a computation over all processes failed ({_line(error)})")

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
        while not self._closed:
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
        number, connection = key.data, key.fileobj
        try:
            found = connection.recv(4096)  # type: ignore[union-attr]
        except OSError:
            found = b""
        if not found:
            self._selector.unregister(connection)
            if number not in self._leaving:
                self._end(f"process {number} is gone", number)
            return
        self._heard[number] = time.monotonic()
        *lines, self._parts[number] = (self._parts[number] + found).split(b"\n")
        for line in lines:
            if line.startswith(_FAILED):
                text = line.removeprefix(_FAILED).decode(errors="replace")
                # Process 0 passes on what it heard, and then it is not its own.
                known = text.startswith("process ")
                self._end(text if known else f"process {number} failed: {text}", number)
            elif line == _DONE:
                self._leaving[number] = line

    def _end(self, reason: str, source: int = -1) -> None:
        if self._closed:
            return
        sys.stderr.write(
            f"bsce_jax: process {self.index} ends: {reason}. The same command on every "
            "host continues from the last checkpoint\n"
        )
        sys.stderr.flush()
        if self.index == 0:
            self._tell(_FAILED + reason.encode(), besides=source)
        os._exit(LOST)  # the main thread may be inside a call that never returns


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
    return " ".join(str(error).split())[:160]
