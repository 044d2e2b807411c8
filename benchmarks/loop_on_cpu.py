"""Whether a compiled loop of updates is still slow on CPU: guards a design decision.

On accelerators one call runs many updates in a compiled loop, which spares the host.
On CPU one call runs one update, because XLA:CPU has no fast path for the backward
pass of a convolution inside a loop. This measures both ways to run the same updates
(`updates.make_train_update`), one after the other, and prints JSON: milliseconds an
update, and `ratio`, the loop's time over the host's.

    python benchmarks/loop_on_cpu.py

When this was written the ratio was 8, and 20 with --conv_chunks 1. If it comes near 1,
XLA:CPU has learned it: then raise the number that `programs.updates_per_call` returns
for the platform "cpu" (calls cost the host about a millisecond each), and drop the
special case for one update from `make_train_update` and `make_meta_update`.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import meta_gradient
import numpy as np

from bsce_jax import models
from bsce_jax.compute import steps, updates
from bsce_jax.compute.state import TRAIN, Images, PyTree, Rows, Schedule
from bsce_jax.run import programs

REDUCED = {"size": 8, "batch": 8, "updates": 3, "repeats": 2, "conv_chunks": 1}


def random_images(count: int, size: int) -> Images:
    """A random data set of the classes seen, on the device."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, size, size, 3))
    labels = rng.integers(0, int(meta_gradient.SEEN * meta_gradient.CLASSES), count)
    return jax.device_put(Images(np.uint8(images), np.int32(labels)))


def plan(count: int, batch: int, images: int) -> tuple[Schedule, dict[str, Rows]]:
    """Random full batches for one call of `count` updates."""
    rng = np.random.default_rng(1)
    indices = np.int32(rng.integers(0, images, (count, batch)))
    ones = np.ones(count, np.int32)
    schedule = Schedule(
        seed=0 * ones,
        step=ones,
        epoch=0 * ones,
        update=np.arange(count, dtype=np.int32),
        learning_rate=np.full(count, 0.1, np.float32),
    )
    numbers = np.broadcast_to(np.arange(batch, dtype=np.int32), indices.shape)
    rows = Rows(indices, np.ones(indices.shape, np.float32), numbers)
    return jax.device_put((schedule, {TRAIN: rows}))


def compile_update(
    program: steps.Program, arguments: tuple[PyTree, ...], calls: int
) -> tuple[Callable[[], None], float]:
    """Compiles an update; returns what runs `calls` calls and waits, and seconds.

    Args:
      program: the static part.
      arguments: state, context, data, count, schedule and streams; the state is copied.
      calls: one for a loop, else the number of updates.
    """
    start = time.perf_counter()
    update = jax.jit(updates.make_train_update(program), donate_argnums=0)
    compiled = update.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    state = jax.tree.map(jnp.copy, arguments[0])

    def run() -> None:
        nonlocal state
        for _ in range(calls):
            state, metrics = compiled(state, *arguments[1:])
        jax.block_until_ready((state, metrics))

    return run, seconds


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Compiles and times both ways."""
    config, program = meta_gradient.make_program(
        "il_baseline", options.model, "float32", options.conv_chunks
    )
    shape = (options.size, options.size, 3)
    network = programs.init_network(config, program.model, shape)
    state, context = meta_gradient.make_problem(config, program, network)
    data = random_images(4 * options.batch, options.size)
    runs, found = {}, {}
    for name, count in (("host", 1), ("loop", options.updates)):
        planned = plan(count, options.batch, len(data.labels))
        arguments = (state, context, data, jnp.int32(count), *planned)
        calls = options.updates // count
        runs[name], seconds = compile_update(program, arguments, calls)
        found[name] = {"updates_per_call": count, "compile_s": round(seconds, 1)}
    times = meta_gradient.interleaved(runs, options.repeats)
    for name, values in times.items():
        ms = values[:, 0] / options.updates
        found[name]["ms_median"] = round(np.median(ms), 2)
        found[name]["ms_min"] = round(ms.min(), 2)
    ratio, cpu_ratio = np.median(times["loop"] / times["host"], axis=0)
    found |= {"ratio": round(ratio, 2), "cpu_time_ratio": round(cpu_ratio, 2)}
    return found


def main() -> None:
    """Reads the flags, measures, prints or writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--size", type=int, default=32, help="of the images, pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--updates", type=int, default=10, help="in the loop")
    parser.add_argument("--repeats", type=int, default=3, help="rounds over both")
    parser.add_argument("--conv_chunks", type=int, default=0, help="0: the default")
    parser.add_argument("--reduced", action="store_true", help="tiny sizes")
    parser.add_argument("--output", help="file for the JSON; else standard output")
    options = meta_gradient.parse_reducible(parser, REDUCED)
    jax.config.update("jax_platforms", "cpu")
    options.conv_chunks = options.conv_chunks or models.convolution.default_chunks(
        "cpu"
    )
    found = measure(options)
    result = {"benchmark": "compiled loop of updates on CPU", **found}
    meta_gradient.report(result, options)


if __name__ == "__main__":
    main()
