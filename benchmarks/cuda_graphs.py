"""Speed of training with more or less of an update in CUDA graphs, in one process.

The first incremental step of CIFAR-100 B50 (problem.py) with BalancedS-CE, its update
compiled with each kind of `gpu_graphs` (bsce_jax/compute/graphs.py). Rounds of all
kinds follow one another, every other one in reverse:

    train   images/s of consecutive updates
    epoch   images/s of whole epochs, planning and metrics included

    python benchmarks/cuda_graphs.py --output graphs.json

`ratio` is the median over the rounds of a kind's rate over that of `default`.
"""

import argparse
from typing import Any

import jax
import meta_gradient
import problem
import speed

from bsce_jax.compute import graphs

TIMED = ("train", "epoch")
REDUCED = {"updates": 10, "rounds": 2}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Of each kind: seconds to compile, rates and ratios."""
    seconds, runs = {}, {}
    for kind in graphs.OPTIONS:
        p = problem.make(
            options.method,
            "balanced",
            options.dtype,
            options.sizes,
            options.updates_per_call,
            kind,
        )
        problem.compile_all(p)
        update = problem.programs_of(p.programs)["incremental_update"]
        seconds[kind] = round(update.seconds, 2)
        found = speed.contestants(p, options.updates)
        for name in TIMED:
            found[name]()
            runs[f"{kind}/{name}"] = found[name]
    *_, rates = speed.interleaved(runs, options.rounds)
    usual = {name: {"default": rates[f"default/{name}"]} for name in TIMED}
    return [
        {
            "graphs": kind,
            "compile_s": seconds[kind],
            **{n: speed.figures(rates[f"{kind}/{n}"], usual[n]) for n in TIMED},
        }
        for kind in graphs.OPTIONS
    ]


def parse() -> argparse.Namespace:
    """Reads the flags; fills in what depends on the device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--method", default="il_baseline", choices=speed.PRIORS)
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    add("--updates", type=int, default=0, help="in a round; 0: 10 on CPU, else 500")
    add("--rounds", type=int, default=5)
    add("--updates_per_call", type=int, default=0, help="0: the package's default")
    add("--reduced", action="store_true", help="tiny sizes")
    add("--output", help="file for the JSON; else standard output")
    options = meta_gradient.parse_reducible(parser, REDUCED)
    options.updates = options.updates or (10 if jax.default_backend() == "cpu" else 500)
    options.sizes = problem.sizes(options.reduced)
    return options


def main() -> None:
    """Measures all kinds, prints or writes JSON."""
    options = parse()
    results = measure(options)
    meta_gradient.report({"benchmark": "CUDA graphs", "results": results}, options)


if __name__ == "__main__":
    main()
