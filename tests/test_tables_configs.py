"""configs/tables: how each cell of the paper's tables and figures is run."""

import functools
import importlib.util
import pathlib
import re
import types

import pytest
from ml_collections import ConfigDict

from bsce_jax.config.fields import FIELDS, PHASE
from bsce_jax.config.flags import parse
from bsce_jax.config.hashes import config_hash, flatten
from bsce_jax.config.priors import epsilon_count
from bsce_jax.config.resolve import resolve
from bsce_jax.errors import UserError
from bsce_jax.report import published

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
PUBLISHED = published.load()
ARGUMENTS = ("method", "prior", "steps", "memory", "seed", "alpha", "epsilon")
# Epochs of the base step and of the others: on CIFAR-100, and on large images.
METHODS = {
    "il_baseline": ((250, 250), (100, 100)),
    "lucir": ((160, 160), (90, 90)),
    "podnet": ((160, 160), (90, 90)),
    "icarl": ((70, 70), (60, 60)),
    "eeil": ((1200, 480), (720, 480)),
    "bic": ((250, 250), (100, 100)),
    "ss_il": ((200, 200), (100, 100)),
    "spb": ((160, 50), (90, 50)),
    "spb_i": ((160, 50), (90, 50)),
    "spb_m": ((160, 50), (90, 50)),
    "ncm": ((250, None), (100, None)),
    "slda": ((250, None), (100, None)),
    "lucir_dde": ((160, 160), (90, 90)),
    "podnet_dde": ((160, 160), (90, 90)),
    "mnemonics": ((160, 160), (90, 90)),
    "tpcil_like": ((160, 160), (90, 90)),
}
# Rows whose key is not that of their method.
ROWS = {"ssil": "ss_il", "tpcil": "tpcil_like", "dde": "lucir_dde"}
# Table 6: what each way to mitigate the imbalance sets.
MITIGATIONS = {
    "memory_oversampling": {"phase.incremental.sampling": "memory"},
    "class_oversampling": {"phase.incremental.sampling": "class"},
    "loss_rescaling": {"terms.softmax_ce.rescale": True},
    "balanced_finetuning": {
        "phase.finetune.images": "exemplars",
        "phase.finetune.epochs": 20,
        "phase.finetune.learning_rate": 0.01,
        "phase.finetune.milestones": [10],
        "phase.finetune.rate.head": 1.0,
        "phase.finetune.rate.scale": 0.0,
        "phase.finetune.rate.convolutions": 0.0,
        "phase.finetune.rate.batch_norms": 0.0,
        "phase.finetune.batch_norm": "eval",
    },
    "separated_softmax": {
        "classification": "separated_softmax_ce",
        "phase.incremental.sampling": "memory",
    },
}
HAS_FINETUNING = {("lucir", "imagenet")}
HAS_FINETUNING |= {("podnet", name) for name in ("cifar100", "imagenet_subset")}
HAS_FINETUNING |= {("podnet", "imagenet")}
# The phases of all methods here.
PHASES = ("base", "incremental", "finetune", "balanced", "bias", "exemplars")


