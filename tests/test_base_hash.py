"""Which base steps are the same: the hash covers all that reaches one, no more."""

import dataclasses
import pathlib

import numpy as np
import pytest
from ml_collections import ConfigDict

from bsce_jax.config.fields import PHASE, phase
from bsce_jax.config.flags import parse
from bsce_jax.config.hashes import flatten
from bsce_jax.config.resolve import resolve
from bsce_jax.run.base_hash import base_hash
from bsce_jax.scenario import class_groups
from tests.phase_example import config, dataset

PRIORS = ("none", "balanced", "weighted", "meta", "relaxed")
DATA = dataset([8] * 6, base=3, steps=3)

# One other value for each field of a phase.
OF_A_PHASE = {
    "augment": False,
    "batch_norm": "eval",
    "batch_size": 3,
    "begin": "start",
    "beside": "memory",
    "beside_size": 3,
    "by_step": "1/step",
    "decay": 0.2,
    "epochs": 3,
    "forward": "forward",
    "images": "exemplars",
    "learning_rate": 0.3,
    "milestones": (2,),
    "optimizer": "kept",
    "rate.auxiliary": 0.5,
    "rate.batch_norms": 0.5,
    "rate.convolutions": 0.5,
    "rate.head": 0.5,
    "rate.kernel_scales": 0.5,
    "rate.own": 0.5,
    "rate.scale": 0.5,
    "replay": 3,
    "rows": "new",
    "sampling": "class",
    "schedule": "cosine",
    "teacher": "now",
    "when_prior": "none",
}
CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
# One other value for each field that reaches the base step.
RELEVANT = {
    "seed": 1,
    "short": 2,
    "matmul_precision": "highest",
    "data.name": "other",
    "data.train_split": "train[:50%]",
    "data.test_split": "validation",
    "data.image_size": 16,
    "data.max_per_class": 7,
    "data.validation_fraction": 0.1,
    "data.padding": 2,
    "data.flip": False,
    "data.brightness": 0.2,
    "data.loading": "streaming",
    "data.resize": 40,
    "data.random_resized_crop": False,
    "data.crop_area": (0.5, 1.0),
    "data.mean": (0.4,),
    "data.std": (0.4,),
    "model.name": "resnet20",
    "model.width": 8,
    "model.shortcut": "A",
    "model.final_relu": False,
    "model.head": "cosine",
    "model.proxies": 5,
    "model.auxiliary": 4,
    "model.kernel_scales": True,
    "model.stem": "3x3",
    "model.dtype": "bfloat16",
    "model.conv_chunks": 4,
    "optim.batch_size": 64,
    "optim.momentum": 0.8,
    "optim.weight_decay": 1e-3,
    "optim.clip": 5.0,
    "optim.decayed": "kernels",
    "optim.noise": 0.3,
    "optim.noise_epochs": 2,
    "optim.weight_decay_by_step": "groups/step",
    "terms.softmax_ce.weight": 0.5,
    **{f"phase.base.{name}": value for name, value in OF_A_PHASE.items()},
}
IRRELEVANT = {
    "name": "mine",
    "method": "lucir",
    "alpha": 0.5,
    "epsilon": 1.0,
    "epsilon_unit": "percent",
    "init_from": "/somewhere",
    "parallel": "pmap",
    "updates_per_call": 5,
    "deterministic": True,
    "gpu_graphs": "whole",
    "print_plan": True,
    "log_seconds": 1.0,
    "compile_cache": False,
    "data.data_dir": "/elsewhere",
    "data.nominal_per_class": 8,
    "data.workers": 3,
    "data.timeout": 5.0,
    "data.corrupt": "skip",
    "scenario.subset": "lucir",  # counts by the class order
    "scenario.class_order": "icarl",
    "scenario.base_classes": 4,
    "scenario.steps": 7,
    "memory.kind": "fixed",
    "memory.per_class": 2,
    "memory.budget": 30,
    "memory.selection": "random",
    "classification": "softmax_ce",
    "evaluation.nearest_mean": False,
    "meta.every": 3,
    "meta.fraction": 0.2,
    "meta.batch_size": 3,
    "meta.inner_learning_rate": 0.3,
    "meta.optimizer": "adam",
    "meta.variable": "log_alpha",
    "meta.learning_rate": 0.3,
    "meta.minimum": 0.1,
    "meta.maximum": 2.0,
    "meta.batch_norm": "eval",
    "evaluation.batch_size": 3,
    "checkpoint.minutes": 3.0,
    "checkpoint.keep": 3,
    "terms.kd.weight": 0.5,
    "terms.kd.temperature": 3.0,
    **{f"phase.incremental.{name}": value for name, value in OF_A_PHASE.items()},
}
# What decides which phases are those of the base step, and on which images it is.
ONE_VALUE_ONLY = {"phases", "phase.base.steps", "phase.incremental.steps"}
ONE_VALUE_ONLY |= {"memory.held_out"}


