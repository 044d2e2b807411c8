"""From the cells of the paper's tables to the runs that fill them.

configs/tables/<table>.py says how a cell is run: COLUMNS maps a column to a
configuration file and arguments, ROWS a row to arguments, and a cell has those of both,
the row's first. An argument whose name begins with "config." is an override of that
field. Cells of one configuration share their runs, also across tables.
"""

import dataclasses
import importlib.util
import math
import pathlib
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from bsce_jax.config import files
from bsce_jax.config.flags import parse
from bsce_jax.config.hashes import config_hash, flatten
from bsce_jax.config.resolve import resolve
from bsce_jax.errors import UserError
from bsce_jax.report import published
from bsce_jax.run import dataset, phases
from bsce_jax.run.base_hash import base_hash
from bsce_jax.run.loop import make_training
from bsce_jax.run.shared import Shared


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that some cells need.

    Attributes:
      name: of its folder.
      seed: what distinguishes runs of one cell.
      flags: --config=FILE:ARGUMENTS and its overrides, for bsce_jax.main.
      config_hash: of all that can change its results.
      base_hash: runs of one hash can share a base step.
      updates, base_updates: of the whole run, and of its base step.
      pixels: of the images of an update, by which updates of different data sets are
        weighed against each other.
      config: flattened configuration.
    """

    name: str
    seed: int
    flags: tuple[str, ...]
    config_hash: str
    base_hash: str
    updates: int
    base_updates: int
    pixels: int = 1
    config: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )


class TableCell(NamedTuple):
    """A cell of a table: its jobs, one a seed, or why there are none.

    `flags` are those of the jobs, and of those that only want their data set.
    """

    table: str
    row: str
    column: str
    missing: str
    jobs: tuple[Job, ...]
    flags: tuple[tuple[str, ...], ...] = ()


@dataclasses.dataclass
class _Known:
    """What cells have in common: data sets, and jobs by the hash of configurations."""

    load: Callable[[ConfigDict], dataset.Dataset]
    jobs: dict[str, Job] = dataclasses.field(default_factory=dict)


class Chosen(NamedTuple):
    """What was asked for.

    Attributes:
      tables: keys, "table1", "figure4", ...
      dataset: configuration file that columns must have; "" = any.
      rows: keys in the order in which they run; "1:lucir" and "4a:..." are rows of that
        table or figure alone; () = all.
      columns: keys; () = all.
      seeds: 0, 1, ... of each cell.
      files: configuration files to take in place of others.
      overrides: "--config.field=value" of every run.
      folder: of the configuration files.
    """

    tables: tuple[str, ...]
    dataset: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    seeds: int
    files: Mapping[str, str]
    overrides: tuple[str, ...]
    folder: pathlib.Path


def configs_folder() -> pathlib.Path:
    """The configs/ of the source tree, or else that of the current folder.

    Raises:
      UserError: there is none.
    """
    for parent in (files.PACKAGE, pathlib.Path.cwd()):
        if (parent / "configs" / "tables").is_dir():
            return parent / "configs"
    raise UserError("no configs/tables: run in the folder of the source tree")


def expand(
    chosen: Chosen, load: Callable[[ConfigDict], dataset.Dataset] | None = None
) -> list[TableCell]:
    """The chosen cells with their jobs, in the order of the rows given, or the tables.

    Args:
      chosen: what was asked for.
      load: see `dataset.load`.

    Raises:
      UserError: an unknown table, row, column, data set or file, nothing chosen, or
        no cell with a valid configuration.
    """
    tables = published.load()
    for key in chosen.tables:
        if key not in tables:
            raise UserError(f"table {key!r}: expected one of {', '.join(tables)}")
    modules = {key: table_module(chosen.folder, key) for key in chosen.tables}
    _check_keys(chosen, tables, modules)
    known, cells = _Known(load or Shared().load), []
    for key, row, column in dict.fromkeys(_chosen_cells(chosen, tables)):
        how = modules[key]
        stem, arguments = how.COLUMNS[column]
        if chosen.dataset not in ("", stem):
            continue
        settings = {**arguments, **how.ROWS[row]}
        found = _cell(chosen, stem, settings, known)
        cells.append(TableCell(key, row, column, *found))
    if not cells:
        raise UserError("no cell is chosen: see --table, --dataset, --rows, --columns")
    if not any(cell.flags for cell in cells):
        raise UserError(f"nothing can be run: {cells[0].missing}")
    return cells


def _cell(
    chosen: Chosen, stem: str, settings: Mapping[str, Any], known: _Known
) -> tuple[str, tuple[Job, ...], tuple[tuple[str, ...], ...]]:
    """Why a cell cannot be run, or "", its jobs, and their flags."""
    file = _file(chosen, stem)
    if not file.exists():
        return f"{file.name} does not exist yet", (), ()
    name = _name(file.stem, settings)
    flags, jobs = [], []
    for seed in range(chosen.seeds):
        flags.append(_flags(chosen, file, settings, seed, name))
        try:
            config = resolve(parse(["reproduce", *flags[-1]]).config)
        except UserError as error:  # such as Meta with a single exemplar
            return str(error), (), ()
        try:
            jobs.append(_job(config, f"{name}-seed{seed}", flags[-1], known))
        except UserError as error:  # such as a data set that is not prepared
            return str(error), (), tuple(flags)
    return "", tuple(jobs), tuple(flags)


def _check_keys(
    chosen: Chosen,
    tables: Mapping[str, published.Table],
    modules: Mapping[str, ModuleType],
) -> None:
    """Refuses rows, columns, data sets and files that none of the tables has."""
    rows = [row.key for key in chosen.tables for row in tables[key].rows]
    rows += [row_of_table(t, row.key) for t in chosen.tables for row in tables[t].rows]
    columns = [column.key for key in chosen.tables for column in tables[key].columns]
    stems = [stem for how in modules.values() for stem, _ in how.COLUMNS.values()]
    for flag, given, allowed in (
        ("row", chosen.rows, rows),
        ("column", chosen.columns, columns),
        ("--dataset", (chosen.dataset,) if chosen.dataset else (), stems),
        ("--file", chosen.files, stems),
    ):
        for key in given:
            if key not in allowed:
                names = ", ".join(dict.fromkeys(allowed))
                where = ", ".join(chosen.tables)
                raise UserError(f"{flag} {key!r} of {where}: one of {names}")


def table_module(folder: pathlib.Path, key: str) -> ModuleType:
    """Loads configs/tables/<key>.py."""
    spec = importlib.util.spec_from_file_location(key, folder / "tables" / f"{key}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _chosen_cells(
    chosen: Chosen, tables: Mapping[str, published.Table]
) -> Iterable[tuple[str, str, str]]:
    """Table, row and column of the cells that were asked for, by their keys."""
    for wanted in chosen.rows or ("",):
        for key in chosen.tables:
            for row in tables[key].rows:
                if wanted not in ("", row.key, row_of_table(key, row.key)):
                    continue
                for column in tables[key].columns:
                    if not chosen.columns or column.key in chosen.columns:
                        yield key, row.key, column.key


def row_of_table(table: str, row: str) -> str:
    """A row's key with its table's: "1:lucir" of "table1", "4a:..." of "figure4a"."""
    return f"{re.sub('^[a-z]+', '', table)}:{row}"


def _file(chosen: Chosen, stem: str) -> pathlib.Path:
    given = chosen.files.get(stem, stem)
    path = pathlib.Path(given)
    return path.resolve() if path.suffix == ".py" else chosen.folder / f"{given}.py"


def _flags(
    chosen: Chosen,
    file: pathlib.Path,
    settings: Mapping[str, Any],
    seed: int,
    name: str,
) -> tuple[str, ...]:
    """Flags of bsce_jax.main for a cell and seed."""
    arguments = {k: v for k, v in settings.items() if not k.startswith("config.")}
    text = ",".join(f"{k}={v}" for k, v in {**arguments, "seed": seed}.items())
    fields = {k: v for k, v in settings.items() if k.startswith("config.")}
    return (
        f"--config={file}:{text}",
        *(f"--{field}={value}" for field, value in fields.items()),
        *chosen.overrides,
        f"--config.name={name}",
    )


def _job(config: ConfigDict, name: str, flags: tuple[str, ...], known: _Known) -> Job:
    """The job of a configuration, which may be that of an earlier cell.

    Raises:
      UserError: its data set cannot be read, or does not fit it.
    """
    key = config_hash(config)
    if key not in known.jobs:
        data = known.load(config)
        trainings = [make_training(config, p) for p in phases.planned(config, data)]
        updates = [(training.data.step, training.updates) for training in trainings]
        images = sum(training.updates * training.batch_size for training in trainings)
        total = sum(number for _, number in updates)
        known.jobs[key] = Job(
            name=name,
            seed=config.seed,
            flags=flags,
            config_hash=key,
            base_hash=base_hash(config, data),
            updates=total,
            base_updates=sum(number for step, number in updates if step == 0),
            pixels=round(images / total) * math.prod(data.image_shape[:2]),
            config=flatten(config),
        )
    return known.jobs[key]


def _name(stem: str, settings: Mapping[str, Any]) -> str:
    """A name that says what a run is, but for its seed."""
    order = {"method": 0, "prior": 1}
    names = sorted(settings, key=lambda name: (order.get(name, 2), name))
    parts = [stem]
    for name in names:
        value = re.sub(r"[^\w.]+", "_", str(settings[name])).strip("_")
        short = name.rpartition(".")[2]
        parts.append(value if name in order else f"{short}{value}")
    return "-".join(parts)


def by_base_step(jobs: Sequence[Job]) -> list[list[Job]]:
    """Groups of jobs that can share a base step."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.base_hash, []).append(job)
    return list(groups.values())


