"""A made-up reproduction: a manifest and results files, with no training."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from bsce_jax.config.fields import default_config
from bsce_jax.config.hashes import flatten
from bsce_jax.report import cells, results
from bsce_jax.report.published import Column, Row, Table

Runs = list[dict[str, Any]]
METRIC = "average_incremental_top1"
SCRIPT = "<script>alert(1)</script>"
REDUCED = "reduced: 10 epochs instead of 250, 16x16 pixels"


def make_run(
    prior: str = "balanced",
    seed: int = 0,
    steps: int = 5,
    base: int = 50,
    increment: int = 10,
    average: float = 60.0,
    finished: int | None = None,
    **config: Any,
) -> dict[str, Any]:
    """Valid results of a run whose average incremental accuracy is `average`."""
    rng = np.random.default_rng([seed, steps, base, int(10 * average)])
    done = steps if finished is None else finished
    shape = np.linspace(14.0, -14.0, steps + 1) if steps else np.zeros(1)
    records = []
    for step in range(done + 1):
        old = 0 if step == 0 else base + increment * (step - 1)
        seen = base + increment * step
        top1 = float(average + shape[step])
        result = {
            "num_old": old,
            "num_seen": seen,
            "train_images": 500 * (seen - old) + 20 * old,
            "memory_images": 20 * old,
            "counts": [20] * old + [500] * (seen - old),
            "top1": top1,
            "top5": None if seen < 6 else min(100.0, top1 + 20.0),
            "top1_base": 0.9 * top1 if step else top1,
            "top1_old": top1 - 1.0 if step else None,
            "top1_new": top1 + 4.0,
            "top1_by_task": [top1] * (step + 1),
            "top1_nearest_mean": top1 - 3.0,
            "phases": {
                "incremental" if step else "base": {
                    "loss": [1.5, 0.4],
                    "accuracy": [50.0, 90.0],
                }
            },
            "alpha": _alpha(rng) if prior == "meta" and step else [],
            "own": {},
            "parameters_sha256": f"{step:064x}",
        }
        records.append({"step": step, "result": result, "telemetry": _telemetry(rng)})
    records[-1]["result"]["confusion"] = _confusion(rng, seen, top1)
    total = base + increment * steps
    overrides = {"prior": prior, "seed": seed, "scenario.steps": steps, **config}
    return {
        "schema": results.SCHEMA,
        "name": f"cifar100-il_baseline-{prior}-{steps}steps",
        "status": "done" if done == steps else "running",
        "config": flatten(default_config()) | overrides,
        "config_hash": f"{prior}{seed}{steps}{average}",
        "base_hash": "base",
        "class_names": [f"class {i}" for i in range(total)],
        "class_order": list(range(total)),
        "image_shape": [32, 32, 3],
        "data": {},
        "steps": records,
        "summary": results.summary(records),
    }


def entry(name: str, status: str = "done", seed: int = 0) -> dict[str, Any]:
    """A run of the manifest."""
    config = "configs/cifar100.py:prior=balanced,steps=5"
    return {
        "name": name,
        "seed": seed,
        "workdir": f"runs/{name}",
        "command": f"python -m bsce_jax.main --config {config},seed={seed} "
        f"--workdir runs/{name}",
        "status": status,
    }


def cell(key: str, runs: Runs | None = None, missing: str = "") -> dict[str, Any]:
    """A cell of the manifest; `key` is table/row/column."""
    table, row, column = key.split("/")
    where = {"table": table, "row": row, "column": column}
    return where | {"missing": missing, "runs": runs or []}


def manifest(cells: Iterable[dict[str, Any]], protocol: str = "full") -> dict[str, Any]:
    """A manifest of cells."""
    return {"schema": 1, "protocol": protocol, "cells": list(cells)}


def table(key: str = "table1", label: str = "Ours & <b>theirs</b>") -> Table:
    columns = (
        Column("five", "CIFAR-100, 5 steps", METRIC),
        Column("final", "CIFAR-100, last", "final_top1"),
        Column("ten", "ImageNet, 10 steps", METRIC),
    )
    rows = (
        Row("a", label, "authors' run", {"five": 60.0, "final": 50.0, "ten": None}),
        Row("b", "B|C", "reported from the literature", {"five": 40.0, "ten": 30.0}),
    )
    return Table(key, "A <title>", "Someone 2022, Table 1", columns, rows)


def small(
    averages: tuple[float, ...] = (60.0, 61.0, 62.9), protocol: str = "full"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifest and results of three seeds in two cells, and of what is not done."""
    found = {
        f"runs/r{seed}": make_run(seed=seed, average=average, steps=2, base=4)
        for seed, average in enumerate(averages)
    }
    runs = [entry(f"r{seed}", seed=seed) for seed in range(len(averages))]
    found["runs/later"] = make_run(average=39.0, steps=2, base=4, finished=1)
    later = [entry("later", "running"), entry("last", "to do", 1)]
    given = [
        cell("table1/a/five", runs),
        cell("table1/a/final", runs),
        cell("table1/b/five", later),
        cell("table1/b/ten", missing=f"no {SCRIPT} here"),
    ]
    return manifest(given, protocol), found


def build(**kinds: Any) -> cells.Report:
    return cells.build(*small(**kinds), {"table1": table(), "table2": table("table2")})


