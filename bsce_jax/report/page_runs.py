"""The runs on the page: a cell's configuration and commands, and a list of them all."""

from collections.abc import Mapping, Sequence
from typing import Any

from bsce_jax.report.cells import Cell, CellRun, Results, Section, value
from bsce_jax.report.markup import Html, join, tag
from bsce_jax.report.run_facts import (
    Environment,
    Facts,
    Setting,
    facts,
    fields,
    learned,
    rate,
    short_commit,
    wall_time,
)


def details(
    section: Section, cell: Cell, identifier: str, defaults: Mapping[str, Any]
) -> Html:
    """Popover of a cell: its runs, their commands and their configuration."""
    runs = [run.results for run in cell.runs if run.results is not None]
    title = f"{identifier}-title"
    close = tag(
        "button",
        "Close",
        type="button",
        class_="close",
        popovertarget=identifier,
        popovertargetaction="hide",
    )
    return tag(
        "div",
        tag("h3", f"{section.name}: {cell.row.label}", id=title),
        tag("p", f"{cell.column.label} ({cell.column.metric})"),
        _seeds(cell),
        tag("h4", "Command" if len(cell.runs) == 1 else "Commands"),
        *(_command(run) for run in cell.runs),
        *_learned(cell),
        *_configuration(runs, defaults),
        close,
        id=identifier,
        popover="auto",
        role="dialog",
        aria_labelledby=title,
        class_="details",
    )


def section(runs: Sequence[CellRun]) -> Html:
    """Speed, time and origin of every run."""
    found = {run.workdir: facts(run.results) for run in runs if run.results is not None}
    environments = _environments(found)
    rows = [_row(run, found.get(run.workdir), environments) for run in runs]
    names = (
        "run", "seed", "status", "steps done", "images/s", "wall time", "device",
        "environment",
    )  # fmt: skip
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names)))
    return tag(
        "section",
        tag("h2", tag("span", "Runs"), id="runs-title"),
        tag(
            "p",
            "Images/s in training, the median over the steps; wall time of the steps, "
            "evaluation and compilation included, + base step where that was taken "
            "over from another run.",
        ),
        tag(
            "div",
            tag("table", head, tag("tbody", *rows), class_="list"),
            class_="scroll",
            tabindex=0,
            role="region",
            aria_labelledby="runs-title",
        ),
        _environment_list(environments),
        id="runs",
        aria_labelledby="runs-title",
    )


def state(run: CellRun) -> str:
    """Status of a run in a word."""
    if run.done and run.skipped:
        return f"done, {run.skipped} test images skipped"
    if run.done:
        return "done"
    return "unfinished" if run.status == "done" else run.status


def _environments(found: Mapping[str, Facts]) -> dict[Environment, int]:
    """Number, from 1, of each distinct environment."""
    known = [item.environment for item in found.values()]
    distinct = dict.fromkeys(item for item in known if any(item))
    return {item: number for number, item in enumerate(distinct, 1)}


def _environment_list(environments: Mapping[Environment, int]) -> Html:
    items = []
    for item in environments:
        versions = ", ".join(f"{name} {version}" for name, version in item.versions)
        pieces = [item.device, f"commit {item.commit}" if item.commit else "", versions]
        items.append(tag("li", "; ".join(filter(None, pieces))))
    if not items:
        return Html("")
    return join(tag("h3", "Environments"), tag("ol", *items, class_="environments"))


def _row(
    run: CellRun, known: Facts | None, environments: Mapping[Environment, int]
) -> Html:
    cells = [tag("td", str(run.seed)), tag("td", state(run))]
    steps = 0 if run.results is None else len(run.results["steps"])
    cells.append(tag("td", str(steps) if steps else "–"))
    if known is None:
        cells += [tag("td", "–")] * 4
    else:
        speed = known.images_per_second
        place = known.environment
        number = environments.get(place)
        where = f"{number}" if number else "–"
        if place.commit:
            where += f" ({short_commit(place.commit)})"
        cells += [
            tag("td", "–" if speed is None else rate(speed)),
            tag("td", wall_time(known)),
            tag("td", place.device or "–", class_="text"),
            tag("td", where, class_="text"),
        ]
    return tag("tr", tag("th", run.name, scope="row"), *cells)


def _seeds(cell: Cell) -> Html:
    rows = []
    for run in cell.runs:
        found = value(run, cell.column.metric)
        known = None if run.results is None else facts(run.results)
        speed = known and known.images_per_second
        rows.append(
            tag(
                "tr",
                tag("th", str(run.seed), scope="row"),
                tag("td", _progress(run)),
                tag("td", "–" if found is None else f"{found:.2f}"),
                tag("td", "–" if speed is None else rate(speed)),
                tag("td", "–" if known is None else wall_time(known)),
            )
        )
    names = ("seed", "status", "accuracy", "images/s", "wall time")
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names)))
    return tag("table", head, tag("tbody", *rows), class_="list")


def _learned(cell: Cell) -> tuple[Html, ...]:
    """What the method has learned beside the network, a line a run; or nothing."""
    items = []
    for run in cell.runs:
        texts = [] if run.results is None else learned(run.results)
        if texts:
            items.append(tag("li", f"seed {run.seed}: {'; '.join(texts)}"))
    return (tag("h4", "Learned"), tag("ul", *items)) if items else ()


def _progress(run: CellRun) -> str:
    if run.results is None or run.done:
        return state(run)
    done = len(run.results["steps"])
    return f"{state(run)}, {done} step{'' if done == 1 else 's'} so far"


def _command(run: CellRun) -> Html:
    label = f"Command of seed {run.seed}"
    # A line ends between arguments, not at the hyphens within.
    words = [tag("span", word) for word in run.command.split(" ")]
    code = tag("code", join(*words, separator=" "))
    return tag("pre", code, tabindex=0, aria_label=label)


def _configuration(
    runs: Sequence[Results], defaults: Mapping[str, Any]
) -> tuple[Html, ...]:
    heading = tag("h4", "Configuration")
    if not runs:
        return (heading, tag("p", "Known as soon as a run has started."))
    changed, rest = fields(runs, defaults)
    lines = "\n".join(f"{field.name} = {field.value}" for field in rest)
    return (
        heading,
        _fields(changed),
        tag(
            "details",
            tag("summary", f"{len(rest)} fields at their default"),
            tag("pre", tag("code", lines)),
        ),
    )


def _fields(found: Sequence[Setting]) -> Html:
    rows = []
    for field in found:
        default = "–" if field.default is None else field.default
        cells = [tag("td", tag("code", text)) for text in (field.value, default)]
        rows.append(tag("tr", tag("th", tag("code", field.name), scope="row"), *cells))
    names = ("differs from the default", "value", "default")
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names)))
    return tag("table", head, tag("tbody", *rows), class_="list fields")
