"""The configuration: one line for a mistake, every field checked, what is hashed."""

import copy
import functools
import hashlib
import json
import math
import operator
from typing import Any

import pytest
from ml_collections import ConfigDict

from bsce_jax.config import terms
from bsce_jax.config.fields import FIELDS, PHASE, Field, default_config, find
from bsce_jax.config.hashes import config_hash, digest, flatten
from bsce_jax.config.resolve import resolve, validate
from bsce_jax.errors import UserError

# Every field with a value, those of a phase as they are in one of them.
ALL = FIELDS | {f"phase.incremental.{name}": field for name, field in PHASE.items()}
VALUES = {name: f for name, f in ALL.items() if not isinstance(f.default, dict)}
MISSING = object()


def names(condition: Any) -> list[str]:
    return [name for name, field in VALUES.items() if condition(field)]


def example() -> ConfigDict:
    """The defaults with the terms of IL-Baseline."""
    config = default_config()
    config.terms = ConfigDict(
        {
            "softmax_ce": {"weight": "1-rho"},
            "kd": {"weight": "rho", "temperature": 2.0},
        }
    )
    return config


def changed(name: str, value: Any) -> ConfigDict:
    """The example with one field, known or not, changed past ConfigDict's own checks.

    MISSING takes the field away.
    """
    values = example().to_dict()
    *sections, last = name.split(".")
    section = functools.reduce(operator.getitem, sections, values)
    if value is MISSING:
        del section[last]
    else:
        section[last] = value
    return ConfigDict(values)


def refusal(config: ConfigDict) -> str:
    """The message with which a configuration is refused: one line."""
    with pytest.raises(UserError) as caught:
        resolve(config)
    (message,) = caught.value.args
    assert message.startswith("config.") and "\n" not in message
    return message


def test_the_example_is_allowed():
    validate(example())


@pytest.mark.parametrize("name", names(lambda field: field.choices))
def test_choices(name):
    message = refusal(changed(name, "other\nthing"))
    allowed = ", ".join(choice or "''" for choice in VALUES[name].choices)
    assert message == f"config.{name}='other\\nthing': expected one of {allowed}"


def is_number(field: Field) -> bool:
    return field.default is None or type(field.default) in (int, float)


@pytest.mark.parametrize("name", names(is_number))
def test_bounds(name):
    field = VALUES[name]
    assert (field.least, field.most) != (None, None), "a number without a bound"
    for bound, sign, word in (
        (field.least, -1, "at least"),
        (field.most, 1, "at most"),
    ):
        if bound is not None:
            whole = type(field.default) is int
            beyond = bound + sign * (1 if whole else max(1e-13, 1e-9 * abs(bound)))
            message = refusal(changed(name, beyond))
            assert message == f"config.{name}={beyond!r}: expected {word} {bound}"


@pytest.mark.parametrize("name", ALL)
def test_declarations(name):
    """A default is allowed, a meaning is a sentence, what is base is hashed."""
    field = ALL[name]
    assert field.means[-1] == "." and "  " not in field.means
    assert not field.choices or field.default in field.choices
    assert not (field.base and not field.hashed)
    assert find(name) is field and find(f"{name}.more") in (field, None)


def test_the_default_configuration_has_every_field_and_no_other():
    found = {}

    def visit(section, prefix):
        for name, value in section.items():
            if isinstance(value, dict) and value:
                visit(value, f"{prefix}{name}.")
            else:
                found[prefix + name] = value

    visit(default_config().to_dict(), "")
    both = [n.replace("incremental", "base") for n in ALL if n.startswith("phase.")]
    assert found.keys() == {*ALL, *both}
    own = ("epochs", "milestones", "teacher", "steps")
    for name, value in found.items():
        if not (name.startswith("phase.") and name.endswith(own)):
            assert value == find(name).default, name


