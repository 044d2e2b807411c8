"""The page of a reproduction: its HTML, Markdown and CSV."""

import csv
import functools
import html.parser
import io
import json
import pathlib
import re
from typing import Any

import pytest

from bsce_jax.config.fields import phase
from bsce_jax.config.hashes import flatten
from bsce_jax.errors import UserError
from bsce_jax.report import cells, page, page_html, page_text, plots, results
from bsce_jax.report.markup import Html, join, tag
from tests import example_page
from tests.example_page import (
    REDUCED,
    SCRIPT,
    build,
    cell,
    entry,
    make_run,
    manifest,
    small,
    table,
)

VOID = {"br", "img", "link", "meta"}


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of few pixels, which are drawn in half of the time."""
    monkeypatch.setitem(plots._STYLE, "figure.dpi", 50)


@functools.cache
def render(**kinds: Any) -> page.Page:
    return page.render(*small(**kinds), {"table1": table()}, {"seed": 0})


class Tree(html.parser.HTMLParser):
    """Checks that tags are balanced; keeps them and the text of table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, name: str, given: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, dict(given)))
        assert len(dict(given)) == len(given), "an attribute twice"
        if name not in VOID:
            self.open.append(name)
        if name == "td":
            self.cells.append("")

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [given for found, given in self.tags if found == name]


# numbers


@pytest.mark.parametrize(
    ("points", "close"), [(0.0, True), (-1.0, True), (1.004, True), (1.01, False)]
)
def test_within_a_point_is_judged_as_shown(points: float, close: bool) -> None:
    assert page_html.near(points) is close


def test_summary_in_words() -> None:
    assert page_html.summary(build()) == (
        "2 of the 4 published numbers in these tables have a number of ours, from 3 "
        "finished runs (of 5 planned). 0 of 2 are within 1 point of the paper's."
    )
    assert "within" not in page_html.summary(build(protocol=REDUCED))


# HTML


def test_markup_escapes_what_is_not_markup() -> None:
    made = tag("a", "<&>", tag("br"), class_='"', aria_label=None, href="#x")
    assert made == '<a class="&quot;" href="#x">&lt;&amp;&gt;<br></a>'
    assert join("<", Html("<b></b>"), separator="&") == "&lt;&amp;<b></b>"


def test_html_is_balanced_and_loads_nothing() -> None:
    text = render().html
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    tree = Tree(text)
    assert not tree.all("script") and not tree.all("link")
    sources = [given["src"] for given in tree.all("img")]
    assert sources and all(s.startswith("data:image/png;base64,") for s in sources)
    assert all(given["alt"] for given in tree.all("img"))
    links = [given["href"] for given in tree.all("a")]
    assert {link for link in links if not link.startswith("#")} == {page_html.PAPER}
    assert set(re.findall(r"https?://[^\"<\s]*", text)) == {page_html.PAPER}
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    identifiers = [given["id"] for _, given in tree.tags if "id" in given]
    assert len(identifiers) == len(set(identifiers))
    assert {link[1:] for link in links if link[0] == "#"} <= set(identifiers)
    targets = {given.get("popovertarget") for given in tree.all("button")}
    popovers = {given["id"] for _, given in tree.tags if "popover" in given}
    assert targets == popovers and len(popovers) == 3


def test_cells_show_what_was_computed() -> None:
    found = Tree(render().html).cells
    assert "61.30 ± 1.47; paper 60.00 ▲ +1.30, beyond a point3 seeds" in found
    assert (
        "47.30 ± 1.47; paper 50.00 ▼ \N{MINUS SIGN}2.70, beyond a point3 seeds" in found
    )
    assert "running, to do; paper 40.00" in found
    assert "–b; paper 30.00" in found
    assert "–a" in found  # neither ours nor the paper's
    close = Tree(render(averages=(60.5,)).html).cells
    assert "60.50; paper 60.00 ≈ +0.50, within a point1 seed" in close


def test_a_cell_opens_its_command_and_configuration() -> None:
    text = render().html
    start = text.index('id="table1-cell-0-0" popover')
    shown = text[start : text.index("</section>", start)]
    assert re.sub("<[^>]*>", "", shown).count("python -m bsce_jax.main --config") >= 3
    assert "seed</code></th><td><code>0, 1, 2</code></td><td><code>0</code>" in shown
    assert 'popovertargetaction="hide"' in shown
    assert "1 step so far" not in shown and "2 steps so far" in shown


