"""What ImageNet-1000 costs: FLOPs, images a second, device memory, checkpoints.

The first incremental step after a base step of half the classes: ResNet-18 of
configs/methods/ on 224 x 224 images, a teacher, streamed uint8 batches, one update a
call. All comes from shapes and from XLA's analysis of the update, which needs no data
set, hardly any memory and no accelerator:

    python benchmarks/imagenet_cost.py                     # with XLA's compiler for CPU
    pip install 'jax[tpu]'
    python benchmarks/imagenet_cost.py --target v5e:8x8    # with that for a TPU slice
    python benchmarks/imagenet_cost.py --batch             # without memory: seconds

FLOPs are those of the update before it is compiled. What is compiled is a run's own
program, sharded over all chips of the slice (on CPU, over the devices that
JAX_NUM_CPU_DEVICES makes). Device memory is what the compiler allots on each:
arguments, temporaries, and results that reuse no argument. On CPU that is an estimate
for accelerators: its compiler has other layouts and turns bfloat16 convolutions into
float32. The TPU's own compiler runs without a TPU, for minutes a program; its sizes are
those of what would run, and so are the collectives and the bytes that the operations
read and write, from which a bound of the speed follows.

Without Meta the prior is balanced: the others compile to the same program, but for
PODNet's own loss (NCA). With Meta, FLOPs are the mean over meta.every updates, of which
one updates alpha too; memory is that one's. Prints JSON, or writes it (--output), and
then tables: of these, of the images a second that keep a chip busy (in brackets what
that asks of each core of its host), of runs with 5 and 10 steps, and of what was
compiled. With the images/s that a core decodes (--decode_rate; input_pipeline.py
measures it) it also says how many chips a host feeds.
"""

import argparse
import functools
import itertools
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import cost
import imagenet_tables
import jax
import meta_gradient
import numpy as np
import problem
from ml_collections import ConfigDict

from bsce_jax.compute import parallel, state, steps, updates
from bsce_jax.compute.state import PyTree
from bsce_jax.config.resolve import resolve
from bsce_jax.run import programs

METHODS = ("il_baseline", "lucir", "podnet")
PRIORS = ("balanced", "meta")
IMAGES = 1_281_167  # of ImageNet-1000, for training


def array(shape: Sequence[int], dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    """The shape of one array."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def size(tree: PyTree) -> int:
    """Bytes of a tree of arrays."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def make_program(
    method: str, prior: str, dtype: str, options: argparse.Namespace
) -> tuple[ConfigDict, steps.Program]:
    """A method on ImageNet, whose convolutions are not cut into chunks."""
    config = problem.load("imagenet", f"method={method},prior={prior}")
    config.model.dtype, config.model.width = dtype, options.width
    config.model.conv_chunks = 1
    config.scenario.base_classes = options.classes // 2
    config = resolve(config)
    one = parallel.create("jit", jax.devices()[:1])
    model = programs.build_model(config, one, options.classes)
    return config, programs.phase_program(config, model, meta_gradient.PHASE)


def make_rows(batch: int, pixels: int) -> state.Rows:
    """Shapes of one streamed batch."""
    whole = (1, batch)
    return state.Rows(
        indices=array(whole, np.int32),
        valid=array(whole),
        numbers=array(whole, np.int32),
        images=array((*whole, pixels, pixels, 3), np.uint8),
        labels=array(whole, np.int32),
    )


def make_arguments(
    config: ConfigDict, program: steps.Program, batch: int, options: argparse.Namespace
) -> tuple[PyTree, ...]:
    """Shapes of all that an update takes."""
    shape = (options.pixels, options.pixels, 3)
    network = programs.network_shapes(config, program.model, shape)
    make = functools.partial(meta_gradient.make_problem, config, program)
    one, rows = array((1,), np.int32), make_rows(batch, options.pixels)
    names = (updates.TRAIN, updates.HELD_OUT) if program.meta else (updates.TRAIN,)
    return (
        *jax.eval_shape(make, network),
        None,
        array((), np.int32),
        state.Schedule(one, one, one, one, learning_rate=array((1,))),
        dict.fromkeys(names, rows),
    )


def target(name: str) -> tuple[Sequence[Any], dict[str, Any] | None]:
    """Devices to compile for, and compiler options.

    Args:
      name: "cpu", all devices of this process, or a TPU slice such as v5e:2x2.
    """
    if name == "cpu":
        # Buffers are allotted before LLVM gets the program: its optimiser may rest.
        return jax.devices("cpu"), {"xla_backend_optimization_level": 0}
    from jax.experimental import topologies

    # No metadata server is asked, and no lock taken: there is no TPU here.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # The two cores of a chip of these are one device of JAX, as in a run.
    two_cores = name.partition(":")[0] in ("v4", "v5p")
    options = {"chip_config_name": "megacore"} if two_cores else {}
    found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    return found.devices, None


def lower(
    config: ConfigDict,
    classes: int,
    devices: parallel.Parallel,
    arguments: tuple[PyTree, ...],
) -> list[jax.stages.Lowered]:
    """A run's update before it is compiled; with Meta also the one that moves alpha."""
    built = programs.build(config, devices, classes)
    kinds = (built.updates, built.meta_updates)
    return [
        kind[meta_gradient.PHASE].lower(*arguments)
        for kind in kinds
        if meta_gradient.PHASE in kind
    ]


