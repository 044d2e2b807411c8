"""Host memory of a streamed run, epoch after epoch: it must not grow.

    python benchmarks/host_memory.py --images FOLDER --epochs 12 --output memory.json

FOLDER holds one folder of JPEG files a class. It is prepared as a data set in a
temporary folder; then a small network trains on it, decoding with --workers processes.
Resident memory (proportional set size, the decoding processes' included) is read at
the end of each epoch.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=pathlib.Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--pixels", type=int, default=64, help="side of the crops")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, help="JSON file")
    return parser.parse_args(arguments)


def memory() -> float:
    """MiB of this process and its children."""
    total, pending = 0, [os.getpid()]
    while pending:
        folder = pathlib.Path(f"/proc/{pending.pop()}")
        try:
            for line in (folder / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
            for task in (folder / "task").iterdir():
                pending += map(int, (task / "children").read_text().split())
        except OSError:  # it has just ended
            continue
    return total / 1024


def train(options: argparse.Namespace, folder: pathlib.Path) -> list[float]:
    """MiB at the end of each epoch."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import problem
    from etils import epath

    from bsce_jax.compute import parallel
    from bsce_jax.config.resolve import resolve
    from bsce_jax.data import streaming
    from bsce_jax.data.builders import image_folder
    from bsce_jax.run import loop, phases, setup
    from bsce_jax.run.context import phase_context
    from bsce_jax.run.progress import initial

    image_folder.prepare("images", folder, options.images)
    streaming.MANY = 0  # processes for few images, too
    config = problem.load("image_folder", "data=images,steps=1,memory=0")
    data = config.data
    data.data_dir = str(folder)
    data.image_size, data.resize, data.padding = options.pixels, 0, 0
    data.workers = options.workers
    config.model.name, config.model.width = "resnet8", 4
    config.optim.batch_size, config.phase.base.epochs = 64, options.epochs
    run = setup.prepare(resolve(config), epath.Path(folder / "run"))
    progress = initial(run)
    data = phases.planned(run.config, run.dataset)[0]
    training = loop.make_training(run.config, data)
    context = phase_context(run.config, run.dataset, data, progress.state.network)
    found: list[float] = []

    def after_call(history: loop.History, images: int) -> None:
        if history.updates % training.updates_per_epoch == 0:
            found.append(memory())
            print(f"epoch {len(found):3d}: {found[-1]:.1f} MiB", flush=True)

    state = loop.fit(
        loop.Loop(run.programs, run.train, training),
        progress.state,
        parallel.replicate(run.devices, context),
        loop.History(),
        dataclasses.replace(problem.UNWATCHED, after_call=after_call),
    )
    jax.block_until_ready(state)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = train(options, pathlib.Path(folder))
    settled = found[1:]  # the first epoch compiles and opens files
    growth = (settled[-1] - settled[0]) / max(1, len(settled) - 1)
    report = {
        "mebibytes": found,
        "growth_per_epoch": growth,
        "workers": options.workers,
        "pixels": options.pixels,
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=1))
    print(f"{growth:+.2f} MiB an epoch after the first")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    sys.exit(main())
