"""Phases and a method's options in the configuration: sections, checks, hashes."""

import json
import types
from typing import Any

import pytest
from ml_collections import ConfigDict

from bsce_jax import methods
from bsce_jax.config import fields, hashes, terms
from bsce_jax.config.fields import FIELDS, PHASE, default_config, only, phase
from bsce_jax.config.files import COMMON_ARGUMENTS, apply_arguments
from bsce_jax.config.hashes import base_fields, config_hash, flatten
from bsce_jax.config.resolve import resolve
from bsce_jax.errors import UserError

OPTIONS = {"share": 0.5, "k": 10, "exact": False, "kind": "mean", "sizes": (1, 2)}


def example(**phases: ConfigDict) -> ConfigDict:
    """The defaults with the terms of IL-Baseline, and more phases after the others."""
    config = default_config()
    config.terms = ConfigDict(
        {
            "softmax_ce": {"weight": "1-rho", "rescale": True},
            "kd": {"weight": "rho", "factor": 4.0, "temperature": 2.0},
        }
    )
    config.phases = (*config.phases, *phases)
    for name, section in phases.items():
        config.phase[name] = section
    return config


def refusal(config: ConfigDict) -> str:
    with pytest.raises(UserError) as caught:
        resolve(config)
    (message,) = caught.value.args
    assert message.startswith("config.") and "\n" not in message
    return message


@pytest.fixture
def mine(monkeypatch) -> types.SimpleNamespace:
    """A method's module, in the place of IL-Baseline's."""
    module = types.SimpleNamespace(OPTIONS=OPTIONS, forward=lambda: None)
    monkeypatch.setattr(methods, "module", lambda name: module)
    return module


def test_a_phase_has_every_field_at_its_default_but_those_given():
    section = phase(epochs=3, milestones=(1, 2), rate={"head": 10}, terms={"kd": "rho"})
    config = ConfigDict({"phase": {"x": section}})
    flat = flatten(config)
    assert flat.pop("phase.x.terms.kd") == "rho"
    changes = {"epochs": 3, "milestones": [1, 2], "rate.head": 10.0}
    for name, field in PHASE.items():
        if not isinstance(field.default, dict):
            default = [] if field.default == () else field.default
            assert flat.pop(f"phase.x.{name}") == changes.get(name, default)
    assert not flat
    assert type(section.rate.head) is float
    assert phase().terms is not phase().terms and not phase().terms
    same = phase(
        epochs=3,
        milestones=(1, 2),
        rate=ConfigDict({"head": 10}),
        terms=ConfigDict({"kd": "rho"}),
    )
    assert same == section


def test_what_is_not_named_is_frozen():
    groups = {name for name in PHASE if name.startswith("rate.")}
    assert {f"rate.{name}" for name in only()} == groups
    assert only(own=2.0) == {**only(), "own": 2.0} and not any(only().values())
    assert phase(rate=only(head=1.0)).rate.to_dict() == only(head=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": 3}, "phase(epoch=...) is unknown; known: "),
        ({"rate": {"heads": 1.0}}, "phase(rate.heads=...) is unknown; known: "),
        ({"rate": 1.0}, "phase(rate=1.0): expected a dict"),
        (
            {"epochs": ConfigDict({"x": 1})},
            "phase(epochs={'x': 1}): expected a value",
        ),
        ({"terms": "kd"}, "phase(terms='kd'): expected a dict"),
        ({"epochs": 3.0}, "phase(epochs=3.0): expected a value of type int"),
        ({"decay": float("inf")}, "phase(decay=inf): expected finite numbers"),
        ({"rate": {"head": "1"}}, "phase(rate.head='1'): expected a value of "),
    ],
)
def test_mistakes_in_a_phase_of_a_configuration_file(changes, message):
    with pytest.raises(UserError) as caught:
        phase(**changes)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_the_default_phases_are_the_paper_s_on_cifar100():
    config = default_config()
    assert config.phases == ("base", "incremental")
    assert config.phase.base.steps == "base" and config.phase.base.teacher == "none"
    for section in config.phase.values():
        assert section.epochs == 250 and section.milestones == (100, 150, 200)


