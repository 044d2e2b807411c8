"""The fields of the configuration in words: docs/configuration.md, and --help.

python -m bsce_jax.config.page > docs/configuration.md
"""

import itertools
import textwrap
from collections.abc import Iterable
from typing import Any

from bsce_jax.config.declare import Field, kind
from bsce_jax.config.fields import FIELDS, PHASE

_HEAD = """\
# Configuration

Every field of a run's configuration, written by `python -m bsce_jax.config.page` from
[its declarations](../bsce_jax/config/fields.py). Each may be set in a
configuration file, `config.data.padding = 1`, or on the command line,
`--config.data.padding=1`; a tuple is quoted there:
`"--config.phase.base.milestones=(100, 150)"`. `python -m bsce_jax.main --help` shows
the same fields.

The last column says where a field counts. `run`: it is part of the run's hash, by which
a workdir knows its run; `run, base`: also of the hash by which runs share a base step,
as it stands; `-`: it cannot change the results, and may differ when a run goes on.
What else reaches the base step does so not as it stands: the classes and images that
follow from `scenario`, and what terms and prior are without old classes.
"""
_PHASES_TITLE = "Phases"
_PHASES = """\
A phase is a program and the steps in which it runs. `phases` has their names in order,
and each has a section `phase.<name>` with the fields below. The phases of a step run
one after the other; all but those with `teacher = now` learn from the same teacher.
By default there are two:

* `base`: `steps = base`, `teacher = none`, `epochs = 250`,
  `milestones = (100, 150, 200)`.
* `incremental`: `steps = later`, and the same epochs and milestones.

A method's file in `configs/methods/` adds others, such as a balanced fine-tuning of the
head on the exemplars:

```python
config.phases = ("base", "incremental", "finetune")
config.phase.finetune = phase(
    images="exemplars",
    when_prior="none",
    epochs=20,
    learning_rate=0.01,
    rate=only(head=1.0),
    batch_norm="eval",
)
```

`phase` and `only` are those of `bsce_jax.config`. Each field may be overridden:
`--config.phase.finetune.epochs=3`. The names of the phases have no meaning. All fields
of a phase are part of the run's hash; those of the phases of the base step, but for
`terms`, reach the base step.
"""


def shown(value: Any) -> str:
    """A default as it would be written."""
    if value is None:
        return "none given"
    if isinstance(value, str):
        return value or "''"
    return str(value)


def allowed(field: Field) -> str:
    """What a field may be: its choices, else its type and bounds."""
    if field.choices:
        return ", ".join(field.choices)
    if isinstance(field.default, dict):
        return "a section"
    bounds = [
        f"{words} {bound:g}" if abs(bound) < 1e6 else f"{words} {bound}"
        for words, bound in (("at least", field.least), ("at most", field.most))
        if bound is not None
    ]
    return ", ".join([kind(field.default), *bounds])


def entry(name: str, default: Any, means: str, may_be: str = "") -> str:
    """A field or flag of --help, folded."""
    text = f"{means} ({may_be})" if may_be else means
    indent = " " * 6
    body = textwrap.fill(text, 88, initial_indent=indent, subsequent_indent=indent)
    return f"  {name} = {shown(default)}\n{body}"


def field_list() -> str:
    """All fields with defaults, choices or bounds and meaning, for --help."""

    def entries(prefix: str, fields: Iterable[tuple[str, Field]]) -> list[str]:
        return [
            entry(prefix + name, field.default, field.means, allowed(field))
            for name, field in fields
        ]

    lines = ["Fields of the configuration:", *entries("--config.", FIELDS.items())]
    lines += ["", "Fields of each phase:"]
    return "\n".join(lines + entries("--config.phase.<name>.", PHASE.items()))


def markdown() -> str:
    """docs/configuration.md."""
    blocks = [_HEAD]
    for section, fields in itertools.groupby(FIELDS.items(), _section):
        blocks.append(f"## {section}\n")
        blocks.append(_table(fields, with_place=True))
        if section == _PHASES_TITLE:
            blocks.append(_PHASES)
            blocks.append(_table(PHASE.items(), with_place=False))
    return "\n".join(blocks)


def _section(named: tuple[str, Field]) -> str:
    section, dot, _ = named[0].partition(".")
    if dot:
        return section
    return {"terms": "Losses", "phases": _PHASES_TITLE}.get(section, "The run")


def _table(fields: Iterable[tuple[str, Field]], with_place: bool) -> str:
    heads = ["field", "default", "allowed", "meaning"] + ["counts"] * with_place
    rows = [heads, ["---"] * len(heads)]
    for name, field in fields:
        row = [f"`{name}`", f"`{shown(field.default)}`", allowed(field), field.means]
        rows.append(row + [_place(field)] * with_place)
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _place(field: Field) -> str:
    if not field.hashed:
        return "-"
    return "run, base" if field.base else "run"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(markdown(), end="")
