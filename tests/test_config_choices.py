"""What `--config FILE:NAME=?` lists, and that the README's tables say the same."""

import pathlib

import pytest

from bsce_jax import methods
from bsce_jax.config import fields, flags
from bsce_jax.errors import UserError
from bsce_jax.models import heads

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "digits.py"


def asked(name: str) -> list[str]:
    with pytest.raises(flags.HelpRequested) as caught:
        flags.parse(["main", f"--config={CONFIG}:seed=1,{name}=?"])
    return str(caught.value).splitlines()


def table(header: str) -> list[list[str]]:
    """The rows of a table of the README."""
    lines = (ROOT / "README.md").read_text().splitlines()
    start = lines.index(header) + 2
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[c.strip() for c in line.split("|")[1:-1]] for line in lines[start:end]]


def test_the_readme_and_the_list_have_every_method():
    rows = {row[0].strip("`"): row[1:] for row in table(METHODS)}
    described = {n for n in methods.names() if hasattr(methods.module(n), "ABOUT")}
    assert rows.keys() == described  # one of somebody's own needs no row
    lines = asked("method")
    for name, (head, losses, besides, source) in rows.items():
        about = methods.about(name)
        assert (head, losses, besides, source) == (
            about.head,
            about.losses,
            about.besides,
            about.source,
        )
        assert any(line.startswith(f"  {name} ") for line in lines)
    listed = sum(line.startswith("  ") and line[2] != " " for line in lines)
    assert listed == len(methods.names())


METHODS = "| method | head | losses | besides | source |"
PRIORS = "| `--config.prior` | loss | old class | new class |"


def test_the_readme_and_the_list_have_every_prior():
    choices = fields.FIELDS["prior"].choices
    assert {row[0].strip("`"): row[1] for row in table(PRIORS)} == choices
    lines = [line.split(maxsplit=1) for line in asked("prior") if line[0] == " "]
    assert {name: text for name, text in lines} == choices


@pytest.mark.parametrize("name", ["method", "prior", "head", "steps", "alpha", "short"])
def test_every_list_fits_a_terminal_and_says_what_it_is_of(name):
    lines = asked(name)
    assert max(map(len, lines)) < 80
    assert lines[0].startswith((f"{name}: ", "--config."))


def test_a_field_that_is_no_argument_says_how_it_is_set():
    first, *lines = asked("head")
    assert first.startswith("--config.model.head: ")
    for name in heads.NAMES:
        assert any(line.startswith(f"  {name} ") for line in lines)


def test_what_does_not_exist_is_refused():
    with pytest.raises(UserError, match="'nothing=.': expected one of method, prior"):
        flags.parse(["main", f"--config={CONFIG}:nothing=?"])
