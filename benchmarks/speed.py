"""Speed of every method and prior against PyTorch, and against the device's limits.

The first incremental step of CIFAR-100 B50 (problem.py), with the package's own
programs and loops, data resident. Rounds of everything that is compared follow one
another, every other one in reverse, and each number is the median over the rounds:

    train      images/s of consecutive updates (with Meta one of alpha in ten)
    epoch      images/s of whole epochs, planning and metrics included
    evaluate   images/s of predictions on the test images of the classes seen
    herding    classes/s, features included

Rivals in PyTorch (torch_rivals.py), same network and losses, of the method's first
prior: `eager`, `compile-default`, `compile-reduce-overhead` (CUDA), `loader` (its usual
data path, against `epoch`), `evaluate`, `herding`. A ratio is our speed over theirs.

    python benchmarks/speed.py --output speed.json --markdown
    python benchmarks/speed.py --check               # do both compute the same?
    python benchmarks/speed.py --methods podnet --dtypes bfloat16 --profile traces

The floor of an update is the longer of FLOPs / --tflops and bytes / --bandwidth, the
bytes being those of XLA's program (Compiled.cost_analysis), or null without these
flags; on an H100 SXM: bfloat16 989, float32 (TF32) 494 TFLOP/s, 3.35 TB/s.
"""

import argparse
import importlib.util
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import cost
import jax
import meta_gradient
import numpy as np
import problem
import profiles
import speed_table
import startup_time
from problem import Contestant, Problem
from rival_process import RivalError, Rivals

from bsce_jax import memory
from bsce_jax.compute import graphs
from bsce_jax.run import evaluate, hooks, loop

PRIORS = {
    "il_baseline": ("none", "balanced", "meta"),
    "lucir": ("none", "balanced"),
    "podnet": ("none", "balanced"),
}
# What each of ours is compared with.
AGAINST = {
    "train": ("eager", "compile-default", "compile-reduce-overhead"),
    "epoch": ("eager", "compile-default", "compile-reduce-overhead", "loader"),
    "evaluate": ("evaluate",),
    "herding": ("herding",),
}
REDUCED = {
    "updates": 10,
    "rounds": 2,
    "methods": ["il_baseline"],
    "dtypes": ["float32"],
    "rivals": ["eager", "loader", "evaluate", "herding"],
}


def contestants(p: Problem, updates: int) -> dict[str, Contestant]:
    """What is timed of a method and prior, by the names of AGAINST."""
    run, training, width = p.run, p.training, p.programs.updates_per_call
    # On a GPU one is a call or two: too short for what a run does between calls.
    epochs = 1 if jax.default_backend() == "cpu" else 10
    some_epochs = problem.slow(training, epochs)
    test = np.flatnonzero(run.dataset.test_labels < p.data.num_seen)
    first = 0

    def train() -> float:
        nonlocal first
        first = 0 if first + updates > training.updates else first
        images = problem.images_of(training, first, updates)
        for done in range(0, updates, width):
            p.train(first + done, min(width, updates - done))
        first += updates
        jax.block_until_ready(p.progress.state)
        return images

    def epoch() -> float:
        p.progress.state = loop.fit(
            loop.Loop(p.programs, run.train, some_epochs),
            p.progress.state,
            p.context,
            loop.History(),
            problem.UNWATCHED,
        )
        jax.block_until_ready(p.progress.state)
        return epochs * len(p.data.train)

    def predict() -> float:
        evaluate.predict(run.inference(run.test, p.progress.state.network, 1), test)
        return len(test)

    def herd() -> float:
        hooks.select_exemplars(run, p.progress)
        return len(run.dataset.groups[1])

    found = {"train": train, "epoch": epoch, "evaluate": predict, "herding": herd}
    return {name: timed(function) for name, function in found.items()}


def timed(function: Callable[[], float]) -> Contestant:
    """A contestant, of a function that waits and returns how much it has done."""

    def round_() -> tuple[float, float]:
        start = time.perf_counter()
        amount = function()
        return time.perf_counter() - start, amount

    return round_