def write_example(folder: pathlib.Path, protocol: str = "full") -> None:
    """Writes manifest.json and runs/ for some of the paper's tables."""
    found: dict[str, dict[str, Any]] = {}
    cells = [
        *_table1(found),
        *_table5(found),
        *_figure4(found),
        cell("figure5/il_baseline_balanced/final", [_run(found, "balanced", 62.2)]),
        cell("figure5/il_baseline_meta/final", [_run(found, "meta", 63.9)]),
    ]
    for workdir, run in found.items():
        (folder / workdir).mkdir(parents=True, exist_ok=True)
        results.write(folder / workdir, run)
    (folder / "manifest.json").write_text(json.dumps(manifest(cells, protocol)))


def _run(
    found: dict[str, Any], prior: str, average: float, seed: int = 0, **kinds: Any
) -> dict[str, Any]:
    """Entry of a run whose results are added to those found."""
    steps = kinds.get("steps", 5)
    epsilon = kinds.get("epsilon")
    kind = prior if epsilon is None else f"{prior}{epsilon:g}"
    method = kinds.get("method", "il_baseline")
    alpha = kinds.get("alpha", "")
    name = f"cifar100-{method}-{kind}{alpha}-steps{steps}-seed{seed}"
    noise = 0.6 * np.sin(7 * seed + len(name))
    run = make_run(prior, seed, average=average + noise, **kinds)
    found[f"runs/{name}"] = run
    status = "done" if run["status"] == "done" else "running"
    return entry(name, status, seed)


def _table1(found: dict[str, Any]) -> Runs:
    cells = []
    rows = ("none", 44.1), ("balanced", 62.2), ("meta", 63.9)
    for steps, increment, drop in ((5, 10, 0), (10, 5, 4)):
        for prior, average in rows:
            suffix = "" if prior == "none" else f"_{prior}"
            seeds = 3 if steps == 5 else 1
            runs = [
                _run(found, prior, average - drop, s, steps=steps, increment=increment)
                for s in range(seeds)
            ]
            if steps == 10 and prior == "meta":
                name = "cifar100-il_baseline-meta-steps10-seed1"
                runs.append(entry(name, "to do", 1))
            key = f"table1/il_baseline{suffix}/cifar100-{steps}"
            cells.append(cell(key, runs))
    for row, average in (("lucir", 61.7), ("lucir_balanced", 64.9)):
        seeds = [
            _run(found, "balanced", average, 0, method=row),
            _run(found, "balanced", average, 1, method=row, finished=2),
        ]
        cells.append(cell(f"table1/{row}/cifar100-5", seeds))
        shared = [_run(found, "balanced", average, 0, method=row)]
        if row == "lucir":
            cells.append(cell("table1/lucir_reported/cifar100-5", shared))
    states = ("to do", "failed")
    for row, status in zip(("podnet", "podnet_balanced"), states, strict=True):
        cells.append(cell(f"table1/{row}/cifar100-5", [entry(row, status)]))
    for row in ("icarl", "bic", "mnemonics"):
        text = f"the method {row} does not exist yet"
        for dataset in ("cifar100", "imagenet"):
            cells.append(cell(f"table1/{row}/{dataset}-5", missing=text))
    return cells


def _table5(found: dict[str, Any]) -> Runs:
    cells = []
    for alpha, average in ((0.1, 62.1), (0.25, 64.0), (0.5, 65.1), (1.0, 62.2)):
        run = _run(found, "weighted", average, alpha=alpha)
        for metric in ("final_base", "final", "average"):
            cells.append(cell(f"table5/alpha-{alpha}/5-{metric}", [run]))
    run = _run(found, "meta", 63.9)
    for metric in ("final_base", "final", "average"):
        cells.append(cell(f"table5/meta/5-{metric}", [run]))
    return cells


def _figure4(found: dict[str, Any]) -> Runs:
    cells = []
    for epsilon, average in ((0, 54.0), (0.1, 57.5), (0.2, 59.1), (1, 56), (100, 44)):
        run = _run(found, "relaxed", average, epsilon=epsilon, method="lucir")
        for shown in ("average", "base", "latest"):
            key = f"figure4a/epsilon-{epsilon}/cifar100-5-{shown}"
            cells.append(cell(key, [run]))
    return cells


def _alpha(rng: np.random.Generator) -> list[list[float]]:
    values = 0.4 + 0.6 * np.exp(-np.arange(40) / 8) + 0.02 * rng.standard_normal(40)
    return [[10 * (i + 1), float(value)] for i, value in enumerate(values)]


def _telemetry(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "seconds": 60.0 + 20.0 * float(rng.random()),
        "images_per_second": 41000.0 + 1000.0 * float(rng.random()),
        "versions": {"python": "3.12.4", "jax": "0.10.2", "flax": "0.12.8"},
        "platform": "gpu",
        "device": "NVIDIA H100 80GB HBM3",
        "devices": 1,
        "commit": "f4a7295c0d1e2f3a4b5c6d7e8f9a0b1c2d3e4f5a",
    }


def _confusion(rng: np.random.Generator, seen: int, top1: float) -> list[list[int]]:
    """100 test images a class, top1 of them right."""
    chance = np.full((seen, seen), (1 - top1 / 100) / (seen - 1))
    np.fill_diagonal(chance, top1 / 100)
    images = np.stack([rng.multinomial(100, row) for row in chance])
    return [[int(i), int(j), int(images[i, j])] for i, j in np.argwhere(images)]
