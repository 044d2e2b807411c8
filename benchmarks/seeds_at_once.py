"""Whether one device trains several seeds faster at once than one after another.

The incremental step of problem.py on S networks, each with its own teacher, batches and
random numbers, against S calls of the plain program (`in_turn`):

    vmapped  one program with an axis of networks; convolutions become grouped ones
    copies   one program with the update S times, which a GPU may run side by side

Prints JSON: images/s of all S together, and the ratio of each to `in_turn` (more than
1: it pays).

    python benchmarks/seeds_at_once.py [--method lucir] --output seeds.json
"""

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import meta_gradient
import numpy as np
import problem

from bsce_jax.compute import updates
from bsce_jax.compute.state import PyTree
from bsce_jax.run import loop
from bsce_jax.run.programs import main_program

WAYS = ("vmapped", "copies")
REDUCED = {"seeds": [1, 2], "updates": 2, "repeats": 2}


def arguments(p: problem.Problem, seed: int, count: int) -> tuple[PyTree, ...]:
    """State, context, data, count, schedule and rows of `count` updates of a seed."""
    plan = dataclasses.replace(p.plan, seed=seed)
    echo = dataclasses.replace(p.programs, incremental_update=lambda *given: given)
    return loop.call(echo, p.progress.state, p.context, p.run.train, plan, 0, count)


def contestant(
    update: Any, given: list[tuple[PyTree, ...]], calls: int
) -> Callable[[], None]:
    """What makes `calls` calls of a compiled update for each of `given`, and waits."""
    states = [jax.tree.map(jnp.copy, state) for state, *_ in given]

    def run() -> None:
        for _ in range(calls):
            for i, (_, *rest) in enumerate(given):
                states[i], _ = update(states[i], *rest)
        jax.block_until_ready(states)

    return run


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compiles and times each way with each number of seeds."""
    p = problem.make(options.method, options.prior, options.dtype, options.sizes)
    count = min(p.programs.updates_per_call, options.updates)
    calls = options.updates // count
    update = updates.make_train_update(main_program(p.run.config, p.programs.model))
    each = [arguments(p, seed, count) for seed in range(max(options.seeds))]
    plain = jax.jit(update, donate_argnums=0).lower(*each[0]).compile()
    axes = (0, 0, None, None, 0, 0)  # one data set, and as many updates for all
    programs = {
        "vmapped": jax.vmap(update, axes),
        "copies": functools.partial(_copies, update),
    }
    runs, facts = {}, {}
    for seeds in options.seeds:
        runs[f"in_turn/{seeds}"] = contestant(plain, each[:seeds], calls)
        parts = list(zip(*each[:seeds], strict=True))
        stacked = tuple(
            p[0] if axis is None else jax.tree.map(lambda *x: jnp.stack(x), *p)
            for axis, p in zip(axes, parts, strict=True)
        )
        for way in options.ways:
            given = stacked if way == "vmapped" else tuple(parts)
            start = time.perf_counter()
            jitted = jax.jit(programs[way], donate_argnums=0)
            built = jitted.lower(*given).compile()
            used: Any = built.memory_analysis()
            facts[way, seeds] = {
                "compile_s": round(time.perf_counter() - start, 1),
                "temp_mib": round(used.temp_size_in_bytes / 2**20, 1),
            }
            runs[f"{way}/{seeds}"] = contestant(built, [given], calls)
    times = meta_gradient.interleaved(runs, options.repeats)
    images, found = count * calls * p.plan.batch_size, []
    for seeds, way in itertools.product(options.seeds, options.ways):
        turn, once = (times[f"{name}/{seeds}"][:, 0] for name in ("in_turn", way))
        rates = [1e3 * images * seeds / np.median(ms) for ms in (turn, once)]
        found.append(
            {
                "way": way,
                "seeds": seeds,
                "in_turn_images_per_s": round(rates[0], 1),
                "at_once_images_per_s": round(rates[1], 1),
                "ratio": round(np.median(turn / once), 3),
                **facts[way, seeds],
            }
        )
    return found


def _copies(update: Any, states: Any, *rest: Any) -> tuple[Any, Any]:
    """The update of each state with its own arguments, in one program."""
    found = [update(*given) for given in zip(states, *rest, strict=True)]
    return tuple(state for state, _ in found), [metrics for _, metrics in found]


def parse() -> argparse.Namespace:
    """Reads the flags; fills in what depends on the device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--method", default="il_baseline")
    add("--prior", default="balanced", help="any but meta")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--seeds", type=int, nargs="+", default=[1, 2, 4, 8])
    add("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    add("--updates", type=int, default=0, help="in a round; 0: 2 on CPU, else 100")
    add("--repeats", type=int, default=5, help="rounds")
    add("--reduced", action="store_true", help="tiny sizes")
    add("--output", help="file for the JSON; else standard output")
    options = meta_gradient.parse_reducible(parser, REDUCED)
    on_cpu = jax.default_backend() == "cpu"
    options.updates = options.updates or (2 if on_cpu else 100)
    options.sizes = problem.sizes(options.reduced)
    return options


def main() -> None:
    """Measures, prints or writes JSON."""
    options = parse()
    result = {"benchmark": "several seeds at once", "results": measure(options)}
    meta_gradient.report(result, options)


if __name__ == "__main__":
    main()
