"""The report as one HTML page: no scripts, and nothing is loaded from anywhere.

Cells open with the browser's own popovers, which need no script and work with the
keyboard; the content security policy forbids every request.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from bsce_jax.report import page_runs
from bsce_jax.report.cells import NEAR, Cell, Report, Section
from bsce_jax.report.markup import Html, join, tag
from bsce_jax.report.pictures import Picture

TITLE = "Balanced Softmax for incremental learning: results"
PAPER = "https://doi.org/10.48550/arXiv.2103.12532"
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_MINUS = "\N{MINUS SIGN}"


def document(
    report: Report,
    pictures: Mapping[str, Sequence[Picture]],
    defaults: Mapping[str, Any],
    css: str,
) -> str:
    """The page.

    Args:
      report: tables and runs.
      pictures: of each table, by its key.
      defaults: of a configuration's fields, by dotted name.
      css: the style sheet.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", TITLE),
        tag("style", Html(css)),
    )
    main = tag(
        "main",
        *(
            _section(section, pictures.get(section.table.key, ()), report, defaults)
            for section in report.sections
        ),
        page_runs.section(report.runs),
    )
    body = tag("body", _header(report), main)
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def difference(points: float) -> str:
    """With its sign and two digits, a real minus among them."""
    return f"{points:+.2f}".replace("-", _MINUS)


def near(points: float) -> bool:
    """Whether a difference is within a point, as it is shown."""
    return abs(round(points, 2)) <= NEAR


def summary(report: Report) -> str:
    """How far the reproduction has come, in a sentence or two."""
    cells = [cell for cell in report.cells if cell.paper is not None]
    ours = [cell for cell in cells if cell.difference is not None]
    done = sum(run.done for run in report.runs)
    text = (
        f"{len(ours)} of the {len(cells)} published numbers in these tables have a "
        f"number of ours, from {done} finished runs (of {len(report.runs)} planned)."
    )
    if ours and not report.reduced:
        close = sum(near(cell.difference or 0.0) for cell in ours)
        text += f" {close} of {len(ours)} are within {NEAR:g} point of the paper's."
    return text


def _header(report: Report) -> Html:
    links = [
        tag("li", tag("a", section.name, href=f"#{section.table.key}"))
        for section in report.sections
    ]
    links.append(tag("li", tag("a", "Runs", href="#runs")))
    warning = Html("")
    if report.reduced:
        warning = tag(
            "p",
            tag("strong", "Not comparable with the paper. "),
            "These runs follow another protocol. ",
            tag("strong", report.protocol),
            class_="warning",
            role="note",
        )
    return tag(
        "header",
        tag("h1", "Balanced Softmax for incremental learning"),
        tag(
            "p",
            "The tables and figures of Jodelet, Liu and Murata, ",
            tag("cite", tag("a", "Balanced softmax cross-entropy", href=PAPER)),
            " (2022), run again with bsce_jax. Accuracies are in percent.",
            class_="lead",
        ),
        warning,
        tag("p", summary(report)),
        _legend(report),
        tag("nav", tag("ul", *links), aria_label="Tables"),
    )


def _legend(report: Report) -> Html:
    judged = () if report.reduced else (
        tag("span", "≈", class_="delta near"),
        f" within {NEAR:g} point of the paper, ",
        tag("span", "▲", class_="delta far"),
        " above, ",
        tag("span", "▼", class_="delta far"),
        " below. ",
    )  # fmt: skip
    return tag(
        "p",
        tag("b", "In a cell: "),
        "ours, the mean over the seeds ± their sample standard deviation; under it the "
        "paper's number and the difference, ours minus the paper's. ",
        *judged,
        "Rows marked reported are numbers that the paper takes from the literature. ",
        tag("span", "Select a cell for its configuration and command.", class_="live"),
        class_="legend",
    )


def _section(
    section: Section,
    pictures: Sequence[Picture],
    report: Report,
    defaults: Mapping[str, Any],
) -> Html:
    table, key = section.table, section.table.key
    ordered = sorted(pictures, key=_is_wide)  # the narrow ones side by side
    notes = [
        tag("li", tag("b", f"{mark} "), reason, id=f"{key}-note-{mark}")
        for reason, mark in section.notes().items()
    ]
    return tag(
        "section",
        tag("h2", tag("span", section.name), f" {table.title}", id=f"{key}-title"),
        _scroll(_table(section, report), f"{key}-title"),
        tag("ul", *notes, class_="notes") if notes else "",
        tag("p", f"Paper's numbers: {table.source}.", class_="source"),
        tag("div", *map(_figure, ordered), class_="figures") if pictures else "",
        *(
            page_runs.details(section, cell, _identifier(section, cell), defaults)
            for cell in section.cells.values()
            if cell.runs
        ),
        id=key,
        aria_labelledby=f"{key}-title",
    )


