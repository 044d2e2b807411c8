"""Task-wise distillation: formula, gradient, invariants, a batch over 8 devices."""

import functools
import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bsce_jax.compute.state import Batch, total_over_devices

taskwise = importlib.import_module("bsce_jax.losses.taskwise_kd")

B, C = 6, 10
TASKS = np.array([0, 0, 0, 1, 1, 3, 3, 3, -1, -1])  # task 2 is absent, two are new
SHUFFLED = np.array([1, -1, 3, 3, 4, 3, 1, 4, -1, 4])  # no class of task 0
arrays = hnp.arrays(np.float64, (B, C), elements=st.floats(-30, 30))


@jax.jit
def distil(
    logits: jax.Array, teacher: jax.Array, tasks: jax.Array, temperature: float = 2.0
) -> tuple[jax.Array, jax.Array]:
    """Values [B], and the gradient of their sum."""
    values, transpose = jax.vjp(
        lambda z: taskwise.taskwise_distillation(z, teacher, tasks, temperature), logits
    )
    return values, transpose(jnp.ones_like(values))[0]


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def oracle(
    logits: np.ndarray, teacher: np.ndarray, tasks: np.ndarray, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """Task by task, on the task's columns cut out."""
    values, gradient = np.zeros(len(logits)), np.zeros_like(logits)
    for task in set(tasks.tolist()) - {-1}:
        columns = np.flatnonzero(tasks == task)
        p = softmax(logits[:, columns] / temperature)
        q = softmax(teacher[:, columns] / temperature)
        values += temperature**2 * (q * (np.log(q) - np.log(p))).sum(axis=1)
        gradient[:, columns] += temperature * (p - q)
    return values, gradient


@settings(max_examples=25, deadline=None)
@given(arrays, arrays, st.sampled_from([0.5, 1.0, 2.0, 5.0]), st.booleans())
def test_oracle(
    logits: np.ndarray, teacher: np.ndarray, temperature: float, shuffled: bool
) -> None:
    tasks = SHUFFLED if shuffled else TASKS
    expected = oracle(logits, teacher, tasks, temperature)
    with jax.enable_x64(True):
        found = distil(logits, teacher, tasks, temperature)
        for ours, by_hand in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, by_hand, rtol=1e-11, atol=1e-11)


def test_by_hand() -> None:
    """Two tasks of two classes, T = 1: KL((.5, .5) || (.75, .25)), and twice 0."""
    logits = jnp.log(jnp.asarray([[3.0, 1.0, 5.0, 5.0]]))
    teacher = jnp.asarray([[2.0, 2.0, -1.0, -1.0]])
    values, _ = distil(logits, teacher, np.array([0, 0, 1, 1]), 1.0)
    np.testing.assert_allclose(values, 0.5 * np.log(0.25 / 0.1875), rtol=1e-6)


def test_one_task_is_distillation_minus_the_teachers_entropy(x64: None) -> None:
    logits, teacher = np.random.default_rng(0).normal(size=(2, B, C)) * 3
    old = np.arange(C) < 5
    kd = importlib.import_module("bsce_jax.losses.kd")
    q = softmax(teacher[:, :5] / 2)
    entropy = -4 * (q * np.log(q)).sum(axis=1)
    values, gradient = distil(logits, teacher, np.where(old, 0, -1))
    expected, transpose = jax.vjp(
        jax.jit(lambda z: kd.knowledge_distillation(z, teacher, old)), logits
    )
    np.testing.assert_allclose(values, expected - entropy, atol=1e-13)
    np.testing.assert_allclose(
        gradient, transpose(jnp.ones(B, jnp.float64))[0], atol=1e-13
    )


def test_second_derivatives(x64: None) -> None:
    """Forward over reverse, as the meta gradient takes it, by differences."""
    logits, teacher, tangent = np.random.default_rng(1).normal(size=(3, B, C))

    def gradient(z: jax.Array) -> jax.Array:
        return distil(z, teacher, TASKS)[1]

    found = jax.jvp(gradient, (logits,), (tangent,))[1]
    ends = [gradient(logits + step * tangent) for step in (1e-5, -1e-5)]
    assert np.any(found)
    np.testing.assert_allclose(found, (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-9)


def test_a_task_far_below_another_counts_in_full() -> None:
    """By 3,000: with one maximum for all tasks its exponentials were 0."""
    rng = np.random.default_rng(2)
    logits, teacher = np.round(rng.normal(size=(2, B, C)) * 4) / 4
    expected = oracle(logits, teacher, TASKS, 2.0)
    low = np.where(TASKS == 1, -3000.0, 0.0)[None, :]
    found = distil(
        jnp.asarray(logits + low, jnp.float32),
        jnp.asarray(teacher - low, jnp.float32),
        TASKS,
    )
    for ours, by_hand in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, by_hand, rtol=1e-5, atol=1e-5)


