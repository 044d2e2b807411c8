"""What a phase of a step hands to compiled code, besides its images."""

import numpy as np
import pytest

from bsce_jax.compute.state import OWN, Network
from bsce_jax.config.fields import only, phase
from bsce_jax.log_prior import EXCLUDED
from bsce_jax.run.context import has_teacher, phase_context, test_context
from tests.phase_example import config, data_of, dataset, full_ranking

test_context.__test__ = False  # its name is not that of a test
DATA = dataset([8, 8, 8, 7, 9, 8], base=3, steps=3)
PARAMS = {
    "Conv_0": {"kernel": np.zeros((3, 3, 1, 4), np.float32)},
    "norm": {"bias": np.zeros(4, np.float32), "scale": np.ones(4, np.float32)},
    "head": {"kernel": np.zeros((4, 6), np.float32), "scale": np.float32(1)},
    OWN: {"shift": np.float32(0)},
}
NETWORK = Network(PARAMS, {}, {})


def context(step=2, phases=None, name="", **values):
    """The context of the step with classes 0 to 3 old and 4 new, and its data."""
    chosen = config(phases, **{"memory__per_class": 2, **values})
    data = data_of(chosen, DATA, full_ranking(DATA, 2), step, name)
    return phase_context(chosen, DATA, data, NETWORK), data


def test_the_classes_of_a_step():
    found, data = context()
    assert found.old.tolist() == [True] * 4 + [False] * 2
    assert found.seen.tolist() == [True] * 5 + [False]
    assert found.task_ids.tolist() == [0, 0, 0, 1, 2, -1]
    assert found.counts.tolist() == data.counts.tolist() == [2, 2, 2, 2, 9, 0]
    assert found.counts.dtype == found.log_prior.dtype == np.float32
    assert found.task_ids.dtype == np.int32 and found.teacher is None
    base, _ = context(step=0)
    assert not base.old.any() and base.seen.tolist() == [True] * 3 + [False] * 3
    assert base.task_ids.tolist() == [0, 0, 0, -1, -1, -1]


@pytest.mark.parametrize(
    ("teacher", "taught", "base"),
    [("before", 4, False), ("now", 5, True), ("none", 0, False)],
)
def test_what_the_teacher_knows(teacher, taught, base):
    """The old classes, or all seen where it is the network of this very step."""
    values = {"phase__incremental__teacher": teacher, "phase__base__teacher": teacher}
    if teacher == "none":
        values["phase__incremental__epochs"] = 0
        only_ce = phase(teacher="none", epochs=1, terms={"softmax_ce": 1.0})
        found, data = context(phases={"alone": only_ce}, name="alone", **values)
    else:
        found, data = context(**values)
    assert found.taught.tolist() == [i < taught for i in range(6)]
    assert has_teacher(data) == (teacher != "none")
    first, data = context(step=0, **values)
    assert has_teacher(data) == base
    assert first.taught.tolist() == [base] * 3 + [False] * 3


def test_a_teacher_taken_in_a_later_phase_of_the_step():
    last = {"last": phase(images="exemplars", epochs=1, teacher="now")}
    found, data = context(phases=last, name="last")
    assert found.taught.tolist() == found.seen.tolist() and has_teacher(data)
    assert found.counts.tolist() == [2, 2, 2, 2, 2, 0]
    main, _ = context(phases=last)
    assert main.taught.tolist() == main.old.tolist()


def test_weights_are_those_of_the_step_and_of_the_phase():
    found, _ = context(terms__kd__weight="rho")
    assert found.weights == {"kd": np.float32(0.8), "softmax_ce": np.float32(0.2)}
    assert all(w.dtype == np.float32 for w in found.weights.values())
    last = {"last": phase(epochs=1, terms={"softmax_ce": 0.5})}
    found, _ = context(phases=last, name="last")
    assert found.weights == {"softmax_ce": np.float32(0.5)}
    found, _ = context(step=0)
    assert found.weights == {"kd": 0.0, "softmax_ce": 1.0}


@pytest.mark.parametrize(("rows", "moving"), [("seen", range(5)), ("new", [4])])
def test_the_update_scale_is_the_phase_s(rows, moving):
    rate = only(head=10.0, own=0.5)
    last = {"last": phase(epochs=1, rate=rate, rows=rows)}
    found, _ = context(phases=last, name="last")
    scale = found.update_scale
    kernel = [10.0 * (i in moving) for i in range(6)]
    np.testing.assert_array_equal(scale["head"]["kernel"], [kernel])
    assert scale[OWN]["shift"] == 0.5 and scale["head"]["scale"] == 0
    assert scale["Conv_0"]["kernel"].tolist() == [[[[0.0]]]]
    assert scale["norm"]["bias"].tolist() == scale["norm"]["scale"].tolist() == [0.0]
    plain, _ = context(phases=last)
    assert plain.update_scale["head"]["kernel"].tolist() == [[1.0] * 5 + [0.0]]
    assert plain.update_scale["Conv_0"]["kernel"].item() == 1


@pytest.mark.parametrize(
    ("by_step", "factors"), [("constant", (1, 1)), ("groups/step", (4, 4 / 3))]
)
def test_the_weight_decay_may_fall_with_the_step(by_step, factors):
    for step, factor in zip((0, 2), factors, strict=True):
        found, _ = context(step=step, optim__weight_decay_by_step=by_step)
        assert found.decay == np.float32(factor) and found.decay.dtype == np.float32


def test_the_log_prior_counts_the_images_of_the_phase():
    last = {"last": phase(images="exemplars", epochs=1)}
    main, _ = context(phases=last, prior="balanced")
    expected = [np.log(2 / 9)] * 4 + [0.0]
    np.testing.assert_allclose(main.log_prior[:5], expected, rtol=1e-6)
    assert main.log_prior[5] <= EXCLUDED
    found, _ = context(phases=last, name="last", prior="balanced")
    np.testing.assert_allclose(found.log_prior[:5], 0, atol=1e-7)
    none, _ = context()
    np.testing.assert_array_equal(none.log_prior[:5], 0)


def test_the_context_of_predictions_knows_the_classes_alone():
    found = test_context(6, [3, 4, 5])
    trained, _ = context()
    for name in ("old", "seen", "task_ids", "log_prior"):
        np.testing.assert_array_equal(getattr(found, name), getattr(trained, name))
    assert found.teacher is None and not found.weights and not found.taught.any()
