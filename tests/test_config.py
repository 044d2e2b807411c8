"""The configuration: every mistake is one line, every field has a check and a place
in the hash."""

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
from bsce_jax.config.fields import default_config
from bsce_jax.config.files import method_module, parse_arguments
from bsce_jax.config.hashes import NOT_HASHED, config_hash, digest, flatten
from bsce_jax.config.resolve import BOUNDS, CHOICES, resolve, validate
from bsce_jax.errors import UserError

FIELDS = flatten(default_config())
NOT_IN_THE_HASH = {
    "name",
    "print_plan",
    "log_seconds",
    "compile_cache",
    "init_from",
    "checkpoint.minutes",
    "checkpoint.keep",
    "data.data_dir",
    "data.workers",
    "data.timeout",
    "data.corrupt",
}
MISSING = object()


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


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    message = refusal(changed(name, "other\nthing"))
    assert message == (
        f"config.{name}='other\\nthing': expected one of {', '.join(CHOICES[name])}"
    )


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds(name):
    low, high = BOUNDS[name]
    assert (low, high) != (None, None)
    kind = type(FIELDS[name])
    for bound, sign, word in ((low, -1, "at least"), (high, 1, "at most")):
        if bound is not None:
            beyond = kind(bound + sign) if kind is int else float(bound) + sign * 1e-13
            message = refusal(changed(name, beyond))
            assert message == f"config.{name}={beyond!r}: expected {word} {bound}"


def test_every_number_and_named_choice_is_checked():
    numbers = {n for n, v in FIELDS.items() if type(v) in (int, float)}
    assert numbers == BOUNDS.keys()
    free = "name method init_from scenario.class_order model.name".split()
    free += ["data.name", "data.data_dir", "data.train_split", "data.test_split"]
    texts = {n for n, v in FIELDS.items() if isinstance(v, str)}
    assert texts == CHOICES.keys() | set(free)


