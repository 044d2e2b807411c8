"""Jobs of the paper's tables: made-up ones, and those of a small data set."""

import pathlib

from bsce_jax.reproduce.tables import Chosen, Job, configs_folder
from tests import runs

CONFIG = """
from bsce_jax.config import (
    COMMON_ARGUMENTS,
    apply_arguments,
    default_config,
    method_module,
)

def get_config(argument=None):
    c = default_config()
    apply_arguments(c, argument, COMMON_ARGUMENTS)
    method_module({method_file!r}, c.method).configure(c, "digits")
    c.data.name, c.data.data_dir = "blobs", {data_dir!r}
    c.data.mean, c.data.std, c.data.padding, c.data.flip = (0.5,), (0.5,), 1, False
    c.scenario.base_classes, c.scenario.steps = 4, 2
    c.memory.per_class = 3
    c.model.width = 4
    c.model.conv_chunks = 1
    c.optim.batch_size = 16
    c.phase.base.epochs, c.phase.base.milestones = 2, (1,)
    c.phase.incremental.epochs, c.phase.incremental.milestones = 1, (1,)
    c.meta.every, c.meta.batch_size = 2, 8
    return c
"""


def write_config(folder: pathlib.Path) -> pathlib.Path:
    """A configuration of CIFAR-100's arguments for a data set of six classes."""
    runs.blobs(folder / "data", 6)
    path = folder / "small.py"
    path.write_text(
        CONFIG.format(
            method_file=str(runs.ROOT / "configs" / "x.py"),
            data_dir=str(folder / "data"),
        )
    )
    return path


def chosen(small, tables=("table5",), **changes) -> Chosen:
    values = {
        "tables": tuple(tables),
        "dataset": "cifar100",
        "rows": (),
        "columns": (),
        "seeds": 1,
        "files": {"cifar100": str(small)},
        "overrides": (),
        "folder": configs_folder(),
    }
    return Chosen(**{**values, **changes})


def fake(name: str, base: str, updates: int = 10, base_updates: int = 4) -> Job:
    return Job(name, 0, (), f"hash of {name}", base, updates, base_updates)
