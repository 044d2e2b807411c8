"""What is wrong with the losses of the increments is said before the base step."""

import jax
import jax.numpy as jnp
import pytest

from bsce_jax.compute import steps
from bsce_jax.config import terms
from bsce_jax.config.fields import phase
from bsce_jax.errors import UserError
from bsce_jax.run import trial
from bsce_jax.run.phases import planned
from tests import phase_example
from tests.tiny import TinyNet

DATA = phase_example.dataset([8] * 6, base=2, steps=2)


def config(**values):
    """Of six classes in three steps."""
    scenario = {"scenario__base_classes": 2, "scenario__steps": 2}
    return phase_example.config(**scenario, **values)


def check(monkeypatch, term=None, name="kd", **values):
    """Of the defaults with IL-Baseline's terms, one of them in another way."""
    if term is not None:
        monkeypatch.setattr(terms.module(name), "term", term)
    chosen = config(**values)
    trial.check_losses(chosen, DATA, TinyNet(6), planned(chosen, DATA))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"prior": "meta", "memory__per_class": 4},
        {"phase__incremental__replay": 3},
        {"model__dtype": "bfloat16"},
        {"phases": {"last": phase(images="exemplars", epochs=1, teacher="now")}},
    ],
)
def test_losses_that_fit_pass_and_nothing_is_compiled(monkeypatch, values):
    monkeypatch.setattr(jax, "jit", None)  # nothing may ask for it
    check(monkeypatch, **values)


def test_a_batch_has_what_the_phase_s_has(monkeypatch):
    seen = []

    def abstract_loss(program, network, context, batch):
        seen.append(batch)

    monkeypatch.setattr(steps, "abstract_loss", abstract_loss)
    beside = {
        "phase__incremental__beside": "memory",
        "phase__incremental__beside_size": 5,
    }
    check(monkeypatch, phase__incremental__replay=3, optim__batch_size=7)
    check(monkeypatch, optim__batch_size=7, **beside)
    replayed, with_memory = seen
    assert replayed.images.shape == (10, 2, 2, 1) and not replayed.beside
    assert with_memory.images.shape == (7, 2, 2, 1)
    assert with_memory.beside["memory"].labels.shape == (5,)


def per_row(student, teacher, batch, context, *, temperature=2.0):
    values = jnp.sum(student["logits"], axis=1, keepdims=True)
    return values, batch.valid


def missing(student, teacher, batch, context, *, temperature=2.0):
    return student["attention"], batch.valid


def own_mistake(student, teacher, batch, context, *, temperature=2.0):
    return {"logits": 1}["features"], batch.valid


def test_mistakes_in_a_term_are_one_line(monkeypatch):
    size = {"optim__batch_size": 7}
    with pytest.raises(UserError) as caught:
        check(monkeypatch, per_row, **size)
    assert str(caught.value) == (
        "config.terms.kd gives values of shape (7, 1) and weights of shape (7,): "
        "expected both alike, one of each an image"
    )
    with pytest.raises(UserError) as caught:
        check(monkeypatch, missing, **size)
    assert str(caught.value).startswith(
        "config.terms.kd needs the output 'attention', but there are only features, "
    )
    with pytest.raises(KeyError, match="features"):
        check(monkeypatch, own_mistake, **size)