WRONG: dict[type, list[Any]] = {
    bool: [0, 1.0, "true", None, (1,), {}],
    int: [True, 1.0, "1", None, (1,), {}],
    float: [True, "1.0", None, (1.0,), {"value": 1.0}],
    str: [0, 1.0, False, None, ("a",), {}],
    list: ["1", 1.0, None, ("1",), (True,), (None,), {}],
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_a_wrong_type_is_refused(name):
    for value in WRONG[type(FIELDS[name])]:
        message = refusal(changed(name, value))
        assert message.startswith(f"config.{name}={value!r}: expected "), message
        assert "'ConfigDict'" not in message


@pytest.mark.parametrize("name", [n for n, v in FIELDS.items() if type(v) is float])
def test_integers_pass_for_floats_and_nothing_infinite_does(name):
    validate(changed(name, math.ceil(BOUNDS[name][0] or 0)))
    for value in (math.nan, math.inf, -math.inf):
        assert refusal(changed(name, value)).startswith(f"config.{name}={value!r}: ")


@pytest.mark.parametrize("name", [n for n, v in FIELDS.items() if type(v) is list])
def test_nothing_infinite_passes_in_a_tuple(name):
    for value in (math.nan, math.inf):
        many = (0.5, 0.5, value)
        assert refusal(changed(name, many)).startswith(f"config.{name}={many!r}: ")


@pytest.mark.parametrize("name", [*FIELDS, "data", "meta", "terms"])
def test_a_missing_field_is_named(name):
    assert refusal(changed(name, MISSING)) == f"config.{name} is missing"


@pytest.mark.parametrize("section", ["", "data.", "optim.", "meta."])
def test_an_unknown_field_is_named_with_the_known_ones(section):
    message = refusal(changed(f"{section}epoch", 3))
    assert message.startswith(f"config.{section}epoch is unknown; known: ")
    known = message.partition("known: ")[2].split(", ")
    expected = default_config()
    for part in filter(None, section.split(".")):
        expected = expected[part]
    assert known == sorted(expected)


@pytest.mark.parametrize("name", ["data", "terms", "checkpoint"])
def test_a_section_is_no_value(name):
    message = refusal(changed(name, 3))
    assert message.startswith(f"config.{name}=3: expected a section")


TERM_MISTAKES = [
    ("terms", {}, "config.terms={}: expected a section of loss terms, at least one"),
    ("terms.kd", 3, "config.terms.kd=3: expected a section with a weight"),
    ("terms.kd.weight", MISSING, "config.terms.kd={'temperature': 2.0}: expected"),
    ("terms.other", {"weight": 1.0}, "config.terms.other is unknown; losses: kd, "),
    ("terms.kd.temprature", 2.0, "config.terms.kd.temprature is unknown; known: "),
    ("terms.kd.temperature", "2", "config.terms.kd.temperature='2': expected"),
    ("terms.kd.temperature", math.nan, "config.terms.kd.temperature=nan: expected"),
]


@pytest.mark.parametrize(("name", "value", "message"), TERM_MISTAKES)
def test_mistakes_in_terms(name, value, message):
    assert refusal(changed(name, value)).startswith(message)


@pytest.mark.parametrize(
    "weight",
    ["half", "", None, True, (1,), [1], {"a": 1}, math.nan, "nan", math.inf, "-inf"],
)
def test_a_weight_is_a_finite_number_or_a_name(weight):
    assert refusal(changed("terms.kd.weight", weight)) == (
        f"config.terms.kd.weight={weight!r}: expected a number or "
        "rho, 1-rho, sqrt(old/new), sqrt(seen/new)"
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
    for given in (2, 2.0, "2", "2.0", "2e0"):
        found = weight(given)
        assert found == 2.0 and type(found) is float
        assert weight(given, factor="3") == 6.0


@pytest.mark.parametrize("factor", ["half", None, True, math.nan, "inf"])
def test_a_factor_is_a_finite_number(factor):
    assert refusal(changed("terms.kd.factor", factor)) == (
        f"config.terms.kd.factor={factor!r}: expected a number"
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


@pytest.mark.parametrize(
    ("when", "prior", "epochs"),
    [
        ("auto", "none", 20),
        ("auto", "balanced", 0),
        ("auto", "meta", 0),
        ("always", "none", 20),
        ("always", "balanced", 20),
        ("never", "none", 0),
    ],
)
def test_balanced_priors_switch_the_fine_tuning_off(when, prior, epochs):
    config = example()
    config.prior, config.finetune.when, config.finetune.epochs = prior, when, 20
    assert resolve(config).finetune.epochs == epochs


TOGETHER = [
    ({"data.std": (0.5, 0.5)}, "data.std"),
    ({"data.loading": "streaming"}, "data.image_size"),
    ({"data.image_size": 32, "data.resize": 31}, "data.resize"),
    ({"data.crop_area": (0.0, 1.0)}, "data.crop_area"),
    ({"data.crop_area": (0.5, 0.4)}, "data.crop_area"),
    ({"data.crop_area": (0.5,)}, "data.crop_area"),
    ({"data.std": (0.5, 0.0, 0.5)}, "data.std"),
    ({"meta.minimum": 11.0}, "meta.minimum"),
    ({"optim.milestones": (30, 20)}, "optim.milestones"),
    ({"optim.milestones": (0, 20)}, "optim.milestones"),
    ({"optim.base_milestones": (30, 20)}, "optim.base_milestones"),
    ({"prior": "meta", "memory.kind": "none"}, "prior"),
    ({"prior": "meta", "memory.per_class": 1}, "memory.per_class"),
    ({"prior": "relaxed"}, "epsilon"),
    ({"prior": "balanced", "terms": {"kd": {"weight": 1.0}}}, "prior"),
    ({"finetune.milestones": (10, 5)}, "finetune.milestones"),
    ({"finetune.when": "always", "prior": "meta"}, "finetune.when"),
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
        {"prior": "meta", "memory.kind": "fixed", "memory.per_class": 0},
        {"prior": "meta", "memory.per_class": 2},
        {"prior": "none", "memory.kind": "none"},
        {"prior": "relaxed", "memory.kind": "none"},
        {"prior": "relaxed", "epsilon": 1e-9},
        {"optim.milestones": (), "data.mean": (0.5,), "data.std": (1,)},
        {"optim.milestones": (5, 5, 1000)},  # as MultiStepLR takes them
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
    assert config.optim.base_epochs == config.optim.epochs == 250
    assert config.optim.base_milestones == (100, 150, 200)
    assert config.optim.base_learning_rate == 0.1
    assert resolve(config) == config and config_hash(resolve(config)) == config_hash(
        config
    )
    given.name = "mine"
    assert resolve(given).name == "mine"


def test_resolve_keeps_a_base_step_of_its_own():
    given = example()
    given.optim.base_epochs, given.optim.base_learning_rate = 30, 0.2
    found = resolve(given).optim
    assert (found.base_epochs, found.base_learning_rate) == (30, 0.2)
    assert found.base_milestones == () and found.epochs == 250


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"prior": "balanced"}, "balanced"),
        ({"prior": "weighted", "alpha": 0.25}, "weighted0.25"),
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
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return (*value, 1)
    return value + ("x" if isinstance(value, str) else type(value)(1))


@pytest.mark.parametrize("name", FIELDS)
def test_the_hash_covers_what_can_change_results_and_nothing_else(name):
    found = config_hash(changed(name, other(FIELDS[name])))
    assert (found == config_hash(example())) == (name in NOT_IN_THE_HASH)


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


def test_not_hashed_names_exist():
    fields = {*FIELDS, *(name.partition(".")[0] for name in FIELDS)}
    assert set(NOT_HASHED) <= fields


def test_digest_is_sha256_of_sorted_json():
    expected = hashlib.sha256(b'{"a":[1,2.5],"b":{"c":"x"}}').hexdigest()
    assert digest({"b": {"c": "x"}, "a": [1, 2.5]}) == expected


def test_flatten_is_json_with_dotted_names():
    flat = flatten(example())
    assert flat["terms.kd.temperature"] == 2.0
    assert flat["optim.milestones"] == [100, 150, 200]
    assert json.loads(json.dumps(flat)) == flat
    assert not any(isinstance(value, dict) for value in flat.values())


ALLOWED = {"prior": "none", "steps": 5, "alpha": 1.0}


@pytest.mark.parametrize("argument", [None, "", ","])
def test_no_arguments_are_the_defaults(argument):
    assert parse_arguments(argument, ALLOWED) == ALLOWED


def test_arguments_take_the_type_of_their_default():
    found = parse_arguments("steps=10,alpha=2,prior=a=b", ALLOWED)
    assert found == {"prior": "a=b", "steps": 10, "alpha": 2.0}
    assert type(found["alpha"]) is float and ALLOWED["steps"] == 5


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "step=1",
            "'step=1': expected name=value with name one of prior, steps, alpha",
        ),
        ("prior", "'prior': expected name=value with name one of prior, steps, alpha"),
        ("steps=1.5", "'steps=1.5': steps is int"),
        ("alpha=x", "'alpha=x': alpha is float"),
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