def test_whatever_is_in_a_name_is_only_text() -> None:
    given, found = small()
    for item in given["cells"]:
        for run in item["runs"]:
            run["name"] = run["command"] = SCRIPT
    given["protocol"] = f"reduced: {SCRIPT}"
    for run in found.values():
        run["name"] = SCRIPT
        run["config"][SCRIPT] = f'"{SCRIPT}'
        run["steps"][-1]["telemetry"]["device"] = SCRIPT
        run["steps"][-1]["telemetry"]["commit"] = SCRIPT
        run["steps"][-1]["telemetry"]["versions"] = {SCRIPT: SCRIPT}
    tables = {"table1": table(label=f'"{SCRIPT}')}
    made = page.render(given, found, tables, {SCRIPT: ""})
    assert not Tree(made.html).all("script") and "<title>" in made.html
    assert SCRIPT not in made.html
    outside = re.sub(r"^    .*$", "", made.markdown, flags=re.MULTILINE)
    assert not re.search(r"(?<!\\)<(?!br>)", outside)  # commands are a code block


def test_a_reduced_protocol_is_said_first_and_nothing_is_judged() -> None:
    full, reduced = render(), render(protocol=REDUCED)
    assert "Not comparable" not in full.html + full.markdown
    for text in (reduced.html, reduced.markdown):
        assert REDUCED in text and "Not comparable with the paper" in text
        assert text.index(REDUCED) < text.index("Table 1")
        assert "≈" not in text and "≠" not in text and "▲" not in text
    assert "61.30 ± 1.47; paper 60.00 +1.303 seeds" in Tree(reduced.html).cells


def test_nothing_done_yet_is_a_page_too() -> None:
    given, _ = small()
    made = page.render(given, {}, {"table1": table()}, {})
    assert not Tree(made.html).all("img")
    assert "Known as soon as a run has started." in made.html


# CSV and Markdown


def test_csv_parses_back() -> None:
    report = build(protocol=REDUCED)
    rows = list(csv.DictReader(io.StringIO(page_text.csv_table(report))))
    assert len(rows) == 6
    found = {(row["row"], row["column"]): row for row in rows}
    assert list(rows[0]) == list(page_text.CSV_FIELDS)
    done = found["a", "five"]
    numbers = [float(done[key]) for key in ("paper", "ours", "difference", "deviation")]
    assert numbers == pytest.approx([60.0, 61.3, 1.3, 2.17**0.5], abs=1e-4)
    assert (done["seeds_done"], done["seeds_planned"], done["state"]) == ("3", "3", "")
    assert done["runs"] == "r0; r1; r2" and done["protocol"] == REDUCED
    assert done["values"] == "60.0000; 61.0000; 62.9000"
    assert done["seconds"].count("; ") == done["images_per_second"].count("; ") == 2
    assert done["commands"].count("python -m bsce_jax.main") == 3
    assert found["b", "five"]["values"].endswith("; none")  # one run has nothing yet
    assert done["row_label"] == table().rows[0].label
    assert found["b", "ten"]["state"] == f"no {SCRIPT} here"
    assert found["b", "ten"]["ours"] == found["a", "ten"]["paper"] == ""


def test_markdown_tables_have_as_many_columns_in_every_row() -> None:
    text = render().markdown
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1
    assert "**61.30** ± 1.47 (3 seeds)<br>paper 60.00, ≠ +1.30" in text
    assert "not run [b]<br>paper 30.00" in text
    assert r"* [b] no \<script\>alert(1)\</script\> here" in text
    assert r"| B\|C (reported) |" in text
    assert "    python -m bsce_jax.main --config" in text
    assert "Top-1 accuracy after each step (and number of classes). " in text
    assert re.search(r"^\* r1: .*\bseed = 1\b", text, flags=re.MULTILINE)


# files


def test_the_command_writes_three_files(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(steps=2, base=4, average=63.0)
    (tmp_path / "runs/r").mkdir(parents=True)
    results.write(tmp_path / "runs/r", run)
    given = manifest([cell("table6/balanced/average", [entry("r")])])
    (tmp_path / "manifest.json").write_text(json.dumps(given))
    assert page.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"manifest.json", "runs", "report.html", "report.md", "report.csv"}
    found = Tree((tmp_path / "report.html").read_text(encoding="utf-8")).cells
    assert "63.00; paper 62.22 ≈ +0.78, within a point1 seed" in found
    first = (tmp_path / "report.html").read_bytes()
    page.write(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("other", "", "does not exist: expected the folder of a reproduction"),
        ("manifest.json", "{", "is not JSON"),
        ("manifest.json", "[]", "expected an object of schema 1"),
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
    message: str,
) -> None:
    (tmp_path / name).write_text(text)
    assert page.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {name}


