"""One of two processes with four devices each: tests/test_processes.py starts it.

    python -m tests.process_worker ADDRESS PROCESS FOLDER

Every process writes what it found to FOLDER/PROCESS.npz.
"""

import pathlib
import sys

import jax
import numpy as np

from bsce_jax.compute import parallel
from bsce_jax.compute.state import Images
from bsce_jax.hosts import join
from bsce_jax.run import evaluate, feed, programs
from tests import test_steps
from tests.tiny import TinyNet

# Every loss; Meta or not. Each of these compiles for half a minute.
CASES = [
    ("il_baseline", "pmap", True),
    ("lucir", "jit", True),
    ("podnet", "jit", True),
    ("table6", "jit", False),
]
IMAGES, BATCH = 41, 12  # neither is a multiple of the devices


def update(method: str, mode: str, meta: bool, devices: list) -> dict[str, np.ndarray]:
    """The state and metrics after three updates, float64, by the path of each leaf."""
    tested = test_steps.program(np.float64, meta, method)
    arguments = test_steps.example(tested, np.float64, method=method)
    return named(test_steps.run(tested, mode, devices, arguments))


def named(tree) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def whole_set(mode: str, devices: list) -> dict[str, np.ndarray]:
    """Predictions, features and exemplars of a set with a partial last batch."""
    place = parallel.create(mode, devices)
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (IMAGES, 8, 8, 1)).astype(np.uint8)
    labels = (np.arange(IMAGES) % test_steps.CLASSES).astype(np.int32)
    tested = test_steps.program(np.float32, False)
    built = built_for(place, tested)
    network = TinyNet(test_steps.CLASSES).init(
        jax.random.key(3), np.zeros((1, 8, 8, 1), np.float32), train=False
    )
    network = parallel.replicate(place, jax.device_get(network))
    params, stats = network["params"], network["batch_stats"]
    data = feed.Resident(place, parallel.replicate(place, Images(images, labels)))
    seen = parallel.replicate(place, np.ones(test_steps.CLASSES, bool))
    order = rng.permutation(IMAGES)
    found = evaluate.predict(built, params, stats, seen, data, order, BATCH)
    by_class = [np.flatnonzero(labels == c) for c in range(test_steps.CLASSES)]
    most = (built, params, stats, data, by_class, "herding", 4, 4, IMAGES, BATCH)
    exemplars = evaluate.select_exemplars(*most, np.random.default_rng(0))
    return {**found._asdict(), "exemplars": np.stack(exemplars)}


def built_for(place: parallel.Parallel, tested) -> programs.Programs:
    """The evaluation programs alone."""
    from bsce_jax.compute import steps

    def compiled(function, name, outputs):
        kinds: list = ["replicated"] * 4 + ["batch"]
        return parallel.compile_step(
            place, function, name=name, inputs=kinds, outputs=("batch",) * outputs
        )

    nothing: dict = dict.fromkeys(
        (f for f in programs.Programs.__dataclass_fields__), None
    )
    nothing["parallel"] = place
    nothing["evaluate"] = compiled(steps.make_evaluate(tested), "evaluate", 4)
    nothing["features"] = compiled(steps.make_features(tested), "features", 2)
    return programs.Programs(**nothing)


def everything(devices: list) -> dict[str, np.ndarray]:
    found = {}
    for mode in ("jit", "pmap"):
        values = whole_set(mode, devices)
        found |= {f"whole set {mode} {k}": v for k, v in values.items()}
    with jax.enable_x64(True):
        for method, mode, meta in CASES:
            for name, value in update(method, mode, meta, devices).items():
                found[f"{method} {mode} {name}"] = value
    return found


def main() -> None:
    address, process, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    peers = join.join(join.Address(address, 2, process), 60.0)
    assert peers is not None and jax.device_count() == 8
    found = everything(jax.devices())
    place = parallel.create("jit")
    found["largest"] = np.asarray(parallel.largest(place, (process, 7 - process)))
    found["local rows"] = parallel.local_rows(place, 13)
    np.savez(folder / f"{process}.npz", **found)
    peers.close()


if __name__ == "__main__":
    main()
