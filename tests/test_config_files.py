"""What configuration files are written with: arguments, and the methods beside."""

import pytest

from bsce_jax.config.files import method_module, parse_arguments
from bsce_jax.errors import UserError

ALLOWED = {"prior": "none", "steps": 5, "alpha": 1.0, "epsilon": None}


@pytest.mark.parametrize("argument", [None, "", ","])
def test_no_arguments_are_the_defaults(argument):
    assert parse_arguments(argument, ALLOWED) == ALLOWED


def test_arguments_take_the_type_of_their_default():
    found = parse_arguments("steps=10,alpha=2,prior=a=b", ALLOWED)
    assert found == {"prior": "a=b", "steps": 10, "alpha": 2.0, "epsilon": None}
    assert type(found["alpha"]) is float and ALLOWED["steps"] == 5
    epsilon = parse_arguments("epsilon=0", ALLOWED)["epsilon"]
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
    ],
)
def test_wrong_arguments(argument, message):
    with pytest.raises(UserError) as caught:
        parse_arguments(f"alpha=1,{argument}", ALLOWED)
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
        assert str(caught.value) == f"method={name!r}: expected one of another, mine"
