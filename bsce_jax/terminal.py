"""How a command meets its terminal: Ctrl-C at any moment, closed pipes, any text.

Only the standard library: a command calls `start` before it imports what takes seconds.
"""

import argparse
import errno
import logging
import os
import signal
import sys
import types
from collections.abc import Callable
from typing import NoReturn, TextIO

from bsce_jax.errors import printable


def start() -> None:
    """Makes Ctrl-C end the process at once, in a line, and output never fail on text.

    Where a standard stream is closed, what is written to it is lost, and not what a
    file opened later would get in its place.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.raiseExceptions = False  # a log line that cannot be written
    # A notebook's, which a process of its own may lack; pictures are files here.
    os.environ.pop("MPLBACKEND", None)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, leave)


class Arguments(argparse.ArgumentParser):
    """argparse's parser, whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong and exits with status 2."""
        self.exit(2, f"error: {printable(message)} (all arguments: --help)\n")


class _OneLine(logging.Formatter):
    """A record is a line that does nothing to a terminal; tracebacks stay."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))


def shows_bars(stream: TextIO | None = None) -> bool:
    """Whether a stream, standard error by default, is a terminal that can go back."""
    stream = sys.stderr if stream is None else stream
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def columns(stream: TextIO) -> int:
    """Width of the terminal of a stream; 80 where it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def log_to_stderr() -> None:
    """Shows the package's log lines, and no other library's."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("bsce_jax")
    logger.setLevel(logging.INFO)
    logger.handlers, logger.propagate = [handler], False


def leave(number: int, frame: types.FrameType | None = None) -> NoReturn:
    """Ends the process at once after a signal: a line, and 128 + its number.

    Not by an exception, which callbacks of libraries swallow.
    """
    word = "interrupted" if number == signal.SIGINT else "terminated"
    begin = "\n" if os.isatty(2) else ""  # after ^C, or a progress bar
    try:
        os.write(2, f"{begin}bsce_jax: {word}\n".encode())
    finally:
        os._exit(128 + number)


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a command and ends the process with the status that it returns.

    Quietly where nobody reads its output any more; in a line where the output cannot
    be written.
    """
    try:
        status = main()
        sys.stdout.flush()
        sys.stderr.flush()
    except KeyboardInterrupt:
        leave(signal.SIGINT)
    except BrokenPipeError:
        status = _without_output(0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO) or error.filename is not None:
            raise
        os.write(2, f"bsce_jax: output cannot be written: {error.strerror}\n".encode())
        status = _without_output(1)
    if status in (1, 2, 3):
        # Where something is left undone at once: Python would wait for threads, such as
        # one whose file server does not answer, or that compiles.
        os._exit(status)
    sys.exit(status)


def _without_output(status: int) -> int:
    """Drops what is still to be written: Python would try again as it ends."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    return status