WRONG: dict[type, list[Any]] = {
    bool: [0, 1.0, "true", None, (1,), {}],
    int: [True, 1.0, "1", None, (1,), {}],
    float: [True, "1.0", None, (1.0,), {"value": 1.0}],
    str: [0, 1.0, False, None, ("a",), {}],
    tuple: ["1", 1.0, None, ("1",), (True,), (None,), {}],
    type(None): [True, "1.0", (1.0,), {"value": 1.0}],
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_of_a_wrong_type_is_refused(name):
    default = VALUES[name].default
    texts = isinstance(default, tuple) and default and isinstance(default[0], str)
    for value in [("base", 1), (1,)] if texts else WRONG[type(default)]:
        message = refusal(changed(name, value))
        assert message.startswith(f"config.{name}={value!r}: expected "), message
        assert "'ConfigDict'" not in message


@pytest.mark.parametrize(
    "name", names(lambda f: f.default is None or type(f.default) is float)
)
def test_integers_pass_for_floats_and_nothing_infinite_does(name):
    validate(changed(name, math.ceil(VALUES[name].least or 0)))
    for value in (math.nan, math.inf, -math.inf):
        assert refusal(changed(name, value)).startswith(f"config.{name}={value!r}: ")


@pytest.mark.parametrize("name", names(lambda f: type(f.default) is tuple))
def test_nothing_infinite_passes_in_a_tuple(name):
    for value in (math.nan, math.inf):
        many = (0.5, 0.5, value)
        assert refusal(changed(name, many)).startswith(f"config.{name}={many!r}: ")


@pytest.mark.parametrize("name", [*ALL, "data", "meta", "phase"])
def test_a_missing_field_is_named(name):
    assert refusal(changed(name, MISSING)) == f"config.{name} is missing"


@pytest.mark.parametrize(
    "section", ["", "data.", "optim.", "meta.", "phase.base.", "phase.base.rate."]
)
def test_an_unknown_field_is_named_with_the_known_ones(section):
    message = refusal(changed(f"{section}epoch", 3))
    assert message.startswith(f"config.{section}epoch is unknown; known: ")
    known = message.partition("known: ")[2].split(", ")
    expected = default_config()
    for part in filter(None, section.split(".")):
        expected = expected[part]
    assert known == sorted(expected)


@pytest.mark.parametrize(
    "name", ["data", "terms", "checkpoint", "phase", "phase.base", "options"]
)
def test_a_section_is_no_value(name):
    message = refusal(changed(name, 3))
    assert message.startswith(f"config.{name}=3: expected a section")


TERM_MISTAKES = [
    ("terms", {}, "config.terms={}: expected a section of loss terms, at least one"),
    ("terms.kd", 3, "config.terms.kd=3: expected a section with a weight"),
    ("terms.kd.weight", MISSING, "config.terms.kd={'temperature': 2.0}: expected"),
    ("terms.other", {"weight": 1.0}, "config.terms.other is unknown; losses: "),
    ("terms.kd.temprature", 2.0, "config.terms.kd.temprature is unknown; known: "),
    ("terms.kd.temperature", "2", "config.terms.kd.temperature='2': expected"),
    ("terms.kd.temperature", math.nan, "config.terms.kd.temperature=nan: expected"),
]


@pytest.mark.parametrize(("name", "value", "message"), TERM_MISTAKES)
def test_mistakes_in_terms(name, value, message):
    assert refusal(changed(name, value)).startswith(message)


@pytest.mark.parametrize(
    "weight",
    ["half", "", None, True, (1,), [1], {"a": 1}, math.nan, "nan", math.inf, "-inf"]
    + [-1, "-0.5", 10**40, 1e-50],
)
def test_a_weight_is_a_finite_number_or_a_name(weight):
    assert refusal(changed("terms.kd.weight", weight)) == (
        f"config.terms.kd.weight={weight!r}: expected a number of at "
        "least 0, or rho, 1-rho, sqrt(old/new), sqrt(seen/new), new/old, old/new"
    )


def test_weights_of_terms():
    def weight(given, old=50, seen=60, **more):
        return terms.weight("kd", {"weight": given, **more}, old, seen)

    assert weight("rho") == 50 / 60
    assert weight("1-rho") == 1 - 50 / 60
    assert weight("1-rho", 0, 50) == 1
    assert weight("sqrt(old/new)", factor=5.0) == 5 * math.sqrt(5)
    assert weight("sqrt(seen/new)", factor=3.0) == 3 * math.sqrt(6)
    assert weight("sqrt(seen/new)", 0, 50) == 1
    assert weight("new/old") == 10 / 50 and weight("old/new", factor=2.0) == 10
    assert weight("new/old", 0, 50) == weight("old/new", 0, 50) == 1
    for given in (2, 2.0, "2", "2.0", "2e0"):
        found = weight(given)
        assert found == 2.0 and type(found) is float
        assert weight(given, factor="3") == 6.0


@pytest.mark.parametrize("factor", ["half", None, True, math.nan, "inf", -1.0])
def test_a_factor_is_a_finite_number(factor):
    assert refusal(changed("terms.kd.factor", factor)) == (
        f"config.terms.kd.factor={factor!r}: expected a number of at least 0"
    )


def test_a_prior_replaces_a_methods_own_classification_loss():
    config = example()
    config.terms = ConfigDict(
        {
            "nca": {"weight": 2.0, "factor": 0.5, "margin": 0.6},
            "pod_flat": {"weight": "sqrt(seen/new)"},
        }
    )
    config.model.head = "cosine"
    assert set(resolve(config).terms) == {"nca", "pod_flat"}
    for name, value in (("prior", "balanced"), ("classification", "softmax_ce")):
        other = config.copy_and_resolve_references()
        other[name] = value
        found = resolve(other).terms.to_dict()
        assert found == {
            "softmax_ce": {"weight": 2.0, "factor": 0.5},
            "pod_flat": {"weight": "sqrt(seen/new)"},
        }


def test_a_classification_loss_may_be_chosen_without_a_prior():
    config = example()
    config.classification = "separated_softmax_ce"
    config.terms.softmax_ce.rescale = True
    found = resolve(config).terms.to_dict()
    assert found["separated_softmax_ce"] == {"weight": "1-rho", "rescale": True}
    assert set(found) == {"separated_softmax_ce", "kd"}
    config.prior = "balanced"
    assert refusal(config).startswith("config.classification='separated_softmax_ce'")


TOGETHER = [
    ({"data.std": (0.5, 0.5)}, "data.std"),
    ({"data.loading": "streaming"}, "data.image_size"),
    ({"data.image_size": 32, "data.resize": 31}, "data.resize"),
    ({"data.crop_area": (0.0, 1.0)}, "data.crop_area"),
    ({"data.crop_area": (0.5, 0.4)}, "data.crop_area"),
    ({"data.crop_area": (0.5,)}, "data.crop_area"),
    ({"data.std": (0.5, 0.0, 0.5)}, "data.std"),
    ({"meta.minimum": 11.0}, "meta.minimum"),
    ({"method": "mine"}, "method"),
    ({"terms": {"nca": {"weight": 1.0}}}, "model.head"),
    ({"method": "lucir"}, "model.head"),
    ({"method": "podnet", "model.head": "cosine"}, "model.head"),
]


@pytest.mark.parametrize(("values", "named"), TOGETHER)
def test_fields_that_do_not_go_together(values, named):
    config = example().unlock()
    for name, value in values.items():
        config.update_from_flattened_dict({name: value})
        if name == "terms":
            config.terms = ConfigDict(value)
    shown = values.get(named, flatten(config)[named])
    assert refusal(config).startswith(f"config.{named}={shown!r}: expected ")


def test_what_goes_together_is_allowed():
    for values in (
        {"prior": "none", "memory.kind": "none"},
        {"data.mean": (0.5,), "data.std": (1,)},
    ):
        config = example()
        config.update_from_flattened_dict(values)
        validate(config)


def test_resolve_fills_in_and_leaves_its_argument_alone():
    given = example()
    before = copy.deepcopy(given.to_dict())
    config = resolve(given)
    assert given.to_dict() == before
    assert config.name == "cifar100-il_baseline-none-5steps"
    assert resolve(config) == config and config_hash(resolve(config)) == config_hash(
        config
    )
    given.name = "mine"
    assert resolve(given).name == "mine"


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"prior": "balanced"}, "balanced"),
        ({"prior": "weighted", "alpha": 0.25}, "weighted0.25"),
        ({"prior": "relaxed"}, "relaxed0.2pc"),
        ({"prior": "relaxed", "epsilon": 1.0}, "relaxed1"),
        (
            {"prior": "relaxed", "epsilon": 0.2, "epsilon_unit": "percent"},
            "relaxed0.2pc",
        ),
    ],
)
def test_default_names(values, name):
    config = example()
    config.update_from_flattened_dict(values)
    assert resolve(config).name == f"cifar100-il_baseline-{name}-5steps"