def test_every_field_is_sorted_into_one_of_the_two():
    sorted_fields = {*RELEVANT, *IRRELEVANT, *ONE_VALUE_ONLY, "prior"}
    assert sorted_fields == set(flatten(config()))
    assert {*OF_A_PHASE, "steps", "terms"} == set(PHASE)


@pytest.mark.parametrize("prior", ["none", "meta"])
def test_the_base_hash_covers_what_reaches_the_base_step(prior):
    plain = config(prior=prior)
    expected = base_hash(plain, DATA)

    def changed(name, value):
        c = plain.copy_and_resolve_references()
        if name.startswith("terms."):
            c.terms[name.split(".")[1]] = {
                **c.terms[name.split(".")[1]].to_dict(),
                name.split(".")[2]: value,
            }
        else:
            c.update_from_flattened_dict({name: value})
        assert flatten(c) != flatten(plain), name
        return base_hash(c, DATA)

    for name, value in RELEVANT.items():
        assert changed(name, value) != expected, name
    for name, value in IRRELEVANT.items():
        assert changed(name, value) == expected, name


def test_the_base_hash_of_all_priors_is_one_where_classes_are_equally_large():
    hashes = {base_hash(config(prior=prior), DATA) for prior in PRIORS}
    assert len(hashes) == 1
    unequal = dataset([8, 8, 7, 8, 8, 8], base=3, steps=3)
    plain, *others = (base_hash(config(prior=p), unequal) for p in PRIORS)
    assert len(set(others)) == 1 and plain != others[0]
    assert plain == hashes.pop()
    later = dataset([8, 8, 8, 8, 7, 8], base=3, steps=3)
    assert len({base_hash(config(prior=p), later) for p in PRIORS}) == 1


def test_the_ablations_of_equally_large_classes_share_the_base_step():
    """The separated softmax is the softmax there, and rescaling multiplies by one."""

    def given(classification="auto", **terms) -> ConfigDict:
        c = config().copy_and_resolve_references()
        c.terms, c.classification = ConfigDict(terms), classification
        return resolve(c)

    softmax = {"weight": "1-rho", "rescale": False}
    plain = given(softmax_ce=softmax)
    rescaled = given(softmax_ce=softmax | {"rescale": True})
    separated = given("separated_softmax_ce", softmax_ce=softmax)
    both = given(softmax_ce={"weight": 0.5}, separated_softmax_ce={"weight": 0.5})
    expected = base_hash(plain, DATA)
    assert base_hash(rescaled, DATA) == expected
    assert base_hash(separated, DATA) == expected
    assert base_hash(both, DATA) != expected
    unequal = dataset([8, 8, 7, 8, 8, 8], base=3, steps=3)
    assert base_hash(rescaled, unequal) != base_hash(plain, unequal)
    assert base_hash(separated, unequal) == base_hash(plain, unequal)


