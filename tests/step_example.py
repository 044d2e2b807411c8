"""A small network in training: programs, states and batches for tests of the steps."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bsce_jax import log_prior
from bsce_jax.compute import optim, parallel, steps, updates
from bsce_jax.compute.state import (
    HELD_OUT,
    OWN,
    TRAIN,
    Images,
    Network,
    Rows,
    Schedule,
    StepContext,
    TrainState,
)
from bsce_jax.config import terms
from bsce_jax.data import augment
from tests.tiny import TinyNet

CLASSES, OLD, SEEN, BATCH, UPDATES, FEATURES = 6, 3, 5, 12, 3, 4
GROUPS = (
    "convolutions",
    "kernel_scales",
    "batch_norms",
    "head",
    "scale",
    "auxiliary",
    "own",
)
EVERY_GROUP = dict.fromkeys(GROUPS, 1.0)

# Head and loss terms, with their options and weights.
METHODS: dict[str, tuple[str, dict[str, tuple[dict[str, Any], float]]]] = {
    "il_baseline": (
        "linear",
        {"kd": ({"temperature": 2.0}, 0.6), "softmax_ce": ({}, 0.4)},
    ),
    "lucir": (
        "cosine",
        {
            "softmax_ce": ({}, 1.0),
            "less_forget": ({}, 5.0),
            "margin_ranking": ({"k": 2, "margin": 0.5}, 1.0),
        },
    ),
    "podnet": (
        "local_similarity",
        {
            "nca": ({"margin": 0.6, "exact": False}, 1.0),
            "pod_spatial": ({}, 3.0),
            "pod_flat": ({}, 1.5),
        },
    ),
    "table6": (  # in one program, though no method has both
        "linear",
        {
            "separated_softmax_ce": ({}, 1.0),
            "softmax_ce": ({"rescale": True}, 0.5),
        },
    ),
}
# Several methods' terms in one program, which compiles once.
METHODS["linear"] = ("linear", METHODS["il_baseline"][1] | METHODS["table6"][1])
METHODS["similarities"] = (
    "local_similarity",
    METHODS["lucir"][1] | METHODS["podnet"][1],
)
# LLVM's optimiser takes more than a third of the time here; nothing runs long.
FAST = {"xla_backend_optimization_level": 0}


@functools.cache
def program(dtype, meta=True, method="il_baseline", augmented=True) -> steps.Program:
    """The static part; without augmentation it compiles in two thirds of the time."""
    pixels = {"mean": (0.5,), "std": (0.5,), "dtype": dtype}
    head, chosen = METHODS[method]
    if meta and "nca" in chosen:  # alpha acts through softmax_ce only
        chosen = {"softmax_ce": ({}, 1.0)} | chosen
    tested = functools.partial(augment.test_images, **pixels)
    return steps.Program(
        model=TinyNet(CLASSES, dtype, head, proxies=3),
        terms=tuple(
            steps.Term(name, terms.module(name).term, options)
            for name, (options, _) in sorted(chosen.items())
        ),
        optimizer=optim.sgd(0.9, 2e-4),
        train_images=functools.partial(
            augment.train_images, padding=1, flip=True, brightness=0.0, **pixels
        )
        if augmented
        else lambda images, key, rows: tested(images),
        test_images=tested,
        meta=steps.Meta(optax.sgd(1.0), 2, 0.0, 1e-3, 10.0, "train", False)
        if meta
        else None,
    )


@functools.cache
def variables(head: str, dtype, seed: int) -> Any:
    """Of a fresh network, on the host."""
    model = TinyNet(CLASSES, dtype, head, proxies=3)
    init = jax.jit(functools.partial(model.init, train=False))
    found = init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1), dtype))
    return jax.device_get(found)


def network(program: steps.Program, dtype, seed=0, own=None, extra=None) -> Network:
    """A fresh network with what a method trains beside it, and what it keeps."""
    found = variables(program.model.head, dtype, seed)
    params = {**found["params"], **({OWN: own} if own else {})}
    return Network(params, found["batch_stats"], extra or {})


def example(
    program: steps.Program,
    dtype,
    seed=0,
    method="il_baseline",
    student: Mapping[str, Any] | None = None,
    teacher: Mapping[str, Any] | None = None,
) -> tuple:
    """State, context, data and a plan of UPDATES updates, the last batch partial.

    `student` and `teacher` may have `own` and `extra` of a method.
    """
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (40, 8, 8, 1)).astype(np.uint8)
    labels = rng.integers(0, SEEN, 40).astype(np.int32)
    trained = network(program, dtype, seed, **(student or {}))
    state = TrainState(
        trained,
        jax.device_get(program.optimizer.init(trained.params)),
        np.asarray(0.7, dtype),
        optax.sgd(1.0).init(np.asarray(0.7, dtype)),
    )
    positions = np.arange(CLASSES)
    old, seen = positions < OLD, positions < SEEN
    counts = np.where(old, 4.0, 30.0) * seen
    weights = {name: weight for name, (_, weight) in METHODS[method][1].items()}
    context = StepContext(
        log_prior=np.asarray(log_prior.balanced(counts.astype(dtype))),
        old=old,
        seen=seen,
        taught=old,
        counts=counts.astype(dtype),
        task_ids=np.zeros(CLASSES, np.int32),
        weights={
            term.name: np.asarray(weights.get(term.name, 1.0), dtype)
            for term in program.terms
        },
        update_scale=optim.update_scale(trained.params, EVERY_GROUP, seen),
        teacher=network(program, dtype, seed + 1, **(teacher or {})),
        decay=np.asarray(1.0, dtype),
    )
    indices = rng.integers(0, 40, (UPDATES, BATCH)).astype(np.int32)
    valid = np.ones((UPDATES, BATCH), np.float32)
    valid[-1, 5:] = 0  # fewer valid rows than devices
    numbers = np.broadcast_to(np.arange(BATCH, dtype=np.int32), indices.shape)
    constant = np.ones(UPDATES, np.int32)
    schedule = Schedule(
        3 * constant,
        constant,
        constant,
        np.arange(UPDATES, dtype=np.int32),
        0.05 * np.ones(UPDATES, dtype),
    )
    held = rng.integers(0, 40, (2, BATCH)).astype(np.int32)
    streams = {TRAIN: Rows(indices, valid, numbers)}
    if program.meta is not None:
        streams[HELD_OUT] = Rows(held, np.ones(held.shape, np.float32), numbers[:2])
    return state, context, Images(images, labels), schedule, streams


def fast(function: Callable) -> Callable:
    """A jitted function, compiled in less time for the shapes of its first call."""
    program = None

    def call(*arguments):
        nonlocal program
        if program is None:
            program = function.lower(*arguments).compile(compiler_options=FAST)
        return program(*arguments)

    return call


def jitted(function: Callable, *arguments):
    """What a function returns for arrays, compiled for this one call."""
    arguments = jax.tree.map(jnp.asarray, arguments)
    return jax.device_get(fast(jax.jit(function))(*arguments))


def compiled(program: steps.Program, mode: str, devices) -> Callable:
    """One call of `program` on host arrays, compiled for the shapes of its first."""
    place = parallel.create(mode, devices)
    make = updates.make_meta_update if program.meta else updates.make_train_update
    update = fast(
        parallel.compile_step(
            place,
            make(program),
            name="update",
            inputs=("replicated",) * 5 + ("batch",),
            outputs=("replicated", "replicated"),
        )
    )

    def run(state, context, data, schedule, streams, count=None):
        count = np.int32(len(streams[TRAIN].indices) if count is None else count)
        values = parallel.replicate(place, (state, context, data, count, schedule))
        return jax.device_get(update(*values, parallel.shard(place, streams)))

    return run


def run(program: steps.Program, mode: str, devices, arguments):
    """Compiles and runs one call; returns host arrays."""
    return compiled(program, mode, devices)(*arguments)


@functools.cache
def on_one(dtype, meta=True, method="il_baseline", augmented=True) -> Callable:
    """`compiled` of `program` on one device, shared."""
    tested = program(dtype, meta, method, augmented)
    return compiled(tested, "jit", jax.devices()[:1])


def stepped(program: steps.Program) -> Callable:
    """One `train_step` after another, without a loop and keys; compiles in no time."""
    step = fast(jax.jit(functools.partial(steps.train_step, program)))

    def run(state, context, data, schedule, streams):
        losses = []
        for u, rate in enumerate(schedule.learning_rate):
            batch = batch_of(program, data, streams[TRAIN], u)
            state, metrics = step(state, context, batch, rate)
            losses.append(float(metrics["loss"]))
        return jax.device_get(state), losses

    return run


@functools.cache
def plain_steps(dtype, method: str) -> Callable:
    """`stepped` of `program` without Meta and augmentation, shared."""
    return stepped(program(dtype, False, method, False))


def batch_of(program: steps.Program, data: Images, rows: Rows, update: int, seed=0):
    """The batch of one update, augmented."""
    rows = jax.tree.map(jnp.asarray, rows)
    return steps.fetch(program, data, rows, update, jax.random.key(seed))


def paths(tree) -> dict[str, np.ndarray]:
    """Every array of a tree by its path."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_close(a, b, rtol):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    found, expected = paths(a), paths(b)
    for path, leaf in found.items():
        np.testing.assert_allclose(
            leaf, expected[path], rtol=rtol, atol=rtol, err_msg=path
        )