def other(value: Any) -> Any:
    """Another value of the same type."""
    if value is None:
        return 1.0
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return (*value, 1)
    return value + ("x" if isinstance(value, str) else type(value)(1))


@pytest.mark.parametrize("name", VALUES)
def test_the_hash_covers_what_can_change_results_and_nothing_else(name):
    found = config_hash(changed(name, other(flatten(example())[name])))
    assert (found != config_hash(example())) == VALUES[name].hashed


def test_some_fields_whose_place_in_the_hash_is_known():
    assert not FIELDS["name"].hashed and not FIELDS["data.corrupt"].hashed
    assert not any(f.hashed for n, f in FIELDS.items() if n.startswith("checkpoint."))
    assert all(field.hashed for field in PHASE.values())
    for name in ("seed", "prior", "data.max_per_class", "model.dtype", "deterministic"):
        assert FIELDS[name].hashed


def test_the_hash_covers_the_terms():
    hashes = {
        config_hash(config)
        for config in (
            example(),
            changed("terms.kd.weight", 1.0),
            changed("terms.kd.temperature", 3.0),
            changed("terms.kd", MISSING),
        )
    }
    assert len(hashes) == 4


def test_the_hash_does_not_depend_on_the_order_of_fields():
    def reverse(values):
        if not isinstance(values, dict):
            return values
        return {name: reverse(values[name]) for name in reversed(values)}

    reversed_config = ConfigDict(reverse(example().to_dict()))
    assert list(reversed_config.terms) == ["kd", "softmax_ce"]
    assert config_hash(reversed_config) == config_hash(example())


def test_digest_is_sha256_of_sorted_json():
    expected = hashlib.sha256(b'{"a":[1,2.5],"b":{"c":"x"}}').hexdigest()
    assert digest({"b": {"c": "x"}, "a": [1, 2.5]}) == expected


def test_flatten_is_json_with_dotted_names():
    flat = flatten(example())
    assert flat["terms.kd.temperature"] == 2.0
    assert flat["phase.base.milestones"] == [100, 150, 200]
    assert flat["phase.base.rate.head"] == 1.0 and flat["epsilon"] is None
    assert json.loads(json.dumps(flat)) == flat
    assert not any(isinstance(value, dict) for value in flat.values())