def share(jobs: Sequence[Job], index: int, count: int) -> list[Job]:
    """The jobs of one of `count` processes, numbered from 1.

    Jobs that can share a base step stay together, but for a group that costs more than
    a process's part: it is cut, and each piece trains the base step. The groups are
    dealt out by their cost, largest first, each to the process with the least so far;
    a process's part is in the order given.
    """
    groups = by_base_step(jobs)
    most = sum(map(cost, groups)) / count
    pieces = [piece for group in groups for piece in _pieces(group, most)]
    loads = [0] * count
    mine: set[str] = set()
    for piece in sorted(pieces, key=lambda piece: -cost(piece)):
        process = loads.index(min(loads))
        loads[process] += cost(piece)
        if process == index - 1:
            mine |= {job.name for job in piece}
    return [job for job in jobs if job.name in mine]


def _pieces(group: Sequence[Job], most: float) -> list[Sequence[Job]]:
    number = min(len(group), math.ceil(cost(group) / most))
    return [group[first::number] for first in range(number)]


def cost(group: Sequence[Job]) -> int:
    """What jobs that share a base step cost: updates times the pixels of each."""
    updates = sum(job.updates - job.base_updates for job in group)
    return (updates + group[0].base_updates) * group[0].pixels


def command(job: Job, workdir: str, base: str = "") -> list[str]:
    """The command of a job; `base` is a workdir whose base step it takes over."""
    taken = [f"--config.init_from={base}"] if base else []
    program = [sys.executable, "-m", "bsce_jax.main"]
    return [*program, *job.flags, f"--workdir={workdir}", *taken]


def shown_command(flags: Iterable[str]) -> str:
    """The command of a job for readers, from the folder of the source tree."""
    flags = (flag.replace(f"--config={files.PACKAGE}/", "--config=") for flag in flags)
    return shlex.join(["python", "-m", "bsce_jax.main", *flags])