def test_equal_logits_and_no_old_class() -> None:
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(B, C)), jnp.float32)
    for tasks, teacher in ((TASKS, logits), (np.full(C, -1), -logits)):
        values, gradient = distil(logits, teacher, tasks)
        np.testing.assert_array_equal(values, 0)
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_other_classes_do_not_matter_and_tasks_are_traced() -> None:
    rng = np.random.default_rng(4)
    logits, teacher = rng.normal(size=(2, B, C)).astype(np.float32)
    before = distil._cache_size()
    for tasks in (TASKS, SHUFFLED):
        values, gradient = distil(logits, teacher, tasks)
        other = (tasks < 0)[None, :]
        changed = distil(
            np.where(other, 1e6, logits), np.where(other, -1e6, teacher), tasks
        )
        np.testing.assert_array_equal(changed[0], values)
        np.testing.assert_array_equal(changed[1], gradient)
        np.testing.assert_array_equal(np.asarray(gradient)[:, tasks < 0], 0)
    assert distil._cache_size() <= before + 1


def test_no_gradient_into_the_teacher() -> None:
    logits, teacher = np.random.default_rng(5).normal(size=(2, B, C))
    gradient = jax.grad(lambda t: jnp.sum(distil(logits, t, TASKS)[0]))(teacher)
    np.testing.assert_array_equal(gradient, 0)


def test_backward_pass_has_no_scatter_and_no_cubic_array() -> None:
    """Of 1,000 classes: the forward pass's maxima are the only scatter."""
    rows, classes = 160, 1000
    shapes = [jax.ShapeDtypeStruct((rows, classes), jnp.float32)] * 2
    tasks = jax.ShapeDtypeStruct((classes,), jnp.int32)

    def value(*arguments: jax.Array) -> jax.Array:
        return jnp.sum(taskwise.taskwise_distillation(*arguments))

    forward = str(jax.make_jaxpr(value)(*shapes, tasks))
    both = str(jax.make_jaxpr(jax.grad(value))(*shapes, tasks))
    assert forward.count("scatter") == both.count("scatter") > 0
    assert f"{rows},{classes},{classes}" not in both
    assert f"{classes},{rows},{classes}" not in both


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_computed_in_float32(dtype: type) -> None:
    rng = np.random.default_rng(6)
    arguments = [jnp.asarray(rng.normal(size=(B, C)) * 9, dtype) for _ in range(2)]
    values, gradient = distil(*arguments, TASKS)
    assert values.dtype == jnp.float32 and gradient.dtype == dtype
    assert np.isfinite(np.asarray(gradient, np.float32)).all()
    exact, _ = distil(*(x.astype(jnp.float32) for x in arguments), TASKS)
    np.testing.assert_array_equal(values, exact)


def case(seed: int, rows: int) -> tuple[dict, dict, types.SimpleNamespace]:
    rng = np.random.default_rng(seed)
    outputs = [{"logits": jnp.asarray(rng.normal(size=(rows, C)))} for _ in range(2)]
    context = types.SimpleNamespace(
        taught=jnp.asarray(TASKS >= 0),
        task_ids=jnp.asarray(np.where(TASKS < 0, 4, TASKS)),
    )
    return *outputs, context


@pytest.mark.parametrize("squared", [True, False])
def test_term(x64: None, squared: bool) -> None:
    """Classes that are not taught have a task too; padding rows have no weight."""
    student, teacher, context = case(7, B)
    valid = jnp.asarray([1.0, 1, 1, 0, 1, 0])
    batch = Batch(None, None, valid)
    options = {"temperature": 3.0, "squared": squared}
    values, weights = jax.jit(
        lambda *outputs: taskwise.term(*outputs, batch, context, **options)
    )(student, teacher)
    expected, _ = oracle(
        np.asarray(student["logits"]), np.asarray(teacher["logits"]), TASKS, 3.0
    )
    np.testing.assert_allclose(values * (1 if squared else 9), expected, rtol=1e-12)
    np.testing.assert_array_equal(weights, valid)
    assert taskwise.NEEDS_OLD_CLASSES


def test_eight_devices_are_one(x64: None) -> None:
    """Values and gradients, with padding rows of garbage on the last devices."""
    student, teacher, context = case(8, 16)
    valid = jnp.asarray([1.0] * 13 + [0.0] * 3)
    logits = student["logits"].at[13:].set(1e5)

    def share(z: jax.Array, t: jax.Array, v: jax.Array, axis: str | None) -> jax.Array:
        batch = Batch(None, None, v, axis)
        values, weights = taskwise.term({"logits": z}, {"logits": t}, batch, context)
        total = total_over_devices(jnp.sum(weights), axis)
        return jnp.sum(values * weights) / total

    whole = functools.partial(share, axis=None)
    rows = slice(0, 13)
    loss, gradient = jax.jit(jax.value_and_grad(whole))(
        logits[rows], teacher["logits"][rows], valid[rows]
    )
    parts = [x.reshape(8, 2, *x.shape[1:]) for x in (logits, teacher["logits"], valid)]
    shares, gradients = jax.pmap(
        jax.value_and_grad(functools.partial(share, axis="d")), "d"
    )(*parts)
    np.testing.assert_allclose(np.sum(np.asarray(shares)), loss, rtol=1e-13)
    found = np.asarray(gradients).reshape(16, C)
    np.testing.assert_allclose(found[rows], gradient, rtol=1e-12, atol=1e-16)
    np.testing.assert_array_equal(found[13:], 0)
