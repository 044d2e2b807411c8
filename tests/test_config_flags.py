"""The command line: overrides of every field, help, and the page of all fields."""

import pathlib
import subprocess
import sys

import pytest

from bsce_jax.config import flags, page
from bsce_jax.config.fields import FIELDS, PHASE, Field
from bsce_jax.config.flags import HelpRequested, parse
from bsce_jax.config.hashes import flatten
from bsce_jax.config.resolve import resolve
from bsce_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
DIGITS = f"--config={ROOT / 'configs' / 'digits.py'}"
# By the type of the default: what is typed, and what it is then.
TYPED = {
    bool: {"true": True, "false": False},
    int: {"3": 3},
    float: {"0.5": 0.5, "1": 1.0},
    tuple: {"(1,2)": [1, 2], "()": [], "(0.5, 1)": [0.5, 1]},
    str: {"abc": "abc"},
    type(None): {"0.5": 0.5, "0": 0.0},
}


def given(*arguments: str) -> dict:
    return flatten(parse(["main", *arguments]).config)


def declaration(name: str) -> Field:
    return FIELDS.get(name) or PHASE[name.split(".", 2)[2]]


ALL = [*FIELDS, *(f"phase.{p}.{n}" for p in ("base", "finetune") for n in PHASE)]


FREE = [n for n in ALL if not isinstance(declaration(n).default, dict)]
PRIORS = {"alpha": "weighted", "epsilon": "relaxed"}  # that alone read a field


@pytest.mark.parametrize("name", [n for n in FREE if n != "method"])
def test_every_field_may_be_overridden(name):
    declared = declaration(name)
    texts = TYPED[type(declared.default)]
    if name == "phases":
        texts = {"('base','x')": ["base", "x"], "base": ["base"]}
    if declared.choices:
        texts = {choice: choice for choice in declared.choices}
    for text, value in texts.items():
        prior = [f"--config.prior={PRIORS[name]}"] if name in PRIORS else []
        found = given(DIGITS, *prior, f"--config.{name}={text}")[name]
        assert found == value and type(found) is type(value)


def test_overrides_of_a_term_and_of_several_fields():
    found = given(
        DIGITS,
        "--config.terms.kd.temperature=1",
        "--config.phase.incremental.epochs=3",
        "--config.phase.incremental.rate.head=10",
        "--config.phase.base.milestones=(1,2)",
        "--workdir=here",
    )
    assert found["terms.kd.temperature"] == 1.0
    assert found["phase.incremental.epochs"] == 3
    assert found["phase.incremental.rate.head"] == 10.0
    assert found["phase.base.milestones"] == [1, 2]


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [("squared", "True", True), ("factor", "0.5", 0.5), ("temperature", "3", 3.0)],
)
def test_an_option_that_the_file_leaves_at_its_default_may_be_given(
    option, text, value, tmp_path
):
    eeil = f"{DIGITS}:method=eeil"
    assert given(eeil).get("terms.taskwise_kd.factor") is None
    name = f"terms.taskwise_kd.{option}"
    found = given(eeil, f"--config.{name}={text}")[name]
    assert found == value and type(found) is type(value)
    path = tmp_path / "own.py"
    path.write_text(
        "from bsce_jax.config import default_config\n\n\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.terms.bogus = {'weight': 1.0}\n"
        "    return config\n"
    )
    own = parse(["main", f"--config={path}", "--config.terms.bogus.weight=2.0"])
    with pytest.raises(UserError, match="config.terms.bogus is unknown; losses: "):
        resolve(own.config)
    with pytest.raises(UserError, match="temperatur is an unknown config field"):
        parse(["main", eeil, "--config.terms.taskwise_kd.temperatur=2"])


def test_another_method_than_the_file_s_has_no_losses():
    assert given(DIGITS, "--config.method=il_baseline")["method"] == "il_baseline"
    with pytest.raises(UserError) as caught:
        parse(["main", f"{DIGITS}:prior=none", "--config.method=bic"])
    message = str(caught.value)
    assert message.startswith("config.method='bic': expected il_baseline, whose losses")
    assert message.endswith("configs/digits.py:method=NAME")


@pytest.mark.parametrize("name", PRIORS)
def test_a_field_that_the_prior_does_not_read_is_refused(name):
    with pytest.raises(UserError) as caught:
        parse(["main", f"{DIGITS}:prior=balanced", f"--config.{name}=0.5"])
    expected = f"config.{name}=0.5: expected prior={PRIORS[name]} with it, which alone"
    assert str(caught.value).startswith(expected)


def test_a_phase_may_be_left_out_only_with_its_section():
    config = parse(["main", DIGITS, "--config.phases=('base','incremental')"]).config
    with pytest.raises(UserError, match="config.phases=.*: expected each section of"):
        resolve(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.phase.base.epoch=3"], "unknown config field"),
        (["--config.phase.other.epochs=3"], "unknown config field"),
        (
            ["--config.phase.base.epochs=1e2"],
            "config.phase.base.epochs=1e2: expected int",
        ),
        (["--config.epsilon=x"], "config.epsilon=x: expected float"),
        (["--config.data.flip=maybe"], "config.data.flip=maybe: expected bool"),
        (["--wordkir=x"], "wordkir"),
        (["--process_id=x"], "--process_id=x: expected integer"),
        (["more"], "unexpected argument 'more': expected --config.field=x"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(UserError) as caught:
        parse(["main", DIGITS, *arguments])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_configuration_file_is_needed():
    with pytest.raises(UserError, match="--config is missing: try --config configs/"):
        parse(["main"])


def test_the_flags_have_their_defaults():
    values = parse(["main", DIGITS])
    for _, name, default, _ in flags.FLAGS:
        assert getattr(values, name) == default


@pytest.mark.parametrize("flag", ["-h", "--help", "--helpfull"])
def test_help_names_every_flag_and_field(flag):
    with pytest.raises(HelpRequested) as caught:
        parse(["main", DIGITS, "--config.nothing=1", flag])
    text = str(caught.value)
    assert text.startswith("usage: python -m bsce_jax.main --config FILE")
    assert max(map(len, text.splitlines())) <= 88
    words = " ".join(text.split())
    for _, name, _, meaning in flags.FLAGS:
        assert f"  --{name} = " in text and meaning in words
    for name, field in FIELDS.items():
        assert f"  --config.{name} = {page.shown(field.default)}\n" in text
        assert f"{field.means} ({page.allowed(field)})" in words
    for name, field in PHASE.items():
        assert f"  --config.phase.<name>.{name} = " in text
        assert f"{field.means} ({page.allowed(field)})" in words


def test_the_page_is_current():
    assert (ROOT / "docs" / "configuration.md").read_text() == page.markdown()


def test_the_page_is_printed():
    done = subprocess.run(
        [sys.executable, "-m", "bsce_jax.config.page"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stdout == page.markdown()


def test_the_page_has_a_row_for_every_field():
    rows = [line for line in page.markdown().splitlines() if line.startswith("| `")]
    found = [row.split("`")[1] for row in rows]
    at = list(FIELDS).index("phases") + 1
    assert found == [*list(FIELDS)[:at], *PHASE, *list(FIELDS)[at:]]
    for row, field in zip(
        rows[at + len(PHASE) :], list(FIELDS.values())[at:], strict=True
    ):
        place = "run, base" if field.base else "run" if field.hashed else "-"
        assert row.endswith(f"{field.means} | {place} |")
