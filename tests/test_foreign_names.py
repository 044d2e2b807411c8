"""Names that come from others: in a terminal, in Markdown, in a spreadsheet."""

import csv
import io
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsce_jax import terminal
from bsce_jax.errors import UserError, field_error, printable
from bsce_jax.report import page_text, results, tables
from bsce_jax.report.__main__ import main as report
from tests.example_page import build
from tests.example_results import make_results

HOSTILE = "\x1b[2Jgone\r\nsecond\x07\x9b31m\u202e\udc80\u2028"


@given(st.text())
def test_what_cannot_be_seen_is_escaped(text):
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    assert shown == text or not text.isprintable()
    shown.encode()  # no half of a surrogate pair is left


def test_a_mistake_is_one_line_whatever_it_quotes(tmp_path):
    for error in (UserError(f"class {HOSTILE}"), field_error("name", HOSTILE, "less")):
        assert str(error).isprintable() and "gone" in str(error)
    with pytest.raises(UserError) as caught:
        results.read(tmp_path / "\x1b[2J\nnothing")
    assert str(caught.value).isprintable() and "x1b[2J" in str(caught.value)


def test_tables_and_the_command_show_no_escape_sequence(tmp_path, capsys):
    results.write(tmp_path, make_results(name="a run"))
    (tmp_path / "\x1b[31mno run").mkdir()
    assert report([str(tmp_path), str(tmp_path / "\x1b[31mno run")]) == 0
    made = json.dumps(make_results(name=HOSTILE))
    (tmp_path / results.FILE_NAME).write_text(made)
    assert report([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "gone" in err and "left out" in err
    for line in (out + err).split("\n"):
        assert line.isprintable(), line
    assert tables.comparison([make_results(name=HOSTILE)], True).count("\n") == 2


def test_a_log_record_is_one_line(monkeypatch, capsys):
    logger = logging.getLogger("bsce_jax")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logging.INFO)
    terminal.log_to_stderr()
    logger.info("class %s", HOSTILE)
    try:
        raise ValueError("a fault")
    except ValueError:
        logger.exception("failed")
    first, second, *traceback = capsys.readouterr().err.splitlines()
    assert first.isprintable() and "gone" in first
    assert second.endswith("failed") and traceback[-1] == "ValueError: a fault"


@pytest.mark.parametrize(
    ("first", "shown"),
    [*((first, f"'{first}") for first in "=+-@"), ("\t=", "\\t="), ("\r=", "\\r=")],
)
def test_no_cell_is_a_formula(first, shown):
    report = build(protocol=f"{first}HYPERLINK(1)")
    for row in csv.DictReader(io.StringIO(page_text.csv_table(report), newline="")):
        assert row["protocol"] == f"{shown}HYPERLINK(1)"
        for text in row.values():
            if text.startswith(("=", "+", "-", "@")):
                float(text)


def test_no_field_of_a_run_is_markup_in_markdown():
    report = build()
    run = report.runs[0]
    assert run.results is not None
    run.results["config"]["seed"] = "<b>|[x](y)"
    text = page_text.markdown(report, {}, {"seed": 0})
    assert "<b>|" not in text and "\\<b\\>\\|\\[x\\](y)" in text
