"""Cells of the paper's tables: numbers by hand, what is left out, what is refused."""

from typing import Any

import pytest

from bsce_jax.errors import UserError
from bsce_jax.report import cells
from tests.example_page import (
    SCRIPT,
    build,
    cell,
    entry,
    make_run,
    manifest,
    small,
    table,
)


def test_mean_deviation_and_difference_by_hand() -> None:
    section = build().sections[0]
    done = section.cells["a", "five"]
    assert done.values == pytest.approx([60.0, 61.0, 62.9])
    assert done.mean == pytest.approx(61.3)
    assert done.deviation == pytest.approx((4.34 / 2) ** 0.5)  # 1.69 + 0.09 + 2.56
    assert done.difference == pytest.approx(1.3)
    assert done.state == ""
    # The last of three evenly spaced accuracies, 14 points below their average.
    assert section.cells["a", "final"].mean == pytest.approx(61.3 - 14.0)
    assert section.cells["a", "final"].difference == pytest.approx(-2.7)


def test_unfinished_runs_do_not_count() -> None:
    waiting = build().sections[0].cells["b", "five"]
    assert (waiting.values, waiting.mean, waiting.difference) == ([], None, None)
    assert waiting.state == "running, to do"
    given, found = small()
    given["cells"][2]["runs"].append(entry("r0", seed=2))
    section = cells.build(given, found, {"table1": table()}).sections[0]
    some = section.cells["b", "five"]
    assert (some.mean, some.deviation) == (pytest.approx(60.0), None)
    assert some.state == "1 of 3 seeds"


def test_a_manifest_cannot_call_a_run_done() -> None:
    given, found = small()
    del found["runs/r0"]
    found["runs/r1"]["status"] = "running"
    some = cells.build(given, found, {"table1": table()}).sections[0].cells["a", "five"]
    assert some.state == "1 of 3 seeds"
    del found["runs/r2"]
    none = cells.build(given, found, {"table1": table()}).sections[0].cells["a", "five"]
    assert none.state == "unfinished"


def test_cells_and_tables_without_runs() -> None:
    report = build()
    assert [section.table.key for section in report.sections] == ["table1"]
    section = report.sections[0]
    assert section.cells["a", "ten"].state == "not asked for"
    assert section.notes() == {"not asked for": "a", f"no {SCRIPT} here": "b"}
    assert section.name == "Table 1"
    assert [cells.letter(n) for n in (0, 25, 26, 27, 52)] == [
        "a",
        "z",
        "aa",
        "ab",
        "ba",
    ]
    assert len(report.runs) == 5  # three of them in two cells


def test_columns_of_the_same_runs_share_pictures() -> None:
    section = build().sections[0]
    groups = [[c.key for c in group] for group in cells.column_groups(section)]
    assert groups == [["five"], ["final"], ["ten"]]  # b/five has runs, b/final none
    alone = cells.build(
        manifest(small()[0]["cells"][:2]), small()[1], {"table1": table()}
    ).sections[0]
    groups = [[c.key for c in group] for group in cells.column_groups(alone)]
    assert groups == [["five", "final"], ["ten"]]


def test_a_run_in_two_rows_is_drawn_once() -> None:
    given, found = small()
    given["cells"][2]["runs"] = given["cells"][0]["runs"][:1]
    section = cells.build(given, found, {"table1": table()}).sections[0]
    named = cells.labelled(section, section.table.columns[:1])
    labels = [row.label for row in section.table.rows]
    assert [run["name"] for run in named] == [labels[1], labels[0], labels[0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 1"),
        ({"cells": [{"row": "a"}]}, "has no 'table'"),
        ({"cells": [cell("table1/a/five", [{"workdir": "x"}])]}, "has no 'status'"),
        ({"cells": [3]}, "not valid"),
        (
            {"cells": [cell("table1/a/five", [{"workdir": 3, "status": "done"}])]},
            "not valid: workdir and status: expected text",
        ),
        ({"cells": [cell("table9/a/five")]}, "table9/a/five is not in the paper"),
        ({"cells": [cell("table1/z/five")]}, "table1/z/five is not in the paper"),
    ],
)
def test_a_broken_manifest_is_one_clear_line(
    change: dict[str, Any], message: str
) -> None:
    given = manifest([]) | change
    with pytest.raises(UserError, match=message) as error:
        cells.build(given, {}, {"table1": table()})
    assert "\n" not in str(error.value)


def test_a_run_counts_once_whatever_seeds_it_is_said_to_be_of() -> None:
    given = manifest([cell("table1/a/five", [entry("r", seed=s) for s in (0, 1, 2)])])
    found = {"runs/r": make_run(average=60.0, steps=2, base=4)}
    report = cells.build(given, found, {"table1": table()})
    done = report.sections[0].cells["a", "five"]
    assert (done.values, done.deviation) == ([60.0], None)


def test_the_accuracy_of_figure_3_on_the_base_and_on_the_later_classes() -> None:
    run = make_run(steps=2, base=4)
    result = run["steps"][-1]["result"]
    # Of the 4 classes of the base step 3 of 4 images are right, of the later 2 of 8.
    result["confusion"] = [[0, 0, 3], [1, 0, 1], [4, 4, 2], [4, 0, 1], [5, 4, 5]]
    of_run = cells.CellRun("r", 0, "runs/r", "", "done", run)
    assert cells.value(of_run, "final_later_top1") == pytest.approx(25.0)
    first = run["steps"][0]["result"]["top1"]
    assert cells.value(of_run, "base_step_top1") == first
    only = cells.CellRun("r", 0, "runs/r", "", "running", run | {"steps": []})
    assert cells.value(only, "base_step_top1") is None
