"""From the cells of the paper's tables to jobs, shares of them, and the manifest."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest
from etils import epath

from bsce_jax.config.flags import parse
from bsce_jax.config.hashes import config_hash
from bsce_jax.config.resolve import resolve
from bsce_jax.errors import UserError
from bsce_jax.report import published, results
from bsce_jax.reproduce import __main__ as reproduce
from bsce_jax.reproduce import manifest, tables
from bsce_jax.reproduce.tables import (
    TableCell,
    by_base_step,
    cost,
    expand,
    share,
)
from tests import example_jobs, runs
from tests.example_jobs import chosen, fake
from tests.example_results import make_results


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> pathlib.Path:
    return example_jobs.write_config(tmp_path_factory.mktemp("reproduce"))


def test_every_chosen_cell_has_its_jobs_or_a_reason(small):
    found = expand(chosen(small, ("table1", "table5"), seeds=2))
    paper = published.load()
    expected = [
        (key, row.key, column.key)
        for key in ("table1", "table5")
        for row in paper[key].rows
        for column in paper[key].columns
        if column.key.startswith(("cifar100", "5-", "10-"))
    ]
    assert [(c.table, c.row, c.column) for c in found] == expected
    for cell in found:
        assert (len(cell.jobs), bool(cell.missing)) in ((2, False), (0, True))
        assert [job.seed for job in cell.jobs] in ([], [0, 1])
        assert len(cell.flags) == len(cell.jobs)
    assert not any(cell.missing for cell in found)


def test_a_cell_that_only_wants_its_data_set_has_its_command(small, tmp_path, capsys):
    elsewhere = f"--config.data.data_dir={tmp_path}"
    only = {"rows": ("il_baseline",), "overrides": (elsewhere,)}
    found = expand(chosen(small, ("table4",), **only))
    for cell in found:
        assert "is not on this machine" in cell.missing and not cell.jobs
        (flags,) = cell.flags
        assert elsewhere in flags
    given = ["--table", "4", "--rows", "il_baseline", "--file", f"cifar100={small}"]
    assert reproduce.main([*given, "--dry_run", elsewhere]) == 0
    first, *commands = capsys.readouterr().out.splitlines()
    assert first.startswith("table4 il_baseline memory-1 and 4 more: config.data.name")
    assert len(commands) == 5
    assert all(line.startswith("no data set yet: python -m") for line in commands)
    assert reproduce.main([*given, elsewhere]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bsce_jax: nothing can be run: config.data.name")


def test_cells_of_one_configuration_share_their_job(small):
    found = expand(chosen(small, ("table1", "table5")))
    by_key = {(c.table, c.row, c.column): c.jobs for c in found}
    (job,) = by_key["table5", "alpha-1.0", "5-average"]
    assert by_key["table5", "alpha-1.0", "5-final"] == (job,)
    assert by_key["table1", "il_baseline_balanced", "cifar100-5"] == (job,)
    names = {j.name: j.config_hash for jobs in by_key.values() for j in jobs}
    assert len(set(names.values())) == len(names)
    (other,) = by_key["table5", "alpha-0.5", "5-average"]
    assert other.base_hash == job.base_hash and other.config_hash != job.config_hash
    assert job.updates > job.base_updates > 0


def test_a_cell_whose_configuration_is_refused_says_why(small):
    found = expand(
        chosen(small, ("table4",), overrides=("--config.memory.per_class=1",))
    )
    meta = {cell.missing for cell in found if cell.row.endswith("meta")}
    assert len(meta) == 1 and "at least 2 for prior=meta" in meta.pop()
    wrong = "config.phase.incremental.epochs=-1"
    with pytest.raises(UserError, match=f"nothing can be run: {wrong}"):
        expand(chosen(small, overrides=(f"--{wrong}",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tables": ("table9",)}, "table 'table9': expected one of table1, table2"),
        ({"rows": ("mine",)}, "row 'mine' of table5: one of alpha-0.1"),
        ({"columns": ("mine",)}, "column 'mine' of table5: one of 5-final_base"),
        ({"dataset": "mnist"}, "--dataset 'mnist' of table5: one of cifar100"),
        (
            {"tables": ("table1", "table5"), "rows": ("alpha-0.5", "podnett")},
            "row 'podnett' of table1, table5: one of ",
        ),
        (
            {"files": {"cifar10": "cifar100_cpu"}},
            "--file 'cifar10' of table5: one of cifar100",
        ),
        ({"files": {"cifar100": "none"}}, "none.py does not exist yet"),
    ],
)
def test_a_wrong_choice_is_one_line(small, changes, message):
    with pytest.raises(UserError, match=message):
        expand(chosen(small, **changes))


def test_the_commands_of_jobs_are_valid(small, tmp_path):
    """What runs is the configuration that the job's hashes and updates are of."""
    (first, *_), *others = (c.jobs for c in expand(chosen(small)) if c.jobs)
    assert others
    for job, base in ((first, ""), (others[-1][0], "runs/first")):
        flags = tables.command(job, "runs/x", base)[3:]
        values = parse(["main", *flags])
        assert values.workdir == "runs/x"
        config = resolve(values.config)
        assert (config.init_from, config_hash(config)) == (base, job.config_hash)


