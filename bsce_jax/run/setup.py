"""The fixed parts of a run."""

import dataclasses
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from bsce_jax.checkpoints.writer import Writer
from bsce_jax.compute import parallel
from bsce_jax.config.hashes import config_hash, flatten
from bsce_jax.report import results as results_file
from bsce_jax.run import base_hash, feed, loop, phases
from bsce_jax.run.dataset import Dataset, Split, load
from bsce_jax.run.feed import Feed
from bsce_jax.run.monitor import Monitor
from bsce_jax.run.programs import Programs, build
from bsce_jax.telemetry import environment


@dataclasses.dataclass
class Run:
    """A run's fixed parts and its progress so far."""

    config: ConfigDict
    workdir: epath.Path
    dataset: Dataset
    programs: Programs
    train: Feed
    test: Feed
    results: dict[str, Any]
    monitor: Monitor
    writer: Writer = dataclasses.field(default_factory=Writer)
    saved: int = -1  # number of the newest checkpoint that this process knows

    @property
    def checkpoints(self) -> epath.Path:
        """Folder of the numbered checkpoints."""
        return self.workdir / "checkpoints"


def prepare(config: ConfigDict, workdir: epath.Path) -> Run:
    """Reads the data, places it on the devices and builds the programs."""
    devices = parallel.create(config.parallel)
    dataset = load(config)
    results = {
        "schema": results_file.SCHEMA,
        "name": config.name,
        "status": "running",
        "config": flatten(config),
        "config_hash": config_hash(config),
        "base_hash": base_hash.base_hash(config, dataset),
        "class_names": list(dataset.class_names),
        "class_order": [int(i) for i in dataset.class_order],
        "image_shape": list(dataset.image_shape),
        "steps": [],
        "summary": results_file.summary([]),
    }

    parallel.require_same(
        {
            "configuration": results["config_hash"],
            "data set": (
                results["class_order"],
                results["class_names"],
                dataset.train_labels.tobytes(),
                dataset.test_labels.tobytes(),
            ),
            "version of a package": environment.versions(),
        }
    )

    def create_feed(split: Split) -> feed.Feed:
        return feed.create(config, devices, split, dataset.image_shape)

    updates = [
        loop.make_plan(config, data).updates
        for data in phases.planned_phases(config, dataset)
    ]
    return Run(
        config,
        workdir,
        dataset,
        build(config, devices, dataset.num_classes),
        create_feed(dataset.train),
        create_feed(dataset.test),
        results,
        Monitor(workdir, len(dataset.groups), sum(updates), config.log_seconds),
    )