def _scroll(content: Html, label: str) -> Html:
    """A box that scrolls sideways by itself, with the keyboard too."""
    return tag(
        "div",
        content,
        class_="scroll",
        tabindex=0,
        role="region",
        aria_labelledby=label,
    )


def _table(section: Section, report: Report) -> Html:
    notes = section.notes()
    rows = []
    for row in section.table.rows:
        origin = "reported" if row.origin.startswith("reported") else ""
        name = tag("th", row.label, tag("small", origin) if origin else "", scope="row")
        cells = [
            _cell(section, cell, notes.get(cell.missing, ""), report.reduced)
            for cell in section.row(row)
        ]
        rows.append(tag("tr", name, *cells))
    return tag("table", _head(section), tag("tbody", *rows), class_="numbers")


def _head(section: Section) -> Html:
    """Column labels; what neighbours share before the comma stands above them once."""
    parts = [column.label.partition(", ") for column in section.table.columns]
    if not all(comma for _, comma, _ in parts):
        labels = [_label(column.label) for column in section.table.columns]
        return tag("thead", tag("tr", tag("td"), *labels))
    groups: list[list[str]] = []
    for group, _, _ in parts:
        if groups and groups[-1][0] == group:
            groups[-1].append(group)
        else:
            groups.append([group])
    upper = [tag("th", g[0], scope="colgroup", colspan=len(g)) for g in groups]
    lower = [_label(label) for _, _, label in parts]
    return tag(
        "thead",
        tag("tr", tag("td", rowspan=2), *upper),
        tag("tr", *lower),
    )


def _label(text: str) -> Html:
    return tag("th", text, scope="col", class_="short" if len(text) < 10 else None)


def _cell(section: Section, cell: Cell, note: str, reduced: bool) -> Html:
    content = [_ours(section, cell, note)]
    if cell.paper is not None:
        words = tag("span", "; paper ", class_="unseen")
        lower: list[str] = [words, tag("span", f"{cell.paper:.2f}", class_="paper")]
        if cell.difference is not None:
            lower += [" ", _delta(cell.difference, reduced)]
        content.append(tag("span", *lower, class_="line"))
    if cell.values:
        finished = len(cell.values)
        seeds = cell.state or f"{finished} seed{'s' if finished > 1 else ''}"
        content.append(tag("span", seeds, class_="line seeds"))
    kinds = ["empty"] if not cell.values else []
    kinds += ["unfinished"] if cell.state and cell.runs else []
    inside = join(*content)
    if cell.runs:
        inside = tag(
            "button",
            inside,
            type="button",
            popovertarget=_identifier(section, cell),
        )
    return tag("td", inside, class_=" ".join(kinds) or None)


def _ours(section: Section, cell: Cell, note: str) -> Html:
    if cell.mean is not None:
        spread = "" if cell.deviation is None else f" ± {cell.deviation:.2f}"
        return tag(
            "span",
            f"{cell.mean:.2f}",
            tag("small", spread) if spread else "",
            class_="line ours",
        )
    if cell.runs:
        return tag("span", cell.state, class_="line state")
    mark = tag(
        "a",
        note,
        href=f"#{section.table.key}-note-{note}",
        aria_label=f"not run, note {note}",
    )
    return tag("span", "–", tag("sup", mark), class_="line")


def _delta(points: float, reduced: bool) -> Html:
    """A difference; by sign, shape, words and colour within a point or not."""
    text = difference(points)
    if reduced:
        return tag("span", text, class_="delta")
    if near(points):
        words, shape, kind = "within a point", "≈", "near"
    else:
        above = points > 0
        words, shape, kind = "beyond a point", "▲" if above else "▼", "far"
    return tag(
        "span",
        tag("span", shape, aria_hidden="true"),
        f" {text}",
        tag("span", f", {words}", class_="unseen"),
        class_=f"delta {kind}",
    )


def _figure(picture: Picture) -> Html:
    data = base64.b64encode(picture.png).decode()
    image = tag(
        "img",
        src=f"data:image/png;base64,{data}",
        alt=picture.text,
        width=picture.width,
        height=picture.height,
    )
    box = tag(
        "div", image, class_="scroll", tabindex=0, role="group", aria_label="Picture"
    )
    return tag(
        "figure",
        box,
        tag("figcaption", picture.caption),
        class_="wide" if _is_wide(picture) else None,
    )


def _is_wide(picture: Picture) -> bool:
    return picture.width > 700


def _identifier(section: Section, cell: Cell) -> str:
    """Of a cell's popover: positions, since keys may hold any character."""
    row = section.table.rows.index(cell.row)
    column = section.table.columns.index(cell.column)
    return f"{section.table.key}-cell-{row}-{column}"