def test_the_terms_of_the_phases_of_the_base_step_count():
    """As numbers; those of other phases and other phases themselves do not."""
    expected = base_hash(config(), DATA)

    def found(terms: dict, name: str = "base"):
        c = config().copy_and_resolve_references()
        c.terms.shift_l2 = {"weight": 0.0}
        c.phase[name].terms = ConfigDict(terms)
        return base_hash(c, DATA)

    assert found({"softmax_ce": 1.0}) == found({"softmax_ce": "1-rho"}) == expected
    assert found({"softmax_ce": 0.5}) != expected
    assert found({"softmax_ce": 1.0, "kd": 0.5}) == expected  # no class is old
    assert found({"softmax_ce": 0.5}, "incremental") == expected
    assert found({"softmax_ce": 1.0, "shift_l2": 0.0}) == expected
    assert found({"softmax_ce": 1.0, "shift_l2": 0.1}) != expected
    others = {"last": phase(images="exemplars", epochs=3)}
    assert base_hash(config(others), DATA) == expected
    second = {"second": phase(steps="base", epochs=3, terms={"softmax_ce": 0.5})}
    c = config()
    c.phases, c.phase.second = ("base", "second", "incremental"), second["second"]
    two = base_hash(resolve(c), DATA)
    assert two != expected
    c.phase.second.terms.softmax_ce = 0.25
    assert base_hash(resolve(c), DATA) != two
    c.phases, c.phase.second.terms.softmax_ce = ("second", "base", "incremental"), 0.5
    assert base_hash(resolve(c), DATA) not in (two, expected)


def test_the_method_counts_where_the_base_step_uses_its_forward():
    def found(method: str, forward: str):
        c = config().copy_and_resolve_references()
        c.method, c.phase.base.forward = method, forward
        return base_hash(c, DATA)

    assert found("bic", "") == found("il_baseline", "") == base_hash(config(), DATA)
    assert len({found("bic", ""), found("bic", "f"), found("icarl", "f")}) == 3
    c = config().copy_and_resolve_references()
    c.method, c.phase.base.begin = "mnemonics", "start"
    assert base_hash(c, DATA) not in (found("bic", ""), found("mnemonics", ""))


def test_images_that_are_held_out_from_the_start_count():
    held = {"bias": phase(images="held_out", epochs=2)}
    plain = base_hash(config(), DATA)
    assert base_hash(config(held), DATA) == plain
    options = {"memory__held_out": "once", "meta__fraction": 0.4}
    once = {
        base_hash(config(held, **options, memory__per_class=n), DATA) for n in (4, 6)
    }
    assert len(once | {plain}) == 2  # 2 images of each class in both
    more = base_hash(config(held, **options, memory__per_class=7), DATA)
    assert more not in once


def test_the_number_of_steps_counts_where_the_weight_decay_depends_on_it():
    falls = config(optim__weight_decay_by_step="groups/step")
    other = dataclasses.replace(DATA, groups=class_groups(6, 3, 1))
    assert base_hash(falls, other) != base_hash(falls, DATA)


def test_the_base_hash_and_the_scenario():
    """Steps and the order of later classes do not count; the base classes do."""
    expected = base_hash(config(), DATA)

    def found(**values):
        return base_hash(config(), dataclasses.replace(DATA, **values))

    assert found(groups=class_groups(6, 3, 1)) == expected
    assert found(groups=class_groups(6, 2, 2)) != expected
    assert found(class_order=np.array([5, 4, 3, 0, 2, 1])) == expected
    assert found(class_order=np.array([4, 5, 3, 0, 2, 1])) != expected
    longer_head = np.array([5, 4, 3, 2, 1, 0, 6])
    assert found(class_order=longer_head) != expected
    # Weights count as numbers in the base step, whatever they are called.
    one = config()
    one.terms.softmax_ce = {"weight": 1.0}
    assert base_hash(one, DATA) == expected


@pytest.mark.parametrize(
    "alike",
    [
        ("il_baseline", "ncm", "slda"),
        ("lucir", "lucir_dde", "geodl", "tpcil_like"),
        ("podnet:balanced", "podnet_dde"),
    ],
)
def test_methods_that_begin_alike_share_their_base_step(alike):
    found = set()
    for given in alike:
        method, _, prior = given.partition(":")
        arguments = f"method={method},prior={prior or 'none'},memory=5"
        file = f"{CONFIGS / 'cifar100.py'}:{arguments}"
        found.add(base_hash(resolve(parse(["main", f"--config={file}"]).config), DATA))
    assert len(found) == 1
