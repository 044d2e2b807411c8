"""Time and memory of the gradient of alpha, relative to a plain training step.

Four programs are compiled from the package's own steps and timed in turn, so that
other load on the machine meets all of them:

    train_step            one update of the network (the unit)
    gradient_forward      one update of alpha alone, derivative in forward mode
    gradient_reverse      the same in reverse mode, the literal nested gradient
    alpha_and_train_step  alpha in forward mode, then the network, in one program

Network and losses are those of a method of configs/methods/ on CIFAR-100 (--method; a
prior has taken the place of its own classification loss), with a teacher. Prints JSON:
milliseconds, XLA's temporary memory and the ratios of both to train_step: `time_ratio`
is the median over the rounds, `time_ratio_of_minima` that of the fastest rounds,
`cpu_time_ratio` the median for the time of all threads, which other load changes least
(of no use on a GPU).

    python benchmarks/meta_gradient.py --output meta.json

On CPU it measures twice: with one convolution a layer, and with the batch chunks that
training uses there (see bsce_jax/models/convolution.py).
"""

import argparse
import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import problem
from etils import epath
from ml_collections import ConfigDict

from bsce_jax import log_prior, meta_alpha, models
from bsce_jax.compute import optim, parallel, steps
from bsce_jax.compute.state import Batch, Network, PyTree, StepContext, TrainState
from bsce_jax.config import terms
from bsce_jax.config.resolve import resolve
from bsce_jax.report import results as results_file
from bsce_jax.run import phases, programs
from bsce_jax.telemetry import environment

CLASSES = 100
OLD, SEEN = 0.5, 0.6  # share of the classes: the first of 5 steps after half of them
IMAGES_OLD, IMAGES_NEW = 18, 500  # a class, with 2 of 20 exemplars held out
PHASE = "incremental"
# At most this much more than a train step: what the method's cost is held to.
TARGETS = {
    "gradient_forward": {"time_ratio": 1.6, "memory_ratio": 1.1},
    "alpha_and_train_step": {"time_ratio": 2.4, "memory_ratio": 1.25},
}
REDUCED = {"model": "resnet8", "size": 8, "batch": 8, "repeats": 2, "conv_chunks": [1]}


def make_program(
    method: str, model: str, dtype: str, conv_chunks: int
) -> tuple[ConfigDict, steps.Program]:
    """A method on CIFAR-100 with Meta BalancedS-CE: configuration and static part."""
    config = problem.load("cifar100", f"method={method},prior=meta")
    config.model.name = model or config.model.name
    config.model.dtype, config.model.conv_chunks = dtype, conv_chunks
    config = resolve(config)
    one = parallel.create("jit", jax.devices()[:1])
    model = programs.build_model(config, one, CLASSES)
    return config, programs.phase_program(config, model, PHASE)


def make_problem(
    config: ConfigDict, program: steps.Program, network: Network
) -> tuple[TrainState, StepContext]:
    """State and context of a network's first incremental step."""
    alpha, meta = jnp.float32(1.0), config.meta
    state = TrainState(
        network=network,
        opt_state=program.optimizer.init(network.params),
        alpha=alpha,
        alpha_opt_state=optim.alpha_optimizer(meta.optimizer, meta.learning_rate).init(
            alpha
        ),
    )
    classes = program.model.num_classes
    positions = np.arange(classes)
    old, seen = positions < OLD * classes, positions < SEEN * classes
    counts = np.float32(np.where(old, IMAGES_OLD, IMAGES_NEW) * seen)
    phase = next(p for p in phases.configured(config) if p.name == PHASE)
    used = terms.of_phase(config.terms, config.phase[PHASE].terms)
    context = StepContext(
        log_prior=log_prior.balanced(counts),
        old=old,
        seen=seen,
        taught=old,
        counts=counts,
        task_ids=np.int32(~old),
        weights={
            name: np.float32(terms.weight(name, term, old.sum(), seen.sum()))
            for name, term in used.items()
        },
        update_scale=optim.update_scale(
            network.params, phase.rate, seen & ~old if phase.rows == "new" else seen
        ),
        teacher=jax.tree.map(jnp.flip, network),
        decay=np.float32(1.0),
    )
    return state, jax.device_put(context)


