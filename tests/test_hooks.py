"""What a method's hooks give is checked before a run goes on with it."""

import types

import numpy as np
import pytest

from bsce_jax.compute.state import OWN, Network
from bsce_jax.errors import UserError
from bsce_jax.run import hooks

RUN = types.SimpleNamespace(
    config=types.SimpleNamespace(method="mine"), dataset=types.SimpleNamespace()
)


def network() -> Network:
    return Network(
        {
            "head": {"kernel": np.ones((4, 6), np.float32)},
            OWN: {"scale": np.float32(1)},
        },
        {"norm": {"mean": np.zeros(4, np.float32)}},
        {"places": np.zeros((6, 2), np.int32), "new": np.zeros(6, bool)},
    )


def called(hook) -> Network:
    shown = types.SimpleNamespace(network=network())
    return hooks._called(RUN, "begin", hook, shown)


def test_a_network_of_other_precision_is_brought_back():
    def begin(step):
        kernel = np.full((4, 6), 0.5)  # float64, as NumPy has it
        own = {"scale": 2.0}
        params = {"head": {"kernel": kernel}, OWN: own}
        places = step.network.extra["places"] + 1
        extra = step.network.extra | {"places": places.astype(np.int64)}
        return step.network.replace(params=params, extra=extra)

    found = called(begin)
    assert found.params["head"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(found.params["head"]["kernel"], 0.5)
    assert found.params[OWN]["scale"] == np.float32(2)
    assert found.extra["places"].dtype == np.int32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_stats": {"norm": {"mean": np.zeros(3, np.float32)}}},
            "gives batch_stats.norm.mean of shape (3,): expected (4,)",
        ),
        (
            {"batch_stats": {"norm": {"mean": np.full(4, np.nan, np.float32)}}},
            "gives batch_stats.norm.mean that is not finite",
        ),
        (
            {"extra": {"places": np.zeros((6, 2), np.int32)}},
            "gives a network of other arrays: extra.new",
        ),
        (
            {"extra": {"places": np.zeros((6, 2)), "new": np.zeros(6, bool)}},
            "gives extra.places of float64: expected int32",
        ),
    ],
)
def test_another_network_is_refused_in_one_line(changes, message):
    with pytest.raises(UserError) as caught:
        called(lambda step: step.network.replace(**changes))
    assert str(caught.value) == f"begin of the method mine {message}"


def test_no_network_at_all_is_refused():
    with pytest.raises(UserError, match="begin of the method mine gives NoneType: "):
        called(lambda step: None)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("part", ["own", "extra", "head", "statistics"])
def test_the_model_of_the_base_step_is_that_of_all_methods(monkeypatch, step, part):
    changed = network()
    if part == "own":
        changed.params[OWN]["scale"] = np.float32(3)
    elif part == "extra":
        changed.extra["places"][:] = 5
    elif part == "head":
        changed.params["head"]["kernel"][0, 0] = 2
    else:
        changed.batch_stats["norm"]["mean"][0] = 2
    shown = types.SimpleNamespace(network=network())
    monkeypatch.setattr(hooks, "_hook", lambda run, name: lambda step: changed)
    monkeypatch.setattr(hooks, "_shown", lambda *_: shown)
    monkeypatch.setattr(hooks, "new_images", lambda *_: [])
    progress = types.SimpleNamespace(step=step, state=None)
    if step or part in ("own", "extra"):
        found = hooks.finish(RUN, progress)
        np.testing.assert_array_equal(
            found.params["head"]["kernel"], changed.params["head"]["kernel"]
        )
        return
    with pytest.raises(UserError, match="finish of the method mine changes the model"):
        hooks.finish(RUN, progress)
