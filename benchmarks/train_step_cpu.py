"""CPU train step of ResNet-32 against PyTorch eager, in the same run, interleaved.

Both do forward, softmax cross-entropy, backward and SGD (momentum 0.9, coupled weight
decay 2e-4) on 32x32x3 images in float32; PyTorch in its faster memory format
(channels_last). Prints JSON: milliseconds a step, images a second, compile time and
`ratio`, our speed over PyTorch's (1 is equal, higher is better). On a busy machine the
wall clock says little (PyTorch's threads wait for one another): look at
`load_average`, and run it with OMP_WAIT_POLICY=passive to compare the CPU times.

    python benchmarks/train_step_cpu.py --output ratio.json

PyTorch is not a dependency of the project: `pip install torch` for this script.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

CLASSES = 100
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 2e-4


def jax_step(options: argparse.Namespace) -> tuple[Callable[[], float], dict[str, Any]]:
    """A function that runs `updates` steps and waits, and facts about its compiling."""
    import jax
    import jax.numpy as jnp
    import optax

    from bsce_jax import models

    chunks = options.conv_chunks or models.convolution.default_chunks("cpu")
    module = models.create("resnet32", CLASSES, conv_chunks=chunks)
    images, labels = (jnp.asarray(a) for a in batch(options.batch))
    optimiser = optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.trace(MOMENTUM),
        optax.scale(-LEARNING_RATE),
    )
    variables = jax.jit(lambda key: module.init(key, images, train=False))(
        jax.random.key(0)
    )
    params, stats = variables["params"], variables["batch_stats"]

    def step(state: Any, images: jax.Array, labels: jax.Array) -> Any:
        params, stats, opt_state = state

        def loss(params: Any) -> Any:
            (logits, _), updated = module.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            values = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return values.mean(), updated["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), value

    state = (params, stats, optimiser.init(params))
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(state, images, labels)
    traced = time.perf_counter()
    compiled = lowered.compile()
    facts = {
        "conv_chunks": chunks,
        "trace_s": round(traced - start, 2),
        "compile_s": round(time.perf_counter() - traced, 2),
        "jax": jax.__version__,
    }

    def run() -> float:
        nonlocal state
        for _ in range(options.updates):
            state, value = compiled(state, images, labels)
        return float(value)

    return run, facts


def torch_step(options: argparse.Namespace) -> Callable[[], float]:
    """The same in PyTorch eager: a function that runs `updates` steps."""
    import torch
    from torch import nn

    torch.set_num_threads(options.threads)

    class Block(nn.Module):
        def __init__(self, inputs: int, features: int) -> None:
            super().__init__()
            stride = 1 if inputs == features else 2
            self.conv1 = nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
            self.norm1 = nn.BatchNorm2d(features)
            self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(features)
            self.shortcut: nn.Module = nn.Identity()
            if stride == 2:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(inputs, features, 1, 2, bias=False),
                    nn.BatchNorm2d(features),
                )

        def forward(self, x: Any) -> Any:
            y = self.norm1(self.conv1(x)).relu_()
            return self.norm2(self.conv2(y)).add_(self.shortcut(x)).relu_()

    layers = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(True)]
    widths = [16] + [16] * 5 + [32] * 5 + [64] * 5
    layers += [Block(*pair) for pair in zip(widths[:-1], widths[1:], strict=True)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)]
    network: Any = nn.Sequential(*layers)
    network.to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(
        network.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    images, labels = (torch.from_numpy(a) for a in batch(options.batch))
    # NHWC in memory, NCHW in name: channels_last.
    images = images.permute(0, 3, 1, 2)

    def run() -> float:
        for _ in range(options.updates):
            optimiser.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(network(images), labels)
            loss.backward()
            optimiser.step()
        return float(loss.detach())

    return run


def batch(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images [size, 32, 32, 3] float32 and labels [size] int64."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(size, 32, 32, 3)).astype(np.float32)
    return images, rng.integers(0, CLASSES, size)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times both, one after the other, `repeats` times over."""
    run_jax, facts = jax_step(options)
    runs = {"bsce_jax": run_jax, "torch": torch_step(options)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    load = os.getloadavg()[0]
    for run in runs.values():
        run()
    for _ in range(options.repeats):
        for name, run in runs.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            if not np.isfinite(run()):
                sys.exit(f"error: the loss of {name} is not finite")
            times[name].append(1e3 * (time.perf_counter() - start) / options.updates)
            spent = time.process_time() - cpu_start
            cpu[name].append(1e3 * spent / options.updates / options.threads)
    pairs = zip(times["torch"], times["bsce_jax"], strict=True)
    result: dict[str, Any] = {
        "benchmark": "ResNet-32 train step, 32x32x3, float32, CPU",
        "batch": options.batch,
        "threads": options.threads,
        "repeats": options.repeats,
        "ratio": round(statistics.median(t / j for t, j in pairs), 3),
        "ratio_of_minima": round(min(times["torch"]) / min(times["bsce_jax"]), 3),
        "ratio_of_cpu_times": round(min(cpu["torch"]) / min(cpu["bsce_jax"]), 3),
        "load_average": round(load, 1),
    }
    for name, values in times.items():
        median = statistics.median(values)
        result[name] = {
            "step_ms_median": round(median, 1),
            "step_ms_min": round(min(values), 1),
            "cpu_ms_per_thread_min": round(min(cpu[name]), 1),
            "images_per_s": round(1e3 * options.batch / median, 1),
        }
    result["bsce_jax"] |= facts
    import torch

    result["torch"]["torch"] = torch.__version__
    return result | {"machine": platform.processor() or platform.machine()}


def main() -> None:
    """Reads the flags, measures, prints or writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--updates", type=int, default=1, help="steps a repeat")
    parser.add_argument("--conv_chunks", type=int, default=0, help="0: the default")
    parser.add_argument("--output", help="file for the JSON; else standard output")
    options = parser.parse_args()
    limit_threads(options.threads)
    try:
        import torch  # noqa: F401
    except ImportError:
        sys.exit("error: this benchmark compares with PyTorch: pip install torch")
    text = json.dumps(measure(options), indent=2)
    if options.output:
        with open(options.output, "w") as file:
            file.write(text + "\n")
    else:
        print(text)


def limit_threads(threads: int) -> None:
    """Gives both libraries the same cores: XLA sizes its pool by what it may use."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[:threads])


if __name__ == "__main__":
    main()
