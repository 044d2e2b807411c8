"""What configuration files are written with: arguments, and the methods beside."""

import pytest

from bsce_jax.config.files import load, method_module, parse_arguments
from bsce_jax.errors import UserError

ALLOWED = {"prior": "none", "steps": 5, "alpha": 1.0, "epsilon": None}


@pytest.mark.parametrize("argument", [None, "", ","])
def test_no_arguments_are_the_defaults(argument):
    assert parse_arguments(argument, ALLOWED) == ALLOWED


def test_arguments_take_the_type_of_their_default():
    found = parse_arguments("steps=10,alpha=2,prior=weighted", ALLOWED)
    assert found == {"prior": "weighted", "steps": 10, "alpha": 2.0, "epsilon": None}
    assert type(found["alpha"]) is float and ALLOWED["steps"] == 5
    assert parse_arguments("prior=a=b", ALLOWED)["prior"] == "a=b"
    epsilon = parse_arguments("epsilon=0,prior=relaxed", ALLOWED)["epsilon"]
    assert epsilon == 0 and type(epsilon) is float


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "step=1",
            "'step=1': expected name=value with name one of prior, steps, alpha, "
            "epsilon",
        ),
        (
            "prior",
            "'prior': expected name=value with name one of prior, steps, alpha, "
            "epsilon",
        ),
        ("steps=1.5", "'steps=1.5': steps is int"),
        ("alpha=x", "'alpha=x': alpha is float"),
        ("epsilon=x", "'epsilon=x': epsilon is float"),
        ("steps=2,steps=2", "'steps=2': expected each name once"),
        (
            "epsilon=1,prior=balanced",
            "'epsilon=1': expected prior=relaxed, which alone reads epsilon, not "
            "prior=balanced",
        ),
        (
            "alpha=2",
            "'alpha=2': expected prior=weighted, which alone reads alpha, not "
            "prior=none",
        ),
    ],
)
def test_wrong_arguments(argument, message):
    with pytest.raises(UserError) as caught:
        parse_arguments(argument, ALLOWED)
    assert str(caught.value) == f"config argument {message}"


def test_a_method_is_a_file_beside_the_configuration(tmp_path):
    (tmp_path / "methods").mkdir()
    for name in ("mine", "another"):
        (tmp_path / "methods" / f"{name}.py").write_text(f"NAME = {name!r}")
    file = str(tmp_path / "configuration.py")
    assert method_module(file, "mine").NAME == "mine"
    for name in ("yours", "../methods/mine", "", "mine.py"):
        with pytest.raises(UserError) as caught:
            method_module(file, name)
        message = str(caught.value)
        assert message.startswith(f"config.method={name!r}: expected one of another, b")
        assert ", mine, " in message


def test_a_configuration_elsewhere_finds_the_methods_of_configs(tmp_path):
    found = method_module(str(tmp_path / "mine.py"), "lucir")
    assert callable(found.configure)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no such file"),
        ("# A title\n\nIt's text.", "fails: SyntaxError: .*line 3"),
        ("x = 1", "expected a function get_config in it"),
        ("def get_config():\n    return {}", "get_config gives dict, not a ConfigDict"),
        ("import nothing_there", "fails: ModuleNotFoundError: .*, line 1"),
        ("def get_config():\n    return 1 / 0", "fails: ZeroDivisionError: .*, line 2"),
    ],
)
def test_a_file_that_gives_no_configuration_is_one_line(tmp_path, text, message):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load(str(file))
    assert str(caught.value).startswith(f"--config={file}") and "\n" not in str(
        caught.value
    )
