"""The fixed parts of a run: data on the devices, programs, clocks, the writer."""

import dataclasses
from collections.abc import Callable
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from bsce_jax.checkpoints import store
from bsce_jax.checkpoints.writer import Writer
from bsce_jax.compute import parallel
from bsce_jax.compute.state import Network
from bsce_jax.config.hashes import config_hash, flatten
from bsce_jax.report import results
from bsce_jax.run import dataset
from bsce_jax.run.base_hash import base_hash
from bsce_jax.run.context import evaluation_context
from bsce_jax.run.evaluate import Inference
from bsce_jax.run.feed import Feed, create
from bsce_jax.run.loop import make_training
from bsce_jax.run.monitor import Monitor
from bsce_jax.run.phases import Phase, configured, phases_of, planned
from bsce_jax.run.programs import Programs, build
from bsce_jax.run.trial import check_losses
from bsce_jax.telemetry import environment


@dataclasses.dataclass
class Run:
    """A run's fixed parts and its results so far.

    Attributes:
      config: resolved.
      workdir: folder of everything the run writes.
      dataset: all images, in class order.
      phases: that exist, in order.
      programs: compiled functions.
      train, test: feeds of the images of each split.
      results: what results.json will say, see bsce_jax.report.results.
      monitor: what is shown and measured.
      writer: of checkpoints.
      saved: number of the newest checkpoint that this process knows.
      still_there: raises a UserError where the workdir is gone.
    """

    config: ConfigDict
    workdir: epath.Path
    dataset: dataset.Dataset
    phases: tuple[Phase, ...]
    programs: Programs
    train: Feed
    test: Feed
    results: dict[str, Any]
    monitor: Monitor
    writer: Writer = dataclasses.field(default_factory=Writer)
    saved: int = -1
    still_there: Callable[[], None] = lambda: None

    @property
    def checkpoints(self) -> epath.Path:
        """Folder of the numbered checkpoints."""
        return self.workdir / store.FOLDER

    @property
    def devices(self) -> parallel.Parallel:
        """Where it runs."""
        return self.programs.devices

    def phases_of(self, step: int) -> tuple[Phase, ...]:
        """The phases that run in a step."""
        return phases_of(self.config, self.dataset, self.phases, step)

    def inference(self, feed: Feed, network: Network, step: int) -> Inference:
        """Shows images of a feed to the network of a step."""
        context = evaluation_context(self.dataset, self.devices, step)
        size = self.config.evaluation.batch_size
        return Inference(self.programs, feed, size, network, context)


@dataclasses.dataclass(frozen=True)
class Parts:
    """How a run comes by what several may share: made for it alone, or see `shared`.

    Attributes:
      load: see `dataset.load`.
      build: see `programs.build`.
      create: see `feed.create`.
    """

    load: Callable[..., dataset.Dataset] = dataset.load
    build: Callable[..., Programs] = build
    create: Callable[..., Feed] = create


def prepare(config: ConfigDict, workdir: epath.Path, parts: Parts | None = None) -> Run:
    """Reads the data, places it on the devices and builds the programs.

    Args:
      config: resolved configuration.
      workdir: folder of everything the run writes.
      parts: where data, programs and feeds come from, if they are not its own.

    Raises:
      UserError: bad input; the processes of the run differ.
    """
    parts = parts or Parts()
    devices = parallel.create(config.parallel)
    data = parts.load(config)
    found = _no_results(config, data)
    parallel.require_same(
        {
            "configuration": found["config_hash"],
            "data set": (
                found["class_order"],
                found["class_names"],
                data.train_labels.tobytes(),
                data.test_labels.tobytes(),
                found["data"],
            ),
            "version of a package": environment.versions(),
        }
    )
    plan = planned(config, data)
    updates = [make_training(config, each).updates for each in plan]
    programs = parts.build(config, devices, data.num_classes)
    check_losses(config, data, programs.model, plan)
    return Run(
        config=config,
        workdir=workdir,
        dataset=data,
        phases=configured(config),
        programs=programs,
        train=parts.create(config, devices, data.train, data.image_shape),
        test=parts.create(config, devices, data.test, data.image_shape),
        results=found,
        monitor=Monitor(workdir, len(data.groups), sum(updates), config.log_seconds),
    )


def _no_results(config: ConfigDict, data: dataset.Dataset) -> dict[str, Any]:
    """The results of a run that has finished no step."""
    return {
        "schema": results.SCHEMA,
        "name": config.name,
        "status": "running",
        "config": flatten(config),
        "config_hash": config_hash(config),
        "base_hash": base_hash(config, data),
        "class_names": list(data.class_names),
        "class_order": [int(i) for i in data.class_order],
        "image_shape": list(data.image_shape),
        "data": dataset.facts(data),
        "steps": [],
        "summary": results.summary([]),
    }