PHASES_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"phases": ("base",)}, "phases=('base',): expected each section of config.phase"),
    ({"phases": ()}, "phases=(): expected each section of config.phase once: base, in"),
    ({"phases": ("base", "incremental", "more")}, "phases=('base', 'incremental', 'mo"),
    ({"phases": ("base", "base", "incremental")}, "phases=('base', 'base', 'incremen"),
    (
        {"phases": ("incremental", "base")},
        "phases=('incremental', 'base'): expected first those of the base step: base",
    ),
    (
        {"phase.base.steps": "later"},
        "phases=('base', 'incremental'): expected a phase of the base step",
    ),
    ({"phase.base.epochs": 0}, "phase.base.epochs=0: expected at least 1 in a phase"),
    (
        {"phase.base.when_prior": "none", "prior": "balanced"},
        "phases=('base', 'incremental'): expected a phase of the base step",
    ),
    (
        {"phase.base.images": "exemplars"},
        "phase.base.images='exemplars': expected training in a phase of the base step",
    ),
    (
        {"phase.incremental.milestones": (30, 20)},
        "phase.incremental.milestones=(30, 20): expected epochs above 0 in ascending",
    ),
    ({"phase.base.milestones": (0, 20)}, "phase.base.milestones=(0, 20): expected ep"),
    (
        {"phase.incremental.terms": ConfigDict({"nca": 1.0})},
        "phase.incremental.terms.nca is unknown; known, from config.terms: kd, sof",
    ),
    (
        {"phase.incremental.terms": ConfigDict({"kd": "half"})},
        "phase.incremental.terms.kd='half': expected a number of at least 0, or rho",
    ),
    (
        {"phase.base.terms": ConfigDict({"kd": {"weight": 1.0}})},
        "phase.base.terms.kd={'weight': 1.0}: expected a number of at least 0, or rho",
    ),
    (
        {"phase.base.milestones": (10.5, 20)},
        "phase.base.milestones=(10.5, 20): expected epochs above 0 in ascending order, "
        "whole numbers",
    ),
    (
        {"phase.incremental.replay": 4, "phase.incremental.sampling": "class"},
        "phase.incremental.sampling='class': expected uniform with replay",
    ),
    (
        {
            "phase.incremental.beside": "companions",
            "phase.incremental.beside_size": 2,
            "phase.incremental.sampling": "memory",
        },
        "phase.incremental.sampling='memory': expected uniform with beside=companions",
    ),
    (
        {"phase.incremental.forward": "nothing"},
        "phase.incremental.forward='nothing': expected ",
    ),
]


@pytest.mark.parametrize(("values", "message"), PHASES_MISTAKES)
def test_mistakes_in_phases(values, message):
    config = example()
    for name, value in values.items():
        *parents, last = name.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        section[last] = value
    assert refusal(config).startswith(f"config.{message}")


def test_a_phase_is_named_as_a_program_may_be():
    config = example()
    config.phases = (*config.phases, "fine-tuning")
    config.phase["fine-tuning"] = phase()
    assert refusal(config) == (
        "config.phases=('base', 'incremental', 'fine-tuning'): expected names of "
        "letters, digits and _"
    )


def test_a_teacher_that_another_has_replaced_is_refused():
    config = example(copy=phase(epochs=1, teacher="now"), last=phase(epochs=1))
    assert refusal(config) == (
        "config.phase.last.teacher='before': expected now or none: the phase copy has "
        "taken its place"
    )
    config.phase.copy.epochs = 0
    resolve(config)  # a phase that does not exist replaces nothing
    config.phase.copy.epochs, config.phase.last.teacher = 1, "now"
    resolve(config)


@pytest.mark.parametrize("images", ["exemplars", "held_out"])
def test_a_phase_on_exemplars_needs_no_memory(images):
    config = example(last=phase(images=images, epochs=1))
    config.memory.kind = "none"
    assert resolve(config).phase.last.epochs == 1


def test_milestones_may_repeat_and_exceed_the_epochs():
    """As MultiStepLR takes them."""
    resolve(example(last=phase(epochs=2, milestones=(5, 5, 1000))))


@pytest.mark.parametrize("name", ["phase_one", "x", "finetune"])
def test_the_names_of_phases_have_no_meaning(name):
    config = example()
    config.phases = ("first", name)
    config.phase = ConfigDict(
        {"first": phase(steps="base", epochs=1), name: phase(epochs=2)}
    )
    assert resolve(config).phase[name].epochs == 2