def random_batch(rows: int, size: int, dtype: str, seed: int) -> Batch:
    """Normalised random images of all seen classes of CIFAR-100."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(rows, size, size, 3))
    return Batch(
        images=jnp.asarray(images, jnp.dtype(dtype)),
        labels=jnp.asarray(rng.integers(0, int(SEEN * CLASSES), rows), jnp.int32),
        valid=jnp.ones(rows, jnp.float32),
    )


def functions(program: steps.Program) -> dict[str, Callable]:
    """The four programs; each takes (state, context, batch, held_out, learning_rate).

    Those that train return the new state, the others the new alpha.
    """

    def train_step(
        state: TrainState, context: StepContext, batch: Batch, _: Batch, rate: jax.Array
    ) -> TrainState:
        return steps.train_step(program, state, context, batch, rate)[0]

    def gradient(mode: str, *arguments: Any) -> jax.Array:
        # A run has forward mode alone; the other takes its place while JAX traces.
        other = functools.partial(meta_alpha.gradient, mode=mode)
        with mock.patch.object(meta_alpha, "gradient", other):
            return steps.meta_step(program, *arguments).alpha

    def alpha_and_train_step(
        state: TrainState,
        context: StepContext,
        batch: Batch,
        held_out: Batch,
        rate: jax.Array,
    ) -> TrainState:
        state = steps.meta_step(program, state, context, batch, held_out, rate)
        return steps.train_step(program, state, context, batch, rate)[0]

    return {
        "train_step": train_step,
        "gradient_forward": functools.partial(gradient, "forward"),
        "gradient_reverse": functools.partial(gradient, "reverse"),
        "alpha_and_train_step": alpha_and_train_step,
    }


def compile_program(
    function: Callable, trains: bool, arguments: tuple[PyTree, ...], calls: int
) -> tuple[Callable[[], None], dict[str, Any]]:
    """Compiles a program; returns what runs it and waits, and facts about it.

    Args:
      function: of `functions`.
      trains: whether it returns a state, whose buffers it then reuses.
      arguments: its arguments; the state is copied.
      calls: runs in a row, before waiting.
    """
    start = time.perf_counter()
    jitted = jax.jit(function, donate_argnums=0 if trains else ())
    compiled = jitted.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    used: Any = compiled.memory_analysis()
    facts = {"compile_s": round(seconds, 1), "temp_bytes": used.temp_size_in_bytes}
    state = jax.tree.map(jnp.copy, arguments[0])

    def run() -> None:
        nonlocal state
        for _ in range(calls):
            result = compiled(state, *arguments[1:])
            if trains:
                state = result
        jax.block_until_ready(result)
        if not np.isfinite(result.alpha if trains else result):
            sys.exit("error: alpha is not finite")

    return run, facts


def interleaved(
    runs: Mapping[str, Callable[[], None]], repeats: int
) -> dict[str, np.ndarray]:
    """Times all in turn, `repeats` rounds after a warm-up.

    Returns:
      [repeats, 2] of each: milliseconds, and milliseconds of all its threads on CPU.
    """
    clocks = (time.perf_counter, time.process_time)
    for run in runs.values():
        run()
    times: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = [clock() for clock in clocks]
            run()
            pairs = zip(clocks, start, strict=True)
            times[name].append([1e3 * (clock() - s) for clock, s in pairs])
    return {name: np.array(values) for name, values in times.items()}


def measure(options: argparse.Namespace, conv_chunks: int) -> dict[str, Any]:
    """Compiles and times the four programs with one setting of the convolutions."""
    config, program = make_program(
        options.method, options.model, options.dtype, conv_chunks
    )
    shape = (options.size, options.size, 3)
    network = programs.init_network(config, program.model, shape)
    arguments = (
        *make_problem(config, program, network),
        random_batch(options.batch, options.size, options.dtype, seed=0),
        random_batch(options.batch, options.size, options.dtype, seed=1),
        jnp.float32(0.1),
    )
    compiled = {
        name: compile_program(function, "train" in name, arguments, options.calls)
        for name, function in functions(program).items()
    }
    runs = {name: run for name, (run, _) in compiled.items()}
    times = interleaved(runs, options.repeats)
    unit, unit_bytes = times["train_step"], compiled["train_step"][1]["temp_bytes"]
    found: dict[str, Any] = {"conv_chunks": conv_chunks}
    for name, (_, facts) in compiled.items():
        ms, (ratio, cpu_ratio) = (
            times[name][:, 0],
            np.median(times[name] / unit, axis=0),
        )
        found[name] = {
            "ms_median": round(np.median(ms) / options.calls, 3),
            "ms_min": round(ms.min() / options.calls, 3),
            "time_ratio": round(ratio, 3),
            "time_ratio_of_minima": round(ms.min() / unit[:, 0].min(), 3),
            "cpu_time_ratio": round(cpu_ratio, 3),
            "temp_mib": round(facts["temp_bytes"] / 2**20, 1),
            "memory_ratio": round(facts["temp_bytes"] / unit_bytes, 3),
            "compile_s": facts["compile_s"],
        }
    return found


def parse_reducible(
    parser: argparse.ArgumentParser, reduced: Mapping[str, Any]
) -> argparse.Namespace:
    """Reads the flags; with --reduced the given defaults take the place of others.

    Ends the process where JAX_PLATFORMS names a GPU first and there is none: JAX takes
    the next one then and says nothing.
    """
    first = os.environ.get("JAX_PLATFORMS", "").partition(",")[0]
    if first == "cuda" and jax.default_backend() != "gpu":
        parser.exit(1, f"error: JAX_PLATFORMS={first},...: there is no GPU\n")
    if parser.parse_args().reduced:
        parser.set_defaults(**reduced)
    return parser.parse_args()


def parse() -> argparse.Namespace:
    """Reads the flags; fills in what depends on the device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="il_baseline")
    parser.add_argument("--model", default="", help="default: the method's")
    parser.add_argument("--size", type=int, default=32, help="of the images, pixels")
    parser.add_argument("--batch", type=int, default=128, help="images, of B_t too")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument(
        "--calls", type=int, default=0, help="in a round; 0: 1 on CPU, elsewhere 50"
    )
    parser.add_argument(
        "--conv_chunks", type=int, nargs="+", help="default: 1 and the device's default"
    )
    parser.add_argument("--reduced", action="store_true", help="tiny sizes")
    parser.add_argument("--output", help="file for the JSON; else standard output")
    options = parse_reducible(parser, REDUCED)
    platform = jax.default_backend()
    options.calls = options.calls or (1 if platform == "cpu" else 50)
    chunks = options.conv_chunks or [1, models.convolution.default_chunks(platform)]
    options.conv_chunks = sorted(set(chunks))
    return options


def report(result: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Prints JSON, or writes it to options.output: the result and what led to it."""
    full = {
        **result,
        "options": {k: v for k, v in vars(options).items() if k != "output"},
        "command": "python " + shlex.join(sys.argv),
        "environment": environment.environment(),
    }
    text = json.dumps(full, indent=2) + "\n"
    if options.output:
        results_file.replace(epath.Path(options.output), text)
    else:
        print(text, end="")


def main() -> None:
    """Measures with each setting of the convolutions, prints or writes JSON."""
    options = parse()
    results = [measure(options, chunks) for chunks in options.conv_chunks]
    report(
        {"benchmark": "gradient of alpha", "targets": TARGETS, "results": results},
        options,
    )


if __name__ == "__main__":
    main()
