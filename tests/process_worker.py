"""One of two processes with four devices each: tests/test_processes.py starts it.

    python -m tests.process_worker ADDRESS PROCESS FOLDER few|all

Every process writes what it found to FOLDER/PROCESS.npz.
"""

import pathlib
import sys

import jax
import numpy as np

from bsce_jax.compute import inference, parallel
from bsce_jax.compute.state import Images
from bsce_jax.hosts import join
from bsce_jax.run import context, evaluate, feed, programs
from tests import step_example

# Every loss; Meta or not. Whole runs of two processes use jit: see test_processes.py.
CASES = {
    "few": [("il_baseline", "pmap", False)],
    "all": [
        ("il_baseline", "pmap", True),
        ("lucir", "jit", True),
        ("podnet", "jit", True),
        ("table6", "jit", False),
    ],
}
IMAGES, BATCH = 41, 12  # neither is a multiple of the devices


def update(method: str, mode: str, meta: bool, devices: list) -> dict[str, np.ndarray]:
    """The state and metrics after three updates, float64, by the path of each leaf."""
    tested = step_example.program(np.float64, meta, method)
    arguments = step_example.example(tested, np.float64, method=method)
    return step_example.paths(step_example.run(tested, mode, devices, arguments))


def whole_set(mode: str, devices: list) -> dict[str, np.ndarray]:
    """Predictions and features by class of a set with a partial last batch."""
    place = parallel.create(mode, devices)
    rng, classes = np.random.default_rng(5), step_example.CLASSES
    images = rng.integers(0, 256, (IMAGES, 8, 8, 1)).astype(np.uint8)
    labels = (np.arange(IMAGES) % classes).astype(np.int32)
    tested = step_example.program(np.float32, False)
    network = step_example.network(tested, np.float32, 3)
    inference = evaluate.Inference(
        programs=built_for(place, tested),
        feed=feed.Resident(place, parallel.replicate(place, Images(images, labels))),
        batch_size=BATCH,
        network=parallel.replicate(place, network),
        context=parallel.replicate(place, context.test_context(classes, [classes])),
    )
    found = evaluate.predict(inference, rng.permutation(IMAGES))
    by_class = [np.flatnonzero(labels == c) for c in range(classes)]
    groups = evaluate.features_by_group(inference, by_class, "mirrored")
    mirrored = {f"mirrored {c}": features for c, (_, features) in enumerate(groups)}
    return found._asdict() | mirrored


def built_for(place: parallel.Parallel, tested) -> programs.Programs:
    """The evaluation programs alone."""

    def compiled(function, name, whole, outputs):
        return parallel.compile_step(
            place,
            function,
            name=name,
            inputs=("replicated",) * whole + ("batch",),
            outputs=("batch",) * outputs,
        )

    fields = programs.Programs.__dataclass_fields__
    nothing: dict = dict.fromkeys(fields, None)
    nothing["devices"] = place
    nothing["evaluate"] = compiled(inference.make_evaluate(tested), "evaluate", 3, 4)
    nothing["features"] = compiled(inference.make_features(tested), "features", 4, 2)
    return programs.Programs(**nothing)


def everything(devices: list, cases: str) -> dict[str, np.ndarray]:
    found = {}
    for mode in ("pmap",) if cases == "few" else ("jit", "pmap"):
        values = whole_set(mode, devices)
        found |= {f"whole set {mode} {k}": v for k, v in values.items()}
    with jax.enable_x64(True):
        for method, mode, meta in CASES[cases]:
            for name, value in update(method, mode, meta, devices).items():
                found[f"{method} {mode} {name}"] = value
    return found


def main() -> None:
    address, process, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    peers = join.join(join.Address(address, 2, process), 60.0)
    assert peers is not None and jax.device_count() == 8
    # Compiled ahead of time pmap takes the shapes of one process for those of all.
    step_example.fast = lambda function: function
    found = everything(jax.devices(), sys.argv[4])
    place = parallel.create("jit")
    found["largest"] = np.asarray(parallel.largest(place, (process, 7 - process)))
    found["local rows"] = parallel.local_rows(place, 13)
    np.savez(folder / f"{process}.npz", **found)
    peers.close()


if __name__ == "__main__":
    main()
