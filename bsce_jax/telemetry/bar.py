"""What a run shows while it runs: a bar on a terminal, log lines elsewhere.

On several hosts only the first process shows anything; the others call the same
functions to no effect.
"""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO, TypeVar

from bsce_jax import terminal

logger = logging.getLogger("bsce_jax")
T = TypeVar("T")

_WINDOW_SECONDS = 60.0  # rates are means over this long
_LEAST_BAR = 10  # characters, else something less important gives way


class Bar:
    """Progress of a whole run: a bar on a terminal, now and then a log line elsewhere.

    Shows updates done of all updates of all steps, images/s and the time left at the
    pace of the last minute, and the newest loss.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        *,
        seconds: float = 60.0,
        stream: TextIO | None = None,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the display.

        Args:
          total: updates of the run, all steps together.
          done: updates already done by an earlier process.
          seconds: least time between two log lines.
          stream: where the bar goes if it is a terminal; None = standard error.
          enabled: whether to show anything: one of several processes does.
          clock: time in seconds.
        """
        stream = sys.stderr if stream is None else stream
        self._total, self._done, self._images = total, done, 0
        self._seconds, self._clock = seconds, clock
        self._enabled = enabled
        self._where = ""
        self._loss: float | None = None
        self._shown = clock()
        self._marks = deque([(self._shown, done, 0)])
        self._tqdm: Any = None
        if self._enabled and terminal.shows_bars(stream):
            from tqdm import tqdm

            self._tqdm = tqdm(
                total=total,
                initial=done,
                file=stream,
                dynamic_ncols=True,
                bar_format="{desc}{percentage:3.0f}%|{bar}|{postfix}",
            )

    def advance(
        self, updates: int, images: int, loss: float | None = None, where: str = ""
    ) -> None:
        """Counts finished updates.

        Args:
          updates: since the last call.
          images: training images in them, of all hosts.
          loss: the newest; None = as before.
          where: position in the run, "step 2/5, epoch 14/60"; "" = as before.
        """
        self._done += updates
        self._images += images
        self._where = where or self._where
        self._loss = self._loss if loss is None else loss
        if not self._enabled:
            return
        now = self._clock()
        interval = 0.2 if self._tqdm is not None else self._seconds
        if now - self._shown >= interval:
            self._show(now)

    def note(self, message: str, more: Iterable[str] = ()) -> None:
        """Shows a line that stays: above the bar, or in the log.

        Args:
          message: the line.
          more: that follows after commas as far as it fits above the bar.
        """
        for part in more:
            longer = f"{message}, {part}"
            if self._tqdm is None or len(longer) < terminal.columns(self._tqdm.fp):
                message = longer
        if self._tqdm is not None:
            self._tqdm.write(message, file=self._tqdm.fp)
        elif self._enabled:
            logger.info("%s", message)

    def close(self) -> None:
        """Shows the last state and ends the bar."""
        if not self._enabled:
            return
        self._show(self._clock())
        if self._tqdm is not None:
            self._tqdm.close()
        self._enabled, self._tqdm = False, None

    def _show(self, now: float) -> None:
        self._shown = now
        updates_per_second, images_per_second = self._rates(now)
        self._marks.append((now, self._done, self._images))
        while now - self._marks[1][0] > _WINDOW_SECONDS:
            self._marks.popleft()
        parts = {
            "where": self._where,
            "updates": f"{self._done}/{self._total} updates",
            "rate": f"{images_per_second:.0f} images/s",
        }
        if self._loss is not None:
            parts["loss"] = f"loss {self._loss:.4g}"
        if updates_per_second:
            left = (self._total - self._done) / updates_per_second
            parts["left"] = f"{_duration(left)} left"
        if self._tqdm is None:
            logger.info("%s", ", ".join(filter(None, parts.values())))
            return
        room = terminal.columns(self._tqdm.fp) - len("100%||") - _LEAST_BAR
        for name in ("rate", "loss", "updates", "where"):
            if len(", ".join(parts.values())) > room:
                parts.pop(name, None)
        where = parts.pop("where", "")
        self._tqdm.n = self._done
        self._tqdm.set_description_str(where and f"{where} ", refresh=False)
        self._tqdm.set_postfix_str(", ".join(parts.values()), refresh=False)
        self._tqdm.refresh()

    def _rates(self, now: float) -> tuple[float, float]:
        """Updates and images a second since the oldest mark of the last minute."""
        start, done, images = self._marks[0]
        elapsed = now - start
        if elapsed <= 0:
            return 0.0, 0.0
        return (self._done - done) / elapsed, (self._images - images) / elapsed


def passing(
    batches: Iterable[T],
    total: int,
    each: int,
    what: str,
    patience: float = 5.0,
    interval: float = 60.0,
    enabled: bool = True,
) -> Iterator[T]:
    """Yields the batches of a pass over a set of images.

    Where that takes long it is shown how far it is: a bar below that of the run on a
    terminal, now and then a log line elsewhere.

    Args:
      batches: of the pass.
      total: images of the set.
      each: images of a batch; the last one may have fewer.
      what: the pass is for.
      patience: seconds before a bar is shown.
      interval: seconds before a log line, and from one to the next.
      enabled: whether to show anything: one of several processes does.
    """
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc=what,
        unit=" images",
        delay=patience,
        leave=False,
        disable=not (enabled and terminal.shows_bars()),
    ) as bar:
        shown = time.monotonic()
        for number, batch in enumerate(batches, 1):
            yield batch
            done = min(number * each, total)
            if not bar.disable:
                bar.update(done - bar.n)
            elif enabled and time.monotonic() - shown >= interval and done < total:
                shown = time.monotonic()
                logger.info("%s: %d/%d images", what, done, total)


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