@functools.cache
def load(file: pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = {key: load(CONFIGS / "tables" / f"{key}.py") for key in PUBLISHED}
CELLS = [
    (table, row, column)
    for table, module in TABLES.items()
    for row, given in module.ROWS.items()
    for column in module.COLUMNS
    if (row, column) != ("il_baseline_meta", "memory-1")
    and not (row == "mnemonics" and column.startswith("imagenet"))
]


def cell(table: str, row: str, column: str) -> tuple[str, dict[str, object]]:
    """The configuration file of a cell and its arguments; those of the row win."""
    stem, given = TABLES[table].COLUMNS[column]
    return stem, {**given, **TABLES[table].ROWS[row]}


def has_file(table: str, row: str, column: str) -> bool:
    stem, _ = cell(table, row, column)
    return (CONFIGS / f"{stem}.py").exists()


def run(table: str, row: str, column: str) -> ConfigDict:
    """The resolved configuration of a cell, through the command line."""
    stem, given = cell(table, row, column)
    arguments = [f"{k}={v}" for k, v in given.items() if not k.startswith("config.")]
    overrides = [f"--{k}={v}" for k, v in given.items() if k.startswith("config.")]
    return _resolved(f"{CONFIGS / stem}.py:{','.join(arguments)}", tuple(overrides))


@functools.cache
def _resolved(file: str, overrides: tuple[str, ...]) -> ConfigDict:
    config = parse(["main", f"--config={file}", *overrides]).config
    return resolve(config)


def test_every_table_has_its_file_with_the_keys_of_the_published_numbers():
    found = {path.stem for path in (CONFIGS / "tables").glob("*.py")}
    assert found == set(PUBLISHED)
    for key, table in PUBLISHED.items():
        kind, number = re.match(r"(\D+)(\d)", key.capitalize()).groups()
        assert f"{kind} {number}" in TABLES[key].__doc__
        assert list(TABLES[key].COLUMNS) == [column.key for column in table.columns]
        assert list(TABLES[key].ROWS) == [row.key for row in table.rows]


def test_mnemonics_is_no_run_on_streamed_images():
    for column in TABLES["table1"].COLUMNS:
        if column.startswith("imagenet"):
            with pytest.raises(UserError, match="loading='streaming': .* resident"):
                run("table1", "mnemonics", column)


def test_the_arguments_and_fields_of_every_cell_have_known_names():
    fields = {*FIELDS, *(f"phase.{phase}.{n}" for phase in PHASES for n in PHASE)}
    for table, row, column in CELLS:
        stem, given = cell(table, row, column)
        assert stem in ("cifar100", "imagenet_subset", "imagenet")
        assert {"method", "prior", "steps"} <= given.keys()
        assert given["method"] in METHODS
        for name in given:
            known = fields if name.startswith("config.") else ARGUMENTS
            # The fields of a loss term are checked where the run is resolved.
            if not name.startswith("config.terms."):
                assert name.removeprefix("config.") in known, (table, row, name)


def method(row: str) -> str:
    """From the row's key; the rows of Tables 5 and 6 are all IL-Baseline's."""
    row = ROWS.get(row, row)
    names = [name for name in METHODS if row.startswith(name)]
    return max(names, key=len, default="il_baseline")


def prior(table: str, row: str) -> str:
    if table.startswith("figure4"):
        return "relaxed"
    if row.startswith("alpha-"):
        return "balanced" if row == "alpha-1.0" else "weighted"
    last = row.split("_")[-1]
    return last if last in ("balanced", "meta", "relaxed") else "none"


def steps(table: str, column: str) -> int:
    if table in ("table1", "table3", "figure4a", "figure4b"):
        return int(column.split("-")[1])
    if table == "table5":
        return int(column.split("-")[0])
    return 10 if table == "table2" else 5


def memory(table: str, column: str) -> dict[str, object]:
    if table == "table2":
        return {"memory.kind": "fixed", "memory.budget": 20000}
    if table in ("table3", "figure3", "figure4a", "figure4b"):
        return {"memory.kind": "none", "memory.per_class": 0}
    number = int(column.removeprefix("memory-")) if table == "table4" else 20
    return {"memory.kind": "growing", "memory.per_class": number}


def finetuning(table: str, row: str, name: str) -> int:
    """Epochs of the methods' own fine-tuning: without a prior only."""
    if prior(table, row) != "none" or row == "lucir_without_finetuning":
        return 0
    return 20 if (method(row).removesuffix("_dde"), name) in HAS_FINETUNING else 0


def expected(table: str, row: str, column: str) -> dict[str, object]:
    """The main facts of a run, told from the keys of its cell alone."""
    name = column.split("-")[0]
    named = ("table1", "table3", "figure4a", "figure4b")
    name = name if table in named else "cifar100"
    name = {"table2": "imagenet", "figure3": "imagenet_subset"}.get(table, name)
    small = name == "cifar100"
    base_classes = 500 if name == "imagenet" else 50
    sweep = {"figure4a": "lucir", "figure4b": "podnet"}
    name_of_method = sweep.get(table) or method(row)
    first, later = METHODS[name_of_method][0 if small else 1]
    facts = {
        "method": name_of_method,
        "prior": prior(table, row),
        "scenario.base_classes": 0 if table == "table2" else base_classes,
        "scenario.steps": steps(table, column),
        "phase.base.epochs": first,
        **memory(table, column),
        **MITIGATIONS.get(row, {}),
    }
    if later is not None:
        facts["phase.incremental.epochs"] = later
    if small:
        facts["data.name"] = "cifar100"
    if method(row).startswith(("lucir", "podnet")) or row == "il_baseline":
        facts["phase.finetune.epochs"] = finetuning(table, row, name)
    if facts["prior"] == "weighted":
        facts["alpha"] = float(row.removeprefix("alpha-"))
    return facts


@pytest.mark.parametrize(
    ("table", "row", "column"), [one for one in CELLS if has_file(*one)]
)
def test_every_run_is_valid_and_is_the_one_that_the_paper_describes(table, row, column):
    config = run(table, row, column)
    found = flatten(config)
    facts = expected(table, row, column)
    assert {name: found[name] for name in facts} == facts
    if facts["prior"] == "relaxed":
        swept = table.startswith("figure4")
        percent = float(row.removeprefix("epsilon-")) if swept else 0.2
        images = 5 if found["data.name"] == "cifar100" else 13  # in a percent
        assert epsilon_count(config) == pytest.approx(percent * images)


def test_the_epsilon_of_the_paper_in_images():
    for row in ("lucir_relaxed", "podnet_relaxed"):
        config = ConfigDict(run("table3", row, "cifar100-5").to_dict())
        assert epsilon_count(config) == pytest.approx(1)
        config.data.nominal_per_class = 1300  # ImageNet
        assert epsilon_count(config) == pytest.approx(2.6)


def test_meta_with_one_exemplar_a_class_is_no_run():
    assert "memory-1" in TABLES["table4"].COLUMNS
    with pytest.raises(UserError, match="memory.per_class=1: .*at least 2.*meta"):
        run("table4", "il_baseline_meta", "memory-1")


@pytest.mark.parametrize(
    "cells",
    [
        [
            ("table1", "il_baseline", "cifar100-5"),
            ("table4", "il_baseline", "memory-20"),
            ("table6", "il_baseline", "average"),
            ("figure2", "il_baseline", "final"),
        ],
        [
            ("table1", "il_baseline_balanced", "cifar100-5"),
            ("table4", "il_baseline_balanced", "memory-20"),
            ("table5", "alpha-1.0", "5-final"),
            ("table5", "alpha-1.0", "5-average"),
            ("table6", "balanced", "average"),
            ("figure5", "il_baseline_balanced", "final"),
        ],
        [
            ("table1", "il_baseline_meta", "cifar100-5"),
            ("table4", "il_baseline_meta", "memory-20"),
            ("table5", "meta", "5-final_base"),
            ("table6", "meta", "average"),
            ("figure5", "il_baseline_meta", "final"),
        ],
        [
            ("table1", "il_baseline_meta", "cifar100-10"),
            ("table5", "meta", "10-average"),
        ],
        [
            ("table1", "lucir", "cifar100-25"),
            ("table1", "lucir_reported", "cifar100-25"),
        ],
        [
            ("table3", "podnet_relaxed", "cifar100-5"),
            ("figure4b", "epsilon-0.2", "cifar100-5-average"),
            ("figure4b", "epsilon-0.2", "cifar100-5-latest"),
        ],
        [
            ("table3", "lucir_balanced", "imagenet_subset-5"),
            ("figure3", "lucir_balanced", "final"),
        ],
    ],
)
def test_equal_cells_of_different_tables_are_one_run(cells):
    first = cell(*cells[0])
    for other in cells[1:]:
        stem, given = cell(*other)
        assert (stem, given) == first
    if has_file(*cells[0]):
        assert len({config_hash(run(*one)) for one in cells}) == 1


@pytest.mark.parametrize("table", TABLES)
def test_two_rows_of_a_table_are_two_runs(table):
    """But for the methods that the paper both reports and runs."""
    column = next(iter(TABLES[table].COLUMNS))
    seen = {}
    for row in TABLES[table].ROWS:
        if not row.endswith("_reported"):
            _, arguments = cell(table, row, column)
            seen.setdefault(tuple(sorted(arguments.items())), []).append(row)
    assert all(len(rows) == 1 for rows in seen.values()), seen


def test_two_rows_of_figure_4_are_two_runs_and_its_panels_others():
    rows = TABLES["figure4a"].ROWS
    hashes = {
        config_hash(run(panel, row, "cifar100-10-base"))
        for panel in ("figure4a", "figure4b")
        for row in rows
    }
    assert len(hashes) == 2 * len(rows) == 24
