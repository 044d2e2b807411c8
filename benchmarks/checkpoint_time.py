"""What a checkpoint costs: bytes, seconds, and how long the training waits for it.

    python benchmarks/checkpoint_time.py
    python benchmarks/checkpoint_time.py --folder gs://BUCKET/FOLDER

Of a state as in an incremental step (parameters, momentum, statistics and teacher) of
each network: bytes on the disk, seconds to save and to restore, and milliseconds that
the main thread stands still for a save in the foreground and for one in the background.
Then a loop of updates of a small network, round by round in turn without saving and
with background saves of the largest state: what a save takes from the loop in all,
the share of the processor included that hashing and writing need.

Prints JSON, and a line of text on standard error.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import meta_gradient
import numpy as np
import optax
from etils import epath
from flax import linen as nn

from bsce_jax import models
from bsce_jax.checkpoints import store
from bsce_jax.checkpoints.writer import Writer
from bsce_jax.compute import optim

NETWORKS = {"resnet18": (1000, 224), "resnet32": (100, 32)}  # classes, side of images
TARGET = {"loss_percent_at_10_minutes": 1.0}
REDUCED = {
    "networks": ["resnet8"],
    "repeats": 1,
    "rounds": 1,
    "updates": 4,
    "saves": 1,
    "batch": 4,
}


def run_state(network: str) -> dict[str, Any]:
    """What a run in an incremental step saves, on the device; random values."""
    classes, side = NETWORKS.get(network, (10, 32))
    model = models.create(network, classes)
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x, train=False), images
    )
    rng = np.random.default_rng(0)
    parts = {
        "params": shapes["params"],
        "momentum": shapes["params"],
        "batch_stats": shapes["batch_stats"],
        "teacher": dict(shapes),
    }
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32)), parts
    )


def seconds(action: Callable[..., Any], *arguments: Any) -> float:
    """Time that a call takes."""
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def size(folder: epath.Path) -> int:
    """Bytes of all files below a folder."""
    return sum(
        size(path) if path.is_dir() else path.stat().length for path in folder.iterdir()
    )


def measure_state(network: str, folder: epath.Path, repeats: int) -> dict[str, Any]:
    """Bytes, seconds and stalls of one network's state; medians over the repeats."""
    state = run_state(network)
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree))
    times: dict[str, list[float]] = {
        name: [] for name in ("save", "restore", "stall_async", "async_total")
    }
    with Writer() as writer:
        for number in range(0, 2 * repeats + 2, 2):  # the first ones warm up
            state = jax.block_until_ready(bump(state))  # nothing is on the host yet
            times["save"].append(seconds(store.save, folder, number, state, {}))
            times["restore"].append(seconds(store.restore, folder, number, state))
            state = jax.block_until_ready(bump(state))
            start = time.perf_counter()
            times["stall_async"].append(
                seconds(writer.save, folder, number + 1, state, {})
            )
            writer.wait()
            times["async_total"].append(time.perf_counter() - start)
    median = {k: float(np.median(v[1:])) for k, v in times.items()}
    return {
        "arrays_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        "arrays": len(jax.tree.leaves(state)),
        "disk_bytes": size(folder / str(2 * repeats + 1)),
        "save_s": round(median["save"], 3),
        "restore_s": round(median["restore"], 3),
        "stall_foreground_ms": round(1e3 * median["save"], 1),
        "stall_background_ms": round(1e3 * median["stall_async"], 1),
        "background_save_s": round(median["async_total"], 3),
    }


