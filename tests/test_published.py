"""The paper's numbers as data: the strict reader, and the numbers themselves."""

import json
import math
import re

import pytest

from bsce_jax.report import published, results

TABLES = published.load()


def value(table: str, row: str, column: str) -> float | None:
    (found,) = (r for r in TABLES[table].rows if r.key == row)
    return found.values[column]


def example() -> dict:
    return {
        "table1": {
            "title": "Accuracy",
            "source": "Table 1",
            "columns": [
                {"key": "a", "label": "A", "metric": "final_top1"},
                {"key": "b", "label": "B", "metric": "average_incremental_top5"},
            ],
            "rows": [
                {
                    "key": "x",
                    "label": "X",
                    "origin": "authors' run",
                    "values": [12.5, None],
                }
            ],
        }
    }


def test_a_small_example_is_read_as_it_stands():
    found = published.parse(json.dumps(example()))
    assert found == {
        "table1": published.Table(
            "table1",
            "Accuracy",
            "Table 1",
            (
                published.Column("a", "A", "final_top1"),
                published.Column("b", "B", "average_incremental_top5"),
            ),
            (published.Row("x", "X", "authors' run", {"a": 12.5, "b": None}),),
        )
    }


@pytest.mark.parametrize(
    ("path", "wrong", "message"),
    [
        (("note",), "x", "table1: expected title.*found title.*note"),
        (("title",), 3, "title is not a str"),
        (("source",), "", "source is not a str, or empty"),
        (("columns",), [], "columns is not a list, or empty"),
        (("rows",), {"x": 1}, "rows is not a list"),
        (("columns", 0, "unit"), "%", "a column of table1: expected .*found .*unit"),
        (("columns", 0, "metric"), "top1", "unknown metric 'top1'"),
        (("columns", 1, "key"), "a", "'a' is there twice"),
        (("rows", 0, "seeds"), 3, "a row of table1: expected .*found .*seeds"),
        (("rows", 0), "x", "a row of table1: expected .*found 'x'"),
        (("rows", 0, "origin"), "ours", "row x: unknown origin 'ours'"),
        (("rows", 0, "values"), [1.0], "row x: 1 values for 2 columns"),
        (("rows", 0, "values"), [1.0, 2.0, 3.0], "3 values for 2 columns"),
        (("rows", 0, "values", 0), math.nan, "NaN is not a percentage"),
        (("rows", 0, "values", 0), -math.inf, "-Infinity is not a percentage"),
        (("rows", 0, "values", 0), -0.1, "-0.1 is not a percentage"),
        (("rows", 0, "values", 0), 100.1, "100.1 is not a percentage"),
        (("rows", 0, "values", 0), "12.5", "'12.5' is not a percentage"),
        (("rows", 0, "values", 0), True, "True is not a percentage"),
    ],
)
def test_what_does_not_belong_there_is_refused(path, wrong, message):
    given = example()
    place = given["table1"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = wrong
    with pytest.raises(ValueError, match=message):
        published.parse(json.dumps(given))


def test_missing_and_repeated_keys_and_overflowing_numbers_are_refused():
    given = example()
    del given["table1"]["source"]
    with pytest.raises(ValueError, match="table1: expected title, source"):
        published.parse(json.dumps(given))
    given = example()
    given["table1"]["rows"] *= 2
    with pytest.raises(ValueError, match="'x' is there twice"):
        published.parse(json.dumps(given))
    text = json.dumps(example())
    with pytest.raises(ValueError, match="'title' is there twice"):
        published.parse(text.replace('"source"', '"title"'))
    with pytest.raises(ValueError, match="inf is not a percentage"):
        published.parse(text.replace("12.5", "1e999"))
    with pytest.raises(ValueError, match="tables by key"):
        published.parse("[]")


def test_the_tables_and_figures_are_all_there_in_order():
    figures = ["figure2", "figure3", "figure4a", "figure4b", "figure5"]
    assert list(TABLES) == [f"table{n}" for n in range(1, 7)] + figures
    for key, table in TABLES.items():
        kind, number = re.match(r"(\D+)(\d)", key.capitalize()).groups()
        assert table.key == key and table.title
        assert "Jodelet, Liu, Murata" in table.source
        assert "225, 2022" in table.source and f"{kind} {number}" in table.source
        for row in table.rows:
            assert list(row.values) == [column.key for column in table.columns]
    summary = results.summary([])
    of_steps = {"base_step_top1", "final_later_top1"}  # see cells.value
    assert set(published.METRICS) - of_steps <= set(summary)


# Sums down the columns and numbers in them: typed from the paper's tables anew.
@pytest.mark.parametrize(
    ("table", "sums", "counts"),
    [
        (
            "table1",
            [934.71, 890.38, 544.70, 1068.47, 1023.43, 609.39, 953.86, 909.70, 64.4],
            [15, 15, 10, 15, 15, 10, 15, 15, 1],
        ),
        ("table2", [543.79, 882.25, 140.15], [9, 11, 3]),
        (
            "table3",
            [696.75, 663.22, 801.41, 764.57, 649.81, 447.97],
            [12, 12, 12, 12, 11, 8],
        ),
        ("table4", [76.38, 149.65, 160.40, 170.13, 183.03], [2, 3, 3, 3, 3]),
        (
            "table5",
            [304.43, 271.62, 316.90, 291.59, 241.41, 295.00],
            [5, 5, 5, 5, 5, 5],
        ),
        ("table6", [453.51], [8]),
        ("figure2", [0.0], [0]),
        ("figure3", [163.28, 80.36, 184.36, 39.52], [2, 2, 3, 2]),
        ("figure4a", [0.0] * 12, [0] * 12),
        ("figure4b", [0.0] * 6 + [74.4] + [0.0] * 5, [0] * 6 + [1] + [0] * 5),
        ("figure5", [110.11], [2]),
    ],
)
def test_the_columns_add_up(table, sums, counts):
    rows = [list(row.values.values()) for row in TABLES[table].rows]
    columns = [
        [v for v in column if v is not None] for column in zip(*rows, strict=True)
    ]
    assert [len(column) for column in columns] == counts
    assert [round(sum(column), 2) for column in columns] == sums


@pytest.mark.parametrize(
    ("table", "row", "column", "expected"),
    [
        ("table1", "mnemonics", "cifar100-25", 60.96),
        ("table1", "lucir_reported", "cifar100-25", None),
        ("table1", "il_baseline", "imagenet_subset-10", 42.22),
        ("table1", "podnet_balanced", "imagenet-10", 68.65),
        ("table2", "icarl", "top1", None),
        ("table2", "ssil", "top5", 86.7),
        ("table2", "lucir", "final", 48.30),
        ("table2", "lucir_without_finetuning", "top1", 56.41),
        ("table3", "spb", "imagenet-10", None),
        ("table3", "lucir_relaxed", "imagenet_subset-5", 66.27),
        ("table3", "podnet_relaxed", "imagenet-5", 68.50),
        ("table4", "il_baseline_meta", "memory-1", None),
        ("table4", "il_baseline_balanced", "memory-10", 60.11),
        ("table5", "alpha-0.25", "10-final", 47.86),
        ("table5", "meta", "5-final_base", 61.20),
        ("table6", "class_oversampling", "average", 55.95),
        ("figure3", "lucir_balanced", "final_base", 79.44),
        ("figure3", "lucir_relaxed", "final_later", 34.96),
        ("figure4b", "epsilon-1", "imagenet_subset-5-average", 74.4),
        ("figure5", "il_baseline_meta", "final", 55.35),
    ],
)
def test_cells(table, row, column, expected):
    assert value(table, row, column) == expected


_SWEEP = ["average_incremental_top1", "final_base_top1", "final_later_top1"] * 4
METRICS = {
    "table1": ["average_incremental_top1"] * 8 + ["final_top1"],
    "table2": ["average_incremental_top1", "average_incremental_top5", "final_top1"],
    "table5": ["final_base_top1", "final_top1", "average_incremental_top1"] * 2,
    "figure2": ["final_top1"],
    "figure3": ["base_step_top1", "final_top1", "final_base_top1", "final_later_top1"],
    "figure4a": _SWEEP,
    "figure4b": _SWEEP,
    "figure5": ["final_top1"],
}


def test_the_metrics_of_the_columns():
    for key, table in TABLES.items():
        found = [column.metric for column in table.columns]
        expected = METRICS.get(key, ["average_incremental_top1"] * len(found))
        assert found == expected


def test_the_runs_of_the_authors():
    ran = ("il_baseline", "lucir", "podnet", "ncm", "slda")
    for key in ("table1", "table2", "table3"):
        for row in TABLES[key].rows:
            own = row.key.startswith(ran) and not row.key.endswith(("reported", "dde"))
            assert row.origin == published.ORIGINS[0 if own else 1], row.key
    for key in list(TABLES)[3:]:
        assert {row.origin for row in TABLES[key].rows} == {"authors' run"}


def better(table: str, row: str, than: str) -> list[bool]:
    """Of each column in which both rows have a number."""
    columns = [column.key for column in TABLES[table].columns]
    pairs = [(value(table, row, c), value(table, than, c)) for c in columns]
    return [a > b for a, b in pairs if a is not None and b is not None]


def test_what_the_paper_says_about_its_numbers():
    for method in ("il_baseline", "lucir", "podnet"):
        for table in ("table1", "table2"):
            assert all(better(table, f"{method}_balanced", method))
    assert better("table1", "il_baseline_meta", "il_baseline_balanced") == [
        *(True, True, False),  # 25 steps: the short steps are too small for Meta
        *(True, True, False),
        *(False, False),
    ]
    for method in ("lucir", "podnet"):
        assert all(better("table3", f"{method}_relaxed", method))
        assert all(better("table3", f"{method}_relaxed", f"{method}_balanced"))
    assert all(better("table4", "il_baseline_balanced", "il_baseline"))
    assert all(better("table4", "il_baseline_meta", "il_baseline_balanced"))
    averages = [row.values["average"] for row in TABLES["table6"].rows]
    assert averages == sorted(averages)
    base = [
        value("table5", f"alpha-{a}", "5-final_base") for a in (0.1, 0.25, 0.5, 1.0)
    ]
    assert base == sorted(base, reverse=True)
    # In the text: what Relaxed changes of BalancedS-CE, base and latest classes.
    for column, points in (("final_base", -4.28), ("final_later", 30.40)):
        relaxed, balanced = (
            value("figure3", f"lucir_{prior}", column)
            for prior in ("relaxed", "balanced")
        )
        assert round(relaxed - balanced, 2) == points
    # The accuracies of the 50 base and of the latest 50 classes average to that of all.
    whole, old, later = (
        value("figure3", "lucir_balanced", c)
        for c in ("final", "final_base", "final_later")
    )
    assert (old + later) / 2 == pytest.approx(whole)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            ("table1", "il_baseline", "cifar100-5"),
            ("table4", "il_baseline", "memory-20"),
        ),
        (("table1", "il_baseline", "cifar100-5"), ("table6", "il_baseline", "average")),
        (
            ("table1", "il_baseline_meta", "cifar100-10"),
            ("table5", "meta", "10-average"),
        ),
        (
            ("table1", "il_baseline_balanced", "cifar100-5"),
            ("table5", "alpha-1.0", "5-average"),
        ),
        (("table4", "il_baseline_meta", "memory-20"), ("table6", "meta", "average")),
    ],
)
def test_a_run_has_the_same_number_in_every_table(one, other):
    assert value(*one) == value(*other) is not None