@pytest.mark.parametrize(
    ("when_prior", "prior", "epochs"),
    [
        ("none", "none", 20),
        ("none", "balanced", 0),
        ("none", "meta", 0),
        ("any", "none", 20),
        ("any", "balanced", 20),
    ],
)
def test_a_prior_may_take_the_place_of_a_phase(when_prior, prior, epochs):
    config = example(last=phase(images="exemplars", when_prior=when_prior, epochs=20))
    config.prior = prior
    found = resolve(config)
    assert found.phase.last.epochs == epochs and resolve(found) == found
    assert found.phase.incremental.epochs == 250


@pytest.mark.parametrize("first", ["nca", "softmax_ce"])
def test_no_weight_is_lost_where_a_prior_replaces_a_loss(first):
    config = example()
    config.model.head = "cosine"
    both = {"nca": {"weight": 1.0}, "softmax_ce": {"weight": 0.5}}
    names = sorted(both, key=lambda name: name != first)
    config.terms = ConfigDict({name: both[name] for name in names})
    resolve(config)
    config.prior = "balanced"
    assert refusal(config) == (
        "config.terms.nca={'weight': 1.0}: expected no other classification loss "
        "beside softmax_ce, which replaces it"
    )


def test_a_prior_replaces_the_classification_loss_of_every_phase():
    config = example(last=phase(epochs=1, terms={"nca": 0.5, "pod_flat": "rho"}))
    config.model.head = "cosine"
    config.terms = ConfigDict(
        {"nca": {"weight": 2.0, "margin": 0.6}, "pod_flat": {"weight": 1.0}}
    )
    assert resolve(config).phase.last.terms.to_dict() == {"nca": 0.5, "pod_flat": "rho"}
    config.prior = "balanced"
    found = resolve(config)
    assert found.phase.last.terms.to_dict() == {"softmax_ce": 0.5, "pod_flat": "rho"}
    assert resolve(found) == found


def test_a_phase_may_name_the_loss_that_takes_another_s_place():
    config = example(last=phase(epochs=1, terms={"softmax_ce": 0.5}))
    config.model.head = "cosine"
    config.terms = ConfigDict({"nca": {"weight": 2.0}})
    assert refusal(config).startswith("config.phase.last.terms.softmax_ce is unknown; ")
    config.prior = "balanced"
    found = resolve(config)
    assert found.phase.last.terms.to_dict() == {"softmax_ce": 0.5}
    assert resolve(found) == found
    config.phase.last.terms.nca = 1.0
    assert refusal(config) == (
        "config.phase.last.terms.nca=1.0: expected no weight beside that of "
        "softmax_ce, which takes its place"
    )


def test_the_terms_of_a_phase_have_its_weights_and_the_run_s_options():
    config = example()
    assert terms.of_phase(config.terms, ConfigDict()) == config.terms
    found = terms.of_phase(config.terms, ConfigDict({"kd": "1-rho"}))
    assert found.to_dict() == {
        "kd": {"weight": "1-rho", "factor": 4.0, "temperature": 2.0}
    }
    assert terms.weight("kd", found.kd, old=1, seen=4) == 3.0
    assert config.terms.kd.weight == "rho"


def test_options_are_the_method_s_with_those_given(mine):
    config = example()
    config.options = ConfigDict({"share": 1, "sizes": (3,)})
    found = resolve(config)
    assert found.options.to_dict() == {**OPTIONS, "share": 1.0, "sizes": (3,)}
    assert type(found.options.share) is float
    assert config.options.to_dict() == {"share": 1, "sizes": (3,)}
    assert resolve(found) == found
    assert json.dumps(flatten(found))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shar": 1.0}, "options.shar is unknown; known to il_baseline: exact, k,"),
        ({"k": 1.5}, "options.k=1.5: expected a value of type int"),
        ({"share": float("nan")}, "options.share=nan: expected finite numbers"),
        ({"exact": 1}, "options.exact=1: expected a value of type bool"),
        ({"share": {"a": 1.0}}, "options.share={'a': 1.0}: expected a value of"),
    ],
)
def test_mistakes_in_options(mine, options, message):
    config = example()
    config.options = ConfigDict(options)
    assert refusal(config).startswith(f"config.{message}")