def test_shares_keep_base_steps_together_and_lose_nothing():
    jobs = [fake(f"{b}{i}", b, 10 + i) for b in "abcde" for i in range(3)]
    for count in (1, 2, 3, 5):
        parts = [share(jobs, i + 1, count) for i in range(count)]
        assert sorted(j.name for part in parts for j in part) == sorted(
            j.name for j in jobs
        )
        bases = [{j.base_hash for j in part} for part in parts]
        assert sum(map(len, bases)) == 5  # no base step in two parts
        assert max(map(load, parts)) - min(map(load, parts)) <= load(jobs) / 5


def test_a_base_step_with_more_runs_than_a_share_is_cut():
    """Four runs of 96 updates and a base step of 4, beside one small run."""
    large = [fake(f"a{i}", "a", 100) for i in range(4)]
    jobs = [*large, fake("b0", "b", 14)]
    parts = [share(jobs, i + 1, 4) for i in range(4)]
    assert sorted(j.name for p in parts for j in p) == ["a0", "a1", "a2", "a3", "b0"]
    assert sorted(map(load, parts)) == [100, 100, 100, 114]
    weighed = [fake("a", "a", 100), *(fake(f"b{i}", f"b{i}", 10) for i in range(3))]
    wide = dataclasses.replace(weighed[1], pixels=10)
    (first,), others = (share([wide, *weighed[2:]], i, 2) for i in (1, 2))
    assert first == wide and len(others) == 2  # ten times the work of the others


def load(part) -> int:
    return sum(map(cost, by_base_step(part)))


# The list of cells that the report is made from.

ROWS = {"a": "il_baseline", "b": "lucir", "c": "podnet", "d": "il_baseline_meta"}


def listed(folder, *names: str, protocol="full", **states):
    found = [
        TableCell("table1", ROWS.get(name, name), "cifar100-5", "", (fake(name, "a"),))
        for name in names
    ]
    manifest.write(folder, protocol, found, states)
    written = json.loads((folder / manifest.NAME).read_text())
    return {run["name"]: run["status"] for c in written["cells"] for run in c["runs"]}


def test_cells_of_earlier_commands_stay_in_the_manifest(tmp_path):
    assert listed(tmp_path, "a", "b", a="done", b="failed") == {
        "a": "done",
        "b": "failed",
    }
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "results.json").write_text(json.dumps(make_results()))
    known = {"a": "done", "b": "failed", "c": "running"}
    assert listed(tmp_path, "c", c="elsewhere") == known
    assert listed(tmp_path, "b", b="to do") == known | {"b": "to do", "c": "to do"}
    assert listed(tmp_path, "d", protocol="reduced: x", d="done") == {"d": "done"}
    # A row that has gone from the paper's tables would cost the page.
    found = listed(tmp_path, "gone", protocol="reduced: x", gone="done")
    assert found == {"d": "to do", "gone": "done"}
    found = listed(tmp_path, "a", protocol="reduced: x", a="to do")
    assert found == {"d": "to do", "a": "to do"}


@pytest.mark.parametrize("damage", [{"runs": None}, {"runs": [{}]}, {"runs": "no"}])
def test_a_broken_manifest_gives_way_to_a_new_one(tmp_path, damage):
    listed(tmp_path, "a", a="done")
    written = json.loads((tmp_path / manifest.NAME).read_text())
    written["cells"][0] |= damage
    (tmp_path / manifest.NAME).write_text(json.dumps(written))
    assert listed(tmp_path, "c", c="done") == {"c": "done"}


def test_many_processes_may_write_one_manifest(tmp_path, monkeypatch):
    """Here one that only replaces it, which is sooner ready, beside this one."""
    replace, ways = results.replace, []

    def noted(target: epath.Path, content: str, **way: bool) -> None:
        ways.append(way)
        replace(target, content, **way)

    monkeypatch.setattr(results, "replace", noted)
    code = (
        "import sys; from etils import epath; from bsce_jax.report import results\n"
        "target = epath.Path(sys.argv[1])\n"
        "for _ in range(150): results.replace(target, sys.argv[2], shared=True)"
    )
    empty = json.dumps({"schema": 1, "protocol": "full", "cells": []})
    arguments_ = [sys.executable, "-c", code, str(tmp_path / manifest.NAME), empty]
    other = subprocess.Popen(arguments_, cwd=runs.ROOT)
    while other.poll() is None:
        manifest.write(tmp_path, "full", [], {})
    assert other.returncode == 0
    assert ways and all(way == {"shared": True} for way in ways)
    assert json.loads((tmp_path / manifest.NAME).read_text())["cells"] == []
    assert [path.name for path in tmp_path.iterdir()] == [manifest.NAME]