def make_update(batch: int) -> tuple[Callable[[Any], Any], Any]:
    """An update of a small network that reuses its state's buffers, and the state."""
    model: nn.Module = models.create("resnet8", 100)
    images = jax.random.normal(jax.random.key(1), (batch, 32, 32, 3))
    labels = jnp.arange(batch) % 100
    variables = model.init(jax.random.key(0), images, train=False)
    optimizer = optim.sgd(0.9, 5e-4)
    state = {**variables, "opt_state": optimizer.init(variables["params"])}

    def loss(params: Any, batch_stats: Any) -> tuple[jax.Array, Any]:
        (logits, _), changed = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), changed["batch_stats"]

    def update(state: Any) -> Any:
        grads, batch_stats = jax.grad(loss, has_aux=True)(
            state["params"], state["batch_stats"]
        )
        step, opt_state = optimizer.update(
            grads, state["opt_state"], state["params"], decay=1.0
        )
        params = jax.tree.map(lambda p, s: p - 0.01 * s, state["params"], step)
        return {"params": params, "batch_stats": batch_stats, "opt_state": opt_state}

    return jax.jit(update, donate_argnums=0), state


def measure_loop(
    network: str, folder: epath.Path, options: argparse.Namespace
) -> dict[str, Any]:
    """A loop of updates with background saves against the same loop without."""
    update, state = make_update(options.batch)
    saved, every, number = run_state(network), options.updates // options.saves, 0
    times: dict[bool, list[float]] = {False: [], True: []}
    stalls, writer = 0.0, Writer()

    def work(saving: bool) -> None:
        nonlocal state, number
        for i in range(options.updates):
            state = jax.block_until_ready(update(state))
            if saving and i % every == 0:
                writer.save(folder, number, saved, {})
                number += 1

    with writer:
        work(True)
        writer.wait()
        for _ in range(options.rounds):
            for saving in (False, True):
                before = writer.stalled
                times[saving].append(seconds(work, saving))
                writer.wait()
                stalls += writer.stalled - before
    alone, together = (float(np.median(times[saving])) for saving in (False, True))
    lost = (together - alone) / options.saves
    return {
        "network_saved": network,
        "updates_of_a_round": options.updates,
        "saves_of_a_round": options.saves,
        "update_ms": round(1e3 * alone / options.updates, 2),
        "round_s": {"without": round(alone, 3), "with_saves": round(together, 3)},
        "loss_percent_here": round(100 * (together / alone - 1), 2),
        "stall_ms_a_save": round(1e3 * stalls / options.saves / options.rounds, 1),
        "lost_ms_a_save": round(1e3 * lost, 1),
        "loss_percent_at_10_minutes": round(100 * lost / 600, 4),
    }


def measure(options: argparse.Namespace, folder: epath.Path) -> dict[str, Any]:
    """All networks' states, then the loop with the first one's."""
    for name in (*options.networks, "loop"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    states = {
        name: measure_state(name, folder / name, options.repeats)
        for name in options.networks
    }
    loop = measure_loop(options.networks[0], folder / "loop", options)
    return {"states": states, "loop": loop}


def summary(found: dict[str, Any]) -> str:
    """The result in a line."""
    parts = [
        f"{name}: {s['disk_bytes'] / 1e6:.0f} MB, save {s['save_s']:.2f} s, restore "
        f"{s['restore_s']:.2f} s, stall {s['stall_foreground_ms']:.0f} ms in the "
        f"foreground and {s['stall_background_ms']:.0f} ms in the background"
        for name, s in found["states"].items()
    ]
    loop = found["loop"]
    parts.append(
        f"a training loses {loop['lost_ms_a_save']:.0f} ms a background save, "
        f"{loop['loss_percent_at_10_minutes']:.3f} % at one in 10 minutes"
    )
    return "; ".join(parts)


def main() -> None:
    """Reads the flags, measures, prints or writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--folder", help="default: a new temporary folder")
    parser.add_argument(
        "--repeats", type=int, default=5, help="of saving and restoring"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of the loop, each way")
    parser.add_argument("--updates", type=int, default=120, help="in a round")
    parser.add_argument("--saves", type=int, default=3, help="in a round")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--reduced", action="store_true", help="tiny sizes")
    parser.add_argument("--output", help="file for the JSON; else standard output")
    options = meta_gradient.parse_reducible(parser, REDUCED)
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(options, epath.Path(options.folder or temporary))
    result = {"benchmark": "checkpoints", "targets": TARGET, **found}
    meta_gradient.report(result, options)
    print(summary(found), file=sys.stderr)


if __name__ == "__main__":
    main()
