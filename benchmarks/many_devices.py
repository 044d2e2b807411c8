"""A training update on several CPU devices, by jit and by pmap, against one device.

    python benchmarks/many_devices.py --devices 8 --rounds 6 --output devices.json

The incremental update of IL-Baseline with Balanced Softmax on ResNet-32, the global
batch of 128 as it is on one device. The devices are forced on the cores there are: the
ratio says what dividing the batch costs or spares, not what a pod would give. The
three take turns in one process.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--updates", type=int, default=4, help="in a round")
    parser.add_argument("--reduced", action="store_true", help="a very small network")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Times, prints and writes; returns the exit status."""
    options = parse(arguments)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = str(options.devices)
    import jax
    import problem

    from bsce_jax.telemetry import environment

    sizes = problem.sizes(options.reduced)
    config = problem.configuration("il_baseline", "balanced", "float32", sizes)
    source = problem.dataset(config, sizes)

    def contestant(mode: str, devices: int) -> Callable[[], float]:
        """A round: milliseconds an update."""
        p = problem.place(config, source, devices, mode)

        def run() -> float:
            started = time.perf_counter()
            for update in range(options.updates):
                p.train(update, 1)
            jax.block_until_ready(p.progress.state)
            return 1000 * (time.perf_counter() - started) / options.updates

        return run

    names = {
        "one device": ("jit", 1),
        "jit": ("jit", options.devices),
        "pmap": ("pmap", options.devices),
    }
    rounds = {name: contestant(*how) for name, how in names.items()}
    for run in rounds.values():
        run()  # compiles
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, run in rounds.items():
            found[name].append(run())
    medians = {name: statistics.median(values) for name, values in found.items()}
    report = {
        "milliseconds": found,
        "median": medians,
        "time over one device": {
            name: medians[name] / medians["one device"] for name in ("jit", "pmap")
        },
        "devices": options.devices,
        "batch": config.optim.batch_size,
        "load_average": os.getloadavg(),
        **environment.environment(),
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=1))
    for name, median in medians.items():
        low, high = min(found[name]), max(found[name])
        print(f"{name:10}  {median:7.1f} ms  ({low:.1f} to {high:.1f})")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    sys.exit(main())
