"""The static part of each phase, from its section of the configuration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsce_jax.compute import optim, steps
from bsce_jax.compute.state import OWN
from bsce_jax.config.fields import only, phase
from bsce_jax.methods import bic, spb_i
from bsce_jax.run import programs
from tests.phase_example import config
from tests.tiny import TinyNet

MODEL = TinyNet(6)


def program(name: str, phases=None, **values) -> steps.Program:
    return programs.phase_program(config(phases, **values), MODEL, name)


def names(found: steps.Program) -> list[str]:
    return [term.name for term in found.terms]


def test_a_phase_of_the_base_step_has_no_terms_of_old_classes():
    assert names(program("base")) == ["softmax_ce"]
    later = program("incremental")
    assert names(later) == ["kd", "softmax_ce"]
    assert later.terms[0].options == {"temperature": 2.0}
    assert later.forward is steps.plain and not later.frozen
    assert later.batch_norm == "train" and later.meta is later.noise is None


def test_a_phase_has_the_terms_and_the_frozen_groups_of_its_section():
    last = phase(
        epochs=1, terms={"softmax_ce": 0.5}, rate=only(head=2.0), batch_norm="eval"
    )
    found = program("last", {"last": last})
    assert names(found) == ["softmax_ce"] and found.batch_norm == "eval"
    every = {"convolutions", "kernel_scales", "batch_norms", "scale", "auxiliary"}
    assert found.frozen == every | {"own"}
    assert not program("incremental", {"last": last}).frozen


def test_alpha_is_not_learned_where_the_network_stays():
    last = {"last": phase(epochs=1, rate=only(own=1.0))}
    assert program("incremental", last, prior="meta").meta is not None
    assert program("last", last, prior="meta").meta is None


def test_alpha_is_learned_on_training_images_of_later_steps_only():
    last = {"last": phase(images="exemplars", epochs=1, when_prior="none")}
    options = {"prior": "meta", "meta__every": 3}
    assert program("incremental", last, **options).meta.every == 3
    for name in ("base", "last"):
        assert program(name, last, **options).meta is None
    assert program("incremental", last, prior="balanced").meta is None


def test_a_forward_is_the_function_that_the_phase_names():
    last = {"last": phase(epochs=1, forward="forward")}
    chosen = config(last, method="bic", memory__per_class=4)
    plain, found = (
        programs.phase_program(chosen, MODEL, name).forward
        for name in ("incremental", "last")
    )
    assert plain is steps.plain
    assert isinstance(found, functools.partial) and found.func is bic.forward
    tested = programs.test_program(chosen, MODEL).forward
    assert tested.func is bic.forward  # whatever the phases name
    chosen = config(method="spb_i", model__head="cosine", model__auxiliary=4)
    assert programs.test_program(chosen, MODEL).forward is steps.plain
    assert programs.forward(chosen, "rotated").func is spb_i.rotated


def test_noise_and_the_optimiser_are_those_of_the_run():
    found = program("base", optim__noise=0.3, optim__noise_epochs=2)
    assert found.noise == optim.Noise(0.3, 2)
    assert program("base", optim__noise=0.3, short=5).noise == optim.Noise(0.3, 1, 5)
    params = {"layer": {"bias": np.ones(2, np.float32)}}
    for decayed, expected in (("all", 0.5), ("kernels", 0.0)):
        changes = {"optim__decayed": decayed, "optim__weight_decay": 0.5}
        chain = program("base", **changes).optimizer
        zeros = jax.tree.map(np.zeros_like, params)
        step, _ = chain.update(zeros, chain.init(params), params, decay=1.0)
        np.testing.assert_allclose(step["layer"]["bias"], expected)


@pytest.mark.parametrize("augment", [False, True])
def test_a_phase_without_augmentation_sees_images_as_the_evaluation_does(augment):
    last = {"last": phase(epochs=1, augment=augment)}
    found = program("last", last)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)
    rows = jnp.arange(3)
    shown = jax.jit(found.train_images)(images, jax.random.key(0), rows)
    tested = jax.jit(found.test_images)(images)
    assert bool(jnp.all(shown == tested)) != augment


def test_a_network_has_what_its_method_adds():
    """Own parameters and what it keeps; the shapes are known without any of them."""
    for method, own, extra in (
        ("il_baseline", None, {}),
        ("bic", {"scale": (), "shift": ()}, {"corrected": (6,)}),
        ("icarl", None, {"means": (6, 4)}),
    ):
        chosen = config(
            method=method,
            memory__per_class=4,
            scenario__base_classes=2,
            scenario__steps=2,
        )
        shapes = programs.network_shapes(chosen, MODEL, (8, 8, 1))
        found = programs.init_network(chosen, MODEL, (8, 8, 1))
        assert (OWN in found.params) == (own is not None)
        shape = functools.partial(jax.tree.map, jnp.shape)
        assert shape(found.params.get(OWN)) == own
        assert shape(found.extra) == extra
        described = jax.tree.map(
            lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), found
        )
        assert described == jax.tree.map(lambda s: (s.shape, s.dtype), shapes)