def count_flops(lowered: jax.stages.Lowered) -> float:
    """FLOPs of one call of a program for the CPU (a TPU's has none)."""
    return (lowered.cost_analysis() or {})["flops"]


def compile_update(lowered: jax.stages.Lowered, settings: Any) -> dict[str, Any]:
    """Compiles an update; returns seconds, and of a device memory and traffic.

    "moved" are the bytes that its operations read and write, "collectives" those that
    each exchange gives: kind -> list.
    """
    start = time.perf_counter()
    built = lowered.compile(compiler_options=settings)
    seconds = time.perf_counter() - start
    used: Any = built.memory_analysis()
    results = used.output_size_in_bytes - used.alias_size_in_bytes
    return {
        "seconds": round(seconds, 1),
        "arguments": used.argument_size_in_bytes,
        "temporaries": used.temp_size_in_bytes,
        "memory": used.argument_size_in_bytes + used.temp_size_in_bytes + results,
        "moved": (built.cost_analysis() or {})["bytes accessed"],
        "collectives": cost.collectives(built.as_text()),
    }


def sizes(
    config: ConfigDict, program: steps.Program, options: argparse.Namespace
) -> dict[str, Any]:
    """Parameters, and bytes of what a checkpoint holds."""
    training, context, *_ = make_arguments(config, program, 1, options)
    ranking = options.classes * config.memory.per_class * 4
    parts = {
        "parameters": size(training.network.params),
        "momentum": size(training.opt_state),
        "statistics": size(training.network.batch_stats),
        "teacher": size(context.teacher),
        "ranking": ranking,
    }
    parts["checkpoint"] = size(training) + parts["teacher"] + ranking
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(training.network.params))
    return {"parameters": count, "bytes": parts}


def run_facts(config: ConfigDict, checkpoint: int, classes: int) -> dict[int, Any]:
    """Images that a run trains on, and bytes of its checkpoints, by its steps.

    Half of the classes are in the base step; exemplars are some of the old images.
    """
    found = {}
    for count in (5, 10):
        old = [classes // 2 + i * (classes // 2) // count for i in range(count)]
        images = IMAGES * classes // 1000 + config.memory.per_class * sum(old)
        kept = 1 + count + config.checkpoint.keep  # the ends of steps, and the newest
        images *= config.phase[meta_gradient.PHASE].epochs  # as many as of the base
        found[count] = {"images": images, "checkpoints": kept * checkpoint}
    return found


def measure(
    method: str, prior: str, dtype: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Everything about a method with or without Meta in one type."""
    config, program = make_program(method, prior, dtype, options)
    used, settings = target(options.target)
    devices = parallel.create("jit", used)
    found: dict[str, Any] = {"method": method, "prior": prior, "dtype": dtype}
    found |= {"chips": devices.num_devices, "hosts": devices.num_processes}
    found |= sizes(config, program, options) | {"batches": {}}
    found["epochs"] = config.phase[meta_gradient.PHASE].epochs
    found["runs"] = run_facts(config, found["bytes"]["checkpoint"], options.classes)
    first, *_ = options.batch or [32]
    arguments = make_arguments(config, program, first, options)
    one = parallel.create("jit", jax.devices("cpu")[:1])
    lowered = lower(config, options.classes, one, arguments)
    flops, *with_alpha = map(count_flops, lowered)
    if with_alpha:
        every = config.meta.every
        found["flops_per_image_with_alpha"] = with_alpha[0] / first
        flops = (flops * (every - 1) + with_alpha[0]) / every
    found["flops_per_image"] = flops / first
    for batch in options.batch:
        whole = batch * devices.num_devices
        arguments = make_arguments(config, program, whole, options)
        *_, last = lower(config, options.classes, devices, arguments)
        facts = found["batches"][batch] = compile_update(last, settings)
        used_mib = facts["memory"] / imagenet_tables.MIB
        note = f"{method} {prior} {dtype} {batch}: {used_mib:.0f} MiB"
        print(note, f"in {facts['seconds']:.0f} s", file=sys.stderr)
    return found


def parse() -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--method", nargs="+", default=METHODS, choices=METHODS)
    add("--prior", nargs="+", default=PRIORS, choices=PRIORS)
    types = ("float32", "bfloat16")
    add("--dtype", nargs="+", default=types, choices=types)
    batches = [32, 64, 128, 256]
    add(
        "--batch",
        nargs="*",
        type=int,
        default=batches,
        help="of a device; none: no memory",
    )
    add("--target", default="cpu", help="cpu, or a TPU slice (v5e:2x2)")
    add("--pixels", type=int, default=224, help="side of an image")
    add("--classes", type=int, default=1000)
    add("--width", type=int, default=0, help="first stage's channels; 0: as published")
    add("--decode_rate", type=float, default=0, help="images/s that a core decodes")
    add("--output", help="file for the JSON; else standard output")
    return parser.parse_args()


def main() -> None:
    """Counts and compiles, prints or writes JSON, prints the tables."""
    options = parse()
    jax.config.update("jax_platforms", "cpu")  # a TPU only compiles here
    runs = itertools.product(options.method, options.prior, options.dtype)
    results = [measure(*run, options) for run in runs]
    meta_gradient.report({"benchmark": "ImageNet-1000", "results": results}, options)
    print(imagenet_tables.every(results, options.target, options.decode_rate))


if __name__ == "__main__":
    main()