def test_a_method_without_options_has_none():
    config = example()
    assert resolve(config).options == ConfigDict()
    config.options = ConfigDict({"share": 1.0})
    message = "config.options.share is unknown; known to il_baseline: none"
    assert refusal(config) == message


def test_a_file_s_arguments_fill_in_options_that_a_command_line_may_change(mine):
    config = default_config()
    apply_arguments(config, "prior=balanced", COMMON_ARGUMENTS)
    assert config.options.to_dict() == OPTIONS


def base(config: ConfigDict) -> dict[str, Any]:
    return base_fields(flatten(config))


def test_what_reaches_the_base_step_is_declared():
    config = resolve(example(last=phase(epochs=3)))
    declared = {name for name, field in FIELDS.items() if field.base}
    of_base = {f"phase.base.{name}" for name in PHASE if name != "terms"}
    assert base(config).keys() == {*declared, *of_base, "phases"}
    flat = flatten(config)
    assert all(flat[n] == v for n, v in base(config).items() if n != "phases")
    assert base(config)["phases"] == ["base"]
    outside = ("name", "prior", "method", "terms", "phases", "data.nominal_per_class")
    assert not any(FIELDS[name].base for name in outside)


@pytest.mark.parametrize("name", PHASE)
def test_fields_of_later_phases_do_not_reach_the_base_step(name):
    flat = flatten(resolve(example()))
    known = base_fields(flat)
    if name == "terms":
        flat |= {"phase.incremental.terms.kd": 1.0, "phase.base.terms.kd": 1.0}
    elif name == "steps":
        flat["phase.incremental.steps"] = "base"
        assert base_fields(flat)["phases"] == ["base", "incremental"]
        return
    else:
        flat[f"phase.incremental.{name}"] = "other"
    assert base_fields(flat) == known


def test_the_order_of_the_phases_of_the_base_step_reaches_it():
    config = example()
    config.phases = ("base", "second", "incremental")
    config.phase.second = phase(steps="base", epochs=1)
    assert base(config)["phases"] == ["base", "second"]
    other = config.copy_and_resolve_references()
    other.phases = ("second", "base", "incremental")
    assert base(other) != base(config) and config_hash(other) != config_hash(config)


def test_a_forward_of_the_base_step_brings_the_method_with_it(mine):
    config = example()
    config.phase.incremental.forward = "forward"
    plain = base(resolve(config))
    assert "method" not in plain and "options.share" not in plain
    config.phase.base.forward = "forward"
    found = base(resolve(config))
    assert found["method"] == "il_baseline" and found["options.share"] == 0.5
    assert found.keys() - plain.keys() == {"method", *(f"options.{n}" for n in OPTIONS)}


def test_a_configuration_without_phases_gives_what_it_has():
    old = {"seed": 1, "optim.epochs": 3, "optim.clip": 5.0, "name": "x", "prior": "no"}
    assert base_fields(old) == {"seed": 1, "optim.clip": 5.0}
    assert base_fields({}) == {}
    assert hashes.is_hashed("optim.epochs")


def test_the_names_of_fields_are_found():
    assert fields.find("phase.mine.rate.head") is PHASE["rate.head"]
    assert fields.find("phase.mine.terms.kd") is PHASE["terms"]
    assert fields.find("terms.kd.weight") is FIELDS["terms"]
    assert fields.find("options.share") is FIELDS["options"]
    for name in ("phase", "phase.base", "phase.base.rate", "data", "seed.x", "other"):
        assert fields.find(name) is None


def test_a_term_without_its_teacher_is_one_clear_line():
    config = default_config()
    config.terms = ConfigDict({"softmax_ce": {"weight": 1.0}, "kd": {"weight": 1.0}})
    config.phase.incremental.teacher = "none"
    line = (
        "config.phase.incremental.teacher='none': expected before or now for the term"
    )
    with pytest.raises(UserError, match=f"^{line} kd$"):
        resolve(config)
    config.phase.incremental.terms = ConfigDict({"softmax_ce": 1.0})
    resolve(config)