@pytest.mark.slow
def test_sweeps_and_pictures_of_the_papers_tables(tmp_path: pathlib.Path) -> None:
    """Of Table 1 one column; the whole page is drawn for the browser's tests."""
    example_page.write_example(tmp_path)
    given = json.loads((tmp_path / "manifest.json").read_text())
    left_out = ("cifar100-10", "cifar100-25")
    given["cells"] = [c for c in given["cells"] if c["column"] not in left_out]
    (tmp_path / "manifest.json").write_text(json.dumps(given))
    page.write(tmp_path)
    tree = Tree((tmp_path / "report.html").read_text(encoding="utf-8"))
    texts = [given["alt"] or "" for given in tree.all("img")]
    assert len(texts) == 10
    assert sum(text.startswith("Top-1 accuracy after each step") for text in texts) == 2
    assert sum(text.startswith("True against predicted") for text in texts) == 3
    assert sum(text.startswith("Alpha over the updates") for text in texts) == 3
    alpha = next(text for text in texts if text.startswith("alpha = 0.1, "))
    assert "alpha = 0.25, 5 steps, average: 64." in alpha and "(paper 64.09 %)" in alpha
    epsilon = next(text for text in texts if "ε = 0.2 %" in text)
    assert "PODNet" not in epsilon


def test_one_unreadable_file_does_not_cost_the_page(tmp_path: pathlib.Path) -> None:
    for name in ("good", "bad"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        results.write(tmp_path / "runs" / name, make_run(steps=2, base=4, average=63.0))
    (tmp_path / "runs/bad/results.json").write_text('{"schema"')
    given = [
        cell("table6/balanced/average", [entry("good")]),
        cell("table6/meta/average", [entry("bad")]),
    ]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest(given)))
    page.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "**63.00** (1 seed)" in text and "unreadable results" in text


def test_test_images_that_were_skipped_are_told() -> None:
    given, found = small()
    found["runs/r1"]["steps"][-1]["telemetry"]["skipped_test_images"] = 7
    made = page.render(given, found, {"table1": table()}, {"seed": 0})
    assert "(some test images skipped)" in made.markdown
    assert "done, 7 test images skipped" in made.html


def test_what_a_method_has_learned_beside_the_network_is_shown() -> None:
    given, found = small((60.0,))
    for number, record in enumerate(found["runs/r0"]["steps"][1:], 1):
        record["result"]["own"] = {"scale": 1.0 - number / 8, "shift_<": -0.0625}
    made = page.render(given, found, {"table1": table()}, {"seed": 0})
    text = "step 1: scale 0.875, shift_&lt; -0.0625; step 2: scale 0.75, "
    assert made.html.count(f"<li>seed 0: {text}") == 2  # in each cell of the run
    assert made.html.count("<h4>Learned</h4>") == 2
    shown = made.markdown.partition("## Learned beside the network\n\n")[2]
    assert shown.startswith(r"* r0: step 1: scale 0.875, shift\_\< -0.0625; step 2: ")
    assert "earned" not in render().html + render().markdown


def test_fields_of_a_method_s_own_phases_have_the_defaults_of_a_phase(
    tmp_path: pathlib.Path,
) -> None:
    run = make_run(steps=2, base=4)
    of_phase = {f"phase.bias.{k}": v for k, v in flatten(phase(epochs=3)).items()}
    run["config"] |= of_phase | {"phase.bias.old_field": 1}
    (tmp_path / "runs/r").mkdir(parents=True)
    results.write(tmp_path / "runs/r", run)
    given = manifest([cell("table6/balanced/average", [entry("r")])])
    (tmp_path / "manifest.json").write_text(json.dumps(given))
    page.write(tmp_path)
    changed = (tmp_path / "report.md").read_text().splitlines()[-1]
    assert r"phase.bias.epochs = 3" in changed and r"bias.old\_field = 1" in changed
    assert changed.count("phase.") == 2


def test_runs_that_no_program_wrote_are_no_crash() -> None:
    given, found = small()
    found["runs/r0"]["steps"] = []
    page.render(given, found, {"table1": table()}, {"seed": 0})
    given["cells"][0]["table"] = ["table1"]
    with pytest.raises(UserError, match="expected text"):
        cells.workdirs(given)
