"""The accuracies of docs/results.md are those of the raw results in results/."""

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.runs import ROOT

Cells = list[str]
Run = dict[str, Any]

WITH_MEMORY = (
    "bic icarl geodl eeil ss_il tpcil_like podnet_dde mnemonics lucir_dde".split()
)
WITHOUT = "slda spb_m ncm spb_i spb".split()
# Heading -> folder of results/, and row -> its files there: one run, or one a seed.
RAW = {
    "The paper's protocol: IL-Baseline on one H200": (
        "cifar100_h200",
        {
            "none": "il_baseline-none",
            "balanced": "il_baseline-balanced",
            "meta": "il_baseline-meta-steps0to3",
        },
    ),
    "CIFAR-100 at full resolution, every schedule divided by 50": (
        "cifar100_short",
        {
            "with memory: IL-Baseline": "il_baseline-none",
            "with memory: IL-Baseline + BalancedS-CE": "il_baseline-balanced",
            "with memory: IL-Baseline + Meta": "il_baseline-meta",
            "with memory: IL-Baseline + alpha = 0.5": "il_baseline-weighted",
            "with memory: IL-Baseline + memory oversampling": (
                "il_baseline-oversampling"
            ),
            "with memory: IL-Baseline + loss rescaling (2)": "il_baseline-rescaling",
            "with memory: IL-Baseline + balanced fine-tuning (2)": (
                "il_baseline-finetuning"
            ),
            "with memory: IL-Baseline + class oversampling (3)": (
                "il_baseline-class_oversampling"
            ),
            "with memory: IL-Baseline + separated softmax (3)": (
                "il_baseline-separated"
            ),
            "with memory: LUCIR": "lucir-none",
            "with memory: LUCIR + BalancedS-CE": "lucir-balanced",
            "with memory: PODNet": "podnet-none",
            "with memory: PODNet + BalancedS-CE": "podnet-balanced",
            "with memory: iCaRL (2)": "icarl",
            "with memory: BiC (3)": "bic",
            "with memory: TPCIL-like (3)": "tpcil_like",
            "without memory: SPB (3)": "spb-nomemory",
            "without memory: NCM (2)": "ncm-nomemory",
            "without memory: SLDA (2)": "slda-nomemory",
            "without memory: LUCIR": "lucir-none-nomemory",
            "without memory: LUCIR + BalancedS-CE": "lucir-balanced-nomemory",
            "without memory: LUCIR + Relaxed, epsilon 0.2 %": "lucir-relaxed-nomemory",
            "without memory: PODNet + BalancedS-CE": "podnet-balanced-nomemory",
            "without memory: PODNet + Relaxed, epsilon 0.2 %": (
                "podnet-relaxed-nomemory"
            ),
        },
    ),
    "CIFAR-100, reduced, on two CPU cores": (
        "cifar100_cpu",
        {
            "none (softmax)": "il_baseline-none",
            "balanced": "il_baseline-balanced",
            "meta": "il_baseline-meta",
        },
    ),
    "Digits": (
        "digits",
        {"none (softmax)": "none-?", "balanced": "balanced-?", "meta": "meta-?"},
    ),
    "Meta's open choices": (
        "meta_choice",
        {
            "fixed, 0.5": "alpha0.5",
            "fixed, 1 (BalancedS-CE)": "alpha1",
            "fixed, 2": "alpha2",
            "Meta: inner rate the current one, SGD 1": "meta-current-rate",
            "Meta: inner rate 1, SGD 1 (the default)": "meta",
            "Meta: inner rate the current one, SGD 100": "meta-current-rate-sgd100",
            "the same, held-out pass with running statistics": (
                "meta-current-rate-sgd100-eval"
            ),
            "Meta: inner rate the current one, Adam 0.05 on log alpha": (
                "meta-current-rate-log-adam0.05"
            ),
        },
    ),
    "LUCIR and PODNet on the same reduced CIFAR-100": (
        "cifar100_cpu",
        {
            "5 exemplars a class: LUCIR": "lucir-none",
            "5 exemplars a class: LUCIR + BalancedS-CE": "lucir-balanced",
            "5 exemplars a class: LUCIR + alpha = 0.5": "lucir-weighted",
            "5 exemplars a class: LUCIR + Meta": "lucir-meta",
            "5 exemplars a class: PODNet": "podnet-none",
            "5 exemplars a class: PODNet + BalancedS-CE": "podnet-balanced",
            "5 exemplars a class: PODNet + alpha = 0.5": "podnet-weighted",
            "5 exemplars a class: PODNet + Meta": "podnet-meta",
            "no memory: LUCIR": "lucir-nomemory-none",
            "no memory: LUCIR + BalancedS-CE": "lucir-nomemory-balanced",
            "no memory: LUCIR + Relaxed, epsilon 0.2 %": "lucir-nomemory-relaxed",
            "no memory: PODNet": "podnet-nomemory-none",
            "no memory: PODNet + BalancedS-CE": "podnet-nomemory-balanced",
            "no memory: PODNet + Relaxed, epsilon 0.2 %": "podnet-nomemory-relaxed",
        },
    ),
    "The other methods on the digits": (
        "digits_methods",
        {
            **{f"`{name}`, memory 5": f"{name}-?" for name in WITH_MEMORY},
            **{f"`{name}`, memory none": f"{name}-?" for name in WITHOUT},
            "`spb`, `terms.columns_ce.columns=seen`, memory none": "spb_seen-?",
            "`lucir_dde`, memory none": "lucir_dde-nomemory-?",
            "`podnet_dde`, memory none": "podnet_dde-nomemory-?",
        },
    ),
    "The other methods on the reduced CIFAR-100": (
        "cifar100_cpu",
        {
            **{f"`{name}`, memory 5": name for name in WITH_MEMORY},
            **{f"`{name}`, memory none": name for name in WITHOUT},
            "`lucir_dde`, memory none": "lucir_dde-nomemory",
        },
    ),
    "The tables on the digits: the runner from end to end": (
        "digits_tables",
        {
            **{
                f"with memory: IL-Baseline{row}": f"il_baseline-{name}"
                for row, name in {
                    "": "none",
                    " + BalancedS-CE": "balanced",
                    " + Meta": "meta",
                    " + BalancedS-CE, alpha = 0.5": "weighted-alpha0.5",
                    " + BalancedS-CE, alpha = 0.25": "weighted-alpha0.25",
                    " + BalancedS-CE, alpha = 0.1": "weighted-alpha0.1",
                    " + memory oversampling": "none-memory_oversampling",
                    " + class oversampling": "none-class_oversampling",
                    " + loss rescaling": "none-rescaling",
                    " + balanced fine-tuning": "none-finetuning",
                    " + separated softmax, memory oversampling": "none-separated",
                }.items()
            },
            "with memory: LUCIR": "lucir-none",
            "with memory: LUCIR + BalancedS-CE": "lucir-balanced",
            "with memory: LUCIR + DDE": "lucir_dde-none",
            "with memory: LUCIR + Mnemonics": "mnemonics-none",
            "with memory: PODNet": "podnet-none",
            "with memory: PODNet + BalancedS-CE": "podnet-balanced",
            "with memory: PODNet + DDE": "podnet_dde-none",
            "with memory: iCaRL": "icarl-none",
            "with memory: BiC": "bic-none",
            "with memory: TPCIL-like": "tpcil_like-none",
            "without memory: LUCIR": "lucir-none-nomemory",
            "without memory: LUCIR + BalancedS-CE": "lucir-balanced-nomemory",
            "without memory: LUCIR + Relaxed, epsilon 0.2 %": (
                "lucir-relaxed-epsilon0.2-nomemory"
            ),
            "without memory: LUCIR + DDE": "lucir_dde-none-nomemory",
            "without memory: PODNet": "podnet-none-nomemory",
            "without memory: PODNet + BalancedS-CE": "podnet-balanced-nomemory",
            "without memory: PODNet + Relaxed, epsilon 0.2 %": (
                "podnet-relaxed-epsilon0.2-nomemory"
            ),
            "without memory: SPB": "spb-none-nomemory",
            "without memory: SPB-I": "spb_i-none-nomemory",
            "without memory: SPB-M": "spb_m-none-nomemory",
            "without memory: NCM": "ncm-none-nomemory",
            "without memory: SLDA": "slda-none-nomemory",
            **{
                f"Figure 4, {title}, epsilon: {epsilon} %": (
                    f"{name}-relaxed-epsilon{epsilon}-nomemory"
                )
                for name, title in (("lucir", "LUCIR"), ("podnet", "PODNet"))
                for epsilon in (0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
            },
        },
    ),
}
# Tables of speed, by the first cell of their header.
OTHER = {"program"}


def last(key: str) -> Callable[[Run], list[float]]:
    return lambda run: [run["steps"][-1]["result"][key]]


def mean(key: str) -> Callable[[Run], list[float]]:
    return lambda run: [np.mean([step["result"][key] for step in run["steps"]])]


COLUMNS: dict[str, Callable[[Run], list[float]]] = {
    "average": mean("top1"),
    "average incremental accuracy": mean("top1"),
    "average, highest logit": mean("top1"),
    "ours": mean("top1"),
    "average, nearest mean": mean("top1_nearest_mean"),
    "after steps 0 to 5": lambda run: [s["result"]["top1"] for s in run["steps"]],
    "after the last step": last("top1"),
    "final": last("top1"),
    "base classes": last("top1_base"),
    "final, base classes": last("top1_base"),
    "final on the base classes": last("top1_base"),
    "after the last step, base classes": last("top1_base"),
    "newest classes": last("top1_new"),
}
# Columns that are no accuracy of ours.
BESIDE = {"paper", "memory", "seeds", "alpha at the ends of the steps"}


def accuracy_tables(text: str) -> list[tuple[str, list[Cells]]]:
    """Each table of the section "Accuracy" under its heading, the header first."""
    section = text.partition("\n## Accuracy\n")[2].partition("\n## ")[0]
    found = []
    for part in section.split("\n### ")[1:]:
        heading, _, body = part.partition("\n")
        for lines in re.findall(r"(?:^\|.*\n)+", body, re.M):
            rows = [
                [cell.strip() for cell in line.strip("|").split("|")]
                for line in lines.splitlines()
            ]
            if rows[0][0] not in OTHER:
                found.append((heading, [rows[0], *rows[2:]]))
    return found


TABLES = accuracy_tables((ROOT / "docs" / "results.md").read_text())


def labels(header: Cells, rows: list[Cells], several: bool) -> list[str]:
    """Names of the rows.

    One that begins with + belongs to the last that does not; the table's name stands
    before it where there are several, the memory behind it where that is a column.
    """
    found, method = [], ""
    for row in rows:
        added = row[0] if row[0].startswith("+") else ""
        method = method if added else row[0]
        name = f"{method} {added}".strip()
        if several:
            name = f"{header[0]}: {name}"
        if "memory" in header:
            name = f"{name}, memory {row[header.index('memory')]}"
        found.append(name)
    return found


def as_shown(values: list[list[float]]) -> Cells:
    """The numbers of a cell: of one run, or mean and deviation of several seeds."""
    if len(values) > 1:
        ((value,), (deviation,)) = np.mean(values, 0), np.std(values, 0, ddof=1)
        return [f"{value:.2f}", f"{deviation:.2f}"]
    return [f"{value:.2f}" for value in values[0]]


def test_every_table_has_raw_results():
    assert {heading for heading, _ in TABLES} == RAW.keys()


@pytest.mark.parametrize(
    ("heading", "table"),
    [pytest.param(*pair, id=pair[0]) for pair in TABLES],
)
def test_accuracies_are_those_of_the_raw_results(heading, table):
    folder, files = RAW[heading]
    header, *rows = table
    assert set(header[1:]) <= COLUMNS.keys() | BESIDE
    several = sum(other == heading for other, _ in TABLES) > 1
    for label, row in zip(labels(header, rows, several), rows, strict=True):
        paths = sorted((ROOT / "results" / folder).glob(f"{files[label]}.json"))
        runs = [json.loads(path.read_text()) for path in paths]
        compared = 0
        for name, cell in zip(header, row, strict=True):
            numbers = re.findall(r"\d+\.\d+", cell)
            if name in COLUMNS and numbers:
                expected = as_shown([COLUMNS[name](run) for run in runs])
                assert numbers == expected, f"{heading}: {label}, {name}"
                compared += 1
        assert compared > 1, label
        if "seeds" in header:
            assert row[header.index("seeds")] == str(len(runs))