def measure(
    method: str, dtype: str, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Everything of a method and type, its priors and rivals in turn.

    Yields the result after each round, and last with what is measured once: whatever
    ends the process, the rounds before it are not lost.
    """
    problems, runs, known = {}, {}, {}
    for prior in options.priors or PRIORS[method]:
        p = problems[prior] = problem.make(
            method,
            prior,
            dtype,
            options.sizes,
            options.updates_per_call,
            options.graphs,
        )
        problem.compile_all(p)
        for name, contestant in contestants(p, options.updates).items():
            contestant()
            runs[f"{prior}/{name}"] = contestant
        known[prior] = facts(p, options)
    first, rivals = next(iter(problems.values())), None
    if options.rivals and importlib.util.find_spec("torch"):
        try:
            spec = problem.rival_spec(first, max(5, options.updates // 10))
            rivals = Rivals(spec)
        except RivalError as error:
            print(f"no rivals: {error}", file=sys.stderr)
        for name in options.rivals if rivals else ():
            runs[f"torch/{name}"] = rivals.contestant(name)
    result: dict[str, Any] = {"method": method, "dtype": dtype}
    for rates in interleaved(runs, options.rounds):
        device = jax.devices()[0].memory_stats() or {}
        result |= {
            "priors": {
                prior: of_prior(p, known[prior], compared(prior, rates))
                for prior, p in problems.items()
            },
            "rounds": max(map(len, rates.values())),
            "more_time_percent": overheads(rates),
            "device_peak_bytes": device.get("peak_bytes_in_use"),
            "torch": rivals and rivals.known(rates),
        }
        yield result
    if rivals:
        rivals.close()
    if options.startup:
        result["seconds_to_first_update"] = startup_time.startup(
            method, dtype, options.sizes
        )
        yield result
    if options.profile:
        result["profile"] = profile(first, method, dtype, options)
    yield result


def of_prior(
    p: Problem, known: Mapping[str, Any], rates: Mapping[str, Any]
) -> dict[str, Any]:
    """Facts, rates and ratios of a prior, and the floor's share of an update's time."""
    found = {**known, **rates}
    if found["floor_s"]:
        update = p.training.batch_size / found["train"]["per_s"]
        found["share_of_floor"] = short(found["floor_s"] / update)
    return found


def compared(prior: str, rates: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A prior's rates, and their ratios to those of the rivals there are."""
    found = {}
    for name, others in AGAINST.items():
        rivals = {
            other: rates[f"torch/{other}"]
            for other in others
            if f"torch/{other}" in rates
        }
        found[name] = figures(rates[f"{prior}/{name}"], rivals)
    return found


def figures(own: np.ndarray, others: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Rates [rounds]: their median, all of them, and the median ratio to each other."""
    return {
        "per_s": short(np.median(own)),
        "rounds": [short(rate) for rate in own],
        "ratio": {name: short(np.median(own / rate)) for name, rate in others.items()},
    }


def interleaved(
    runs: dict[str, Contestant], rounds: int
) -> Iterator[dict[str, np.ndarray]]:
    """Rates [rounds so far] of all, after each round; without those that fail."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            try:
                seconds, amount = runs[name]()
            except RivalError as error:
                print(f"{name}: {error}", file=sys.stderr)
                del runs[name], rates[name]
                continue
            rates[name].append(amount / seconds)
        yield {name: np.array(values) for name, values in rates.items()}


def overheads(rates: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """More time of an update in percent, between the priors: median, least, most."""
    found = {}
    for prior, unit in (("balanced", "none"), ("meta", "balanced")):
        if f"{prior}/train" in rates and f"{unit}/train" in rates:
            more = 100 * (rates[f"{unit}/train"] / rates[f"{prior}/train"] - 1)
            summary = {
                "median": np.median(more),
                "least": more.min(),
                "most": more.max(),
            }
            found[f"{prior} over {unit}"] = {k: round(v, 2) for k, v in summary.items()}
    return found


def facts(p: Problem, options: argparse.Namespace) -> dict[str, Any]:
    """Compile times, memory, FLOPs and bytes of the programs of a problem."""
    programs = problem.programs_of(p.programs)
    seconds = {name: round(f.seconds, 2) for name, f in programs.items()}
    # jit keeps what it has compiled, so this one is compiled again.
    images, size = p.run.dataset.images_per_class.max(), p.programs.model.widths[-1]
    shapes = [((images, size), np.float32), ((images,), bool)]
    start = time.perf_counter()
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    memory.herd_padded.lower(*arguments, m=p.run.config.memory.per_class).compile()
    seconds["herd"] = round(time.perf_counter() - start, 2)
    largest = programs.get("incremental_meta_update") or programs["incremental_update"]
    used, totals = largest.compiled.memory_analysis(), (0.0, 0.0)
    if "incremental_update" in programs:  # absent where updates of alpha are in a loop
        totals = cost.flops_and_bytes(*programs["incremental_update"].one_update())
    flops, moved = totals
    floor = None
    peak = options.tflops.get(p.run.config.model.dtype)
    if flops and moved and peak and options.bandwidth:
        floor = max(flops / (1e12 * peak), moved / (1e12 * options.bandwidth))
    return {
        "compile_s": seconds,
        "temp_bytes": used.temp_size_in_bytes,
        "argument_bytes": used.argument_size_in_bytes,
        "update_flops": flops or None,
        "update_bytes": moved or None,
        "floor_s": floor,
        "updates_per_call": p.programs.updates_per_call,
        "graphs": options.graphs,
    }


def profile(
    p: Problem, method: str, dtype: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Traces 20 updates; prints and returns where their time goes."""
    run = contestants(p, 20)["train"]
    run()
    found = profiles.trace(pathlib.Path(options.profile), run)
    rest = ", ".join(f"{k} {v}" for k, v in found.items() if k != "hottest")
    print(f"{method} {dtype}, 20 updates: {rest}", file=sys.stderr)
    print("      runs         ms percent  operation", file=sys.stderr)
    for name, times, ms, percent in found["hottest"]:
        print(f"{times:10d} {ms:10.2f} {percent:7.1f}  {name}", file=sys.stderr)
    return found


def short(value: float) -> float:
    """The number to four digits."""
    return float(f"{value:.4g}")


def parse() -> argparse.Namespace:
    """Reads the flags; fills in what depends on the device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--methods", nargs="+", default=list(PRIORS), choices=PRIORS)
    add("--priors", nargs="+", default=[], help="default: those of PRIORS")
    dtypes = ("float32", "bfloat16")
    add("--dtypes", nargs="+", default=list(dtypes), choices=dtypes)
    add("--rivals", nargs="*", help="default: all of AGAINST that the device has")
    add("--updates", type=int, default=0, help="in a round; 0: 10 on CPU, else 500")
    add("--rounds", type=int, default=5)
    add("--updates_per_call", type=int, default=0, help="0: the package's default")
    add("--graphs", default="default", choices=graphs.OPTIONS, help="CUDA graphs")
    add("--tflops", nargs="*", default=[], metavar="TYPE=NUMBER", help="peak rates")
    add("--bandwidth", type=float, default=0, help="peak, TB/s")
    add("--startup", action=argparse.BooleanOptionalAction, default=True)
    add("--check", action="store_true", help="compare losses with PyTorch and stop")
    add("--profile", default="", metavar="DIR", help="also trace 20 updates")
    add("--markdown", action="store_true", help="also print a table, to stderr")
    add("--reduced", action="store_true", help="tiny sizes")
    add("--output", help="file for the JSON; else standard output")
    options = meta_gradient.parse_reducible(parser, REDUCED)
    on_cpu = jax.default_backend() == "cpu"
    options.updates = options.updates or (10 if on_cpu else 500)
    if options.updates % 10:
        parser.error("--updates: expected a multiple of 10, Meta's period")
    if options.rivals is None:
        options.rivals = dict.fromkeys(itertools.chain(*AGAINST.values()))
        if on_cpu:
            del options.rivals["compile-reduce-overhead"]
        options.rivals = list(options.rivals)
    options.tflops = {k: float(v) for k, v in (x.split("=") for x in options.tflops)}
    options.sizes = problem.sizes(options.reduced, on_cpu or options.check)
    return options


def main() -> None:
    """Measures all that was asked for, prints or writes JSON."""
    # Half of a GPU's memory stays for the other library.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    options = parse()
    if options.check:
        import check_rivals

        right = check_rivals.check(options.methods, options.priors, options.sizes)
        sys.exit(0 if right else "error: the losses differ")
    results: list[dict[str, Any]] = []
    for pair in itertools.product(options.methods, options.dtypes):
        for result in measure(*pair, options):
            so_far = {"benchmark": "speed", "results": [*results, result]}
            if options.output:  # at every round: a command may only last so long
                meta_gradient.report(so_far, options)
        results.append(result)
    if not options.output:
        meta_gradient.report({"benchmark": "speed", "results": results}, options)
    if options.markdown:
        print(speed_table.markdown(results), file=sys.stderr)


if __name__ == "__main__":
    main()
