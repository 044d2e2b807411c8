"""What a run shows while it runs, and the telemetry of each step's record."""

import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from bsce_jax.compute import parallel
from bsce_jax.report import tables
from bsce_jax.run.loop import History, Training
from bsce_jax.telemetry import compiles, environment
from bsce_jax.telemetry.bar import Bar
from bsce_jax.telemetry.events import Timeline


class Monitor:
    """Progress, TensorBoard events, timings and compile counts of one process."""

    def __init__(
        self, workdir: epath.Path, steps: int, updates: int, log_seconds: float
    ) -> None:
        """Starts the clocks and the compile counts.

        Args:
          workdir: event files go to its "tensorboard".
          steps: of the whole run.
          updates: of the whole run.
          log_seconds: least time between two log lines, without a terminal.
        """
        self._workdir, self._steps, self._total = workdir, steps, updates
        self._log_seconds = log_seconds
        self._environment = environment.environment()
        self._compiles = compiles.compile_counter()
        self._started = self._step_started = time.time()
        self._earlier = 0.0
        self._first_update: float | None = None
        self._images, self._training, self._done = 0, 0.0, 0
        self._last_call: float | None = None
        self._bar: Bar | None = None
        self._timeline: Timeline | None = None

    def start(self, update: int) -> None:
        """Opens the display; this process begins at `update` of the run."""
        self._done = update
        first, folder = parallel.is_first(), self._workdir / "tensorboard"
        self._bar = Bar(self._total, update, seconds=self._log_seconds, enabled=first)
        self._timeline = Timeline(folder, update, enabled=first)

    def begin_step(self, seconds: float = 0.0) -> None:
        """Starts the clocks of a step, on which `seconds` were spent before."""
        self._step_started, self._images, self._training = time.time(), 0, 0.0
        self._earlier, self._last_call = seconds, None

    def begin_phase(self) -> None:
        """What was done since the phase before, and a compile, is not training."""
        self._last_call = None

    def step_seconds(self) -> float:
        """Wall clock of the step, of earlier processes up to their checkpoint too."""
        return self._earlier + time.time() - self._step_started

    def trained(
        self, training: Training, history: History, before: int, images: int
    ) -> None:
        """Takes note of a finished call.

        Args:
          training: of the phase.
          history: of the phase, after the call.
          before: updates of earlier steps and phases.
          images: of the call.
        """
        assert self._bar is not None and self._timeline is not None
        now = time.time()
        if self._first_update is None:
            self._first_update = now
        if self._last_call is not None:  # the first call compiles
            self._images += images
            self._training += now - self._last_call
        self._last_call = now
        epochs = len(history.loss)
        step, phase = training.data.step, training.data.phase
        where = f"step {step}/{self._steps - 1}, "
        where += f"{phase.name}, " if phase.first_epoch else ""
        where += f"epoch {min(epochs + 1, phase.epochs)}/{phase.epochs}"
        loss = history.loss[-1] if epochs else None
        first = (self._done - before) // training.updates_per_epoch
        done = before + history.updates
        self._bar.advance(done - self._done, images, loss, where)
        self._done = done
        for epoch in range(first, epochs):  # finished in this call
            values = {
                "train/loss": history.loss[epoch],
                "train/accuracy": history.accuracy[epoch],
                "train/learning_rate": training.learning_rates[epoch],
            }
            if history.alpha:
                values["train/alpha"] = history.alpha[epoch][1]
            update = before + (epoch + 1) * training.updates_per_epoch
            self._timeline.scalars(update, values)

    def evaluated(self, step: int, update: int, result: Mapping[str, Any]) -> None:
        """Shows a step's accuracies; `update` counts over the whole run."""
        assert self._bar is not None and self._timeline is not None
        found = {n: result[n] for n in tables.COLUMNS if result[n] is not None}
        self._timeline.scalars(update, {f"test/{k}": v for k, v in found.items()})
        accuracies = [
            f"{tables.COLUMNS[name]} {value:.2f}"
            for name, value in found.items()
            if name != "top5"  # a line is for 80 columns
        ]
        line = f"step {step}/{self._steps - 1}: {result['num_seen']} classes"
        self._bar.note(line, accuracies)

    def flush(self) -> None:
        """Puts the events so far on the disk, before the checkpoint they belong to."""
        if self._timeline is not None:
            self._timeline.flush()

    def step_telemetry(self) -> dict[str, Any]:
        """Timings, compile counts and environment, for the step's record."""
        now = time.time()
        rate = self._images / self._training if self._training else None
        first = self._first_update
        return {
            "seconds": self.step_seconds(),
            "images_per_second": rate,
            "seconds_to_first_update": first and first - self._started,
            "started": self._started,
            "finished": now,
            "compiles": dict(sorted(self._compiles.items())),
            **self._environment,
        }

    def close(self) -> None:
        """Ends the display and the event file."""
        if self._bar is not None and self._timeline is not None:
            self._bar.close()
            self._timeline.close()
