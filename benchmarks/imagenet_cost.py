"""What ImageNet-1000 costs with each method: FLOPs, device memory, checkpoints.

The first incremental step after a base step of half the classes: ResNet-18 of
configs/methods/ on 224 x 224 images, a teacher, streamed uint8 batches, one update a
call. All comes from shapes and from XLA's analysis of the compiled update, which needs
no data set, hardly any memory and no accelerator:

    python benchmarks/imagenet_cost.py                     # with XLA's compiler for CPU
    pip install 'jax[tpu]'
    python benchmarks/imagenet_cost.py --target v5e:2x2    # with that for a TPU chip

Device memory is what the compiler allots: arguments, temporaries, and results that
reuse no argument. On CPU that is an estimate for accelerators: its compiler has other
layouts and turns bfloat16 convolutions into float32. The TPU's own compiler runs
without a TPU, for minutes a program; its sizes are those of what would run.

Without Meta the prior is balanced: the others compile to the same program, but for
PODNet's own loss (NCA). With Meta, FLOPs are the mean over meta.every updates, of which
one updates alpha too; memory is that one's. Prints JSON, or writes it (--output), and
then a table.
"""

import argparse
import functools
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from cost import flops_and_bytes
from meta_gradient import CONFIGS, report
from ml_collections import ConfigDict

from bsce_jax import optim, programs, state, steps, updates
from bsce_jax.config import method_module, resolve
from bsce_jax.data.augment import NORMALIZATION
from bsce_jax.defaults import default_config
from bsce_jax.models import create
from bsce_jax.state import PyTree

METHODS = ("il_baseline", "lucir", "podnet")
PRIORS = ("balanced", "meta")
MIB = 2**20


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
    config = default_config()
    config.prior = prior
    method_module(CONFIGS, method).configure(config, "imagenet")
    config.data.padding = 0
    config.data.mean, config.data.std = NORMALIZATION["imagenet"]
    config.model.dtype, config.model.width = dtype, options.width
    config = resolve(config)
    model = create(
        config.model.name,
        options.classes,
        width=config.model.width or None,
        final_relu=config.model.final_relu,
        stem=config.model.stem,
        head=config.model.head,
        proxies=config.model.proxies,
        dtype=dtype,
        conv_chunks=1,
    )
    return config, programs.main_program(config, model)


def make_state(config: ConfigDict, program: steps.Program, network: PyTree) -> Any:
    """Shapes of the training state of a network's shapes."""
    alpha = optim.alpha_optimizer(config.meta.optimizer, config.meta.learning_rate)
    return state.TrainState(
        params=network["params"],
        batch_stats=network["batch_stats"],
        opt_state=jax.eval_shape(program.optimizer.init, network["params"]),
        alpha=array(()),
        alpha_opt_state=jax.eval_shape(alpha.init, array(())),
        extra={},
    )


def make_context(config: ConfigDict, network: PyTree, classes: int) -> Any:
    """Shapes of the incremental step's constants."""
    scale = functools.partial(optim.update_scale, trained=np.ones(classes, bool))
    return state.StepContext(
        log_prior=array((classes,)),
        old=array((classes,), np.bool_),
        seen=array((classes,), np.bool_),
        counts=array((classes,)),
        task_ids=array((classes,), np.int32),
        weights={name: array(()) for name in config.terms},
        update_scale=jax.eval_shape(scale, network["params"]),
        teachers=(network,),
    )


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
    pixels = options.pixels
    network = programs.network_shapes(program.model, (pixels, pixels, 3))
    one = array((1,), np.int32)
    rows = make_rows(batch, pixels)
    return (
        make_state(config, program, network),
        make_context(config, network, options.classes),
        None,
        array((), np.int32),
        state.Schedule(one, one, one, one, learning_rate=array((1,))),
        rows,
        *((rows,) if program.meta else ()),
    )


def target(name: str) -> tuple[Any, dict[str, Any] | None]:
    """Device to compile for, and compiler options.

    Args:
      name: "cpu", or a TPU topology such as v5e:2x2, of which it takes one chip.
    """
    if name == "cpu":
        # Buffers are allotted before LLVM gets the program: its optimiser may rest.
        return jax.devices("cpu")[0], {"xla_backend_optimization_level": 0}
    from jax.experimental import topologies

    # No metadata server is asked, and no lock taken: there is no TPU here.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    return found.devices[0], None


def compile_update(
    function: Callable, arguments: tuple[PyTree, ...], where: tuple[Any, Any]
) -> dict[str, float]:
    """Compiles an update; returns seconds, FLOPs and bytes of device memory."""
    device, settings = where
    place = jax.sharding.SingleDeviceSharding(device)
    start = time.perf_counter()
    jitted = jax.jit(
        function, donate_argnums=0, in_shardings=place, out_shardings=place
    )
    lowered = jitted.lower(*arguments)
    built = lowered.compile(compiler_options=settings)
    seconds = time.perf_counter() - start
    used: Any = built.memory_analysis()
    results = used.output_size_in_bytes - used.alias_size_in_bytes
    return {
        "seconds": seconds,
        "flops": flops_and_bytes(lowered, built)[0],
        "arguments": used.argument_size_in_bytes,
        "temporaries": used.temp_size_in_bytes,
        "memory": used.argument_size_in_bytes + used.temp_size_in_bytes + results,
    }


def sizes(
    config: ConfigDict, program: steps.Program, options: argparse.Namespace
) -> dict[str, Any]:
    """Parameters, and bytes of what a checkpoint holds."""
    training, context, *_ = make_arguments(config, program, 1, options)
    ranking = options.classes * config.memory.per_class * 4
    parts = {
        "parameters": size(training.params),
        "momentum": size(training.opt_state),
        "statistics": size(training.batch_stats),
        "teacher": size(context.teachers),
        "ranking": ranking,
    }
    parts["checkpoint"] = size(training) + parts["teacher"] + ranking
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(training.params))
    return {"parameters": count, "bytes": parts}


def measure(
    method: str, prior: str, dtype: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Everything about a method with or without Meta in one type."""
    config, program = make_program(method, prior, dtype, options)
    where = target(options.target)
    plain = updates.make_train_update(program)
    meta = updates.make_meta_update(program) if program.meta else None
    every = config.meta.every
    found: dict[str, Any] = {"method": method, "prior": prior, "dtype": dtype}
    found |= sizes(config, program, options) | {"batches": {}}
    for batch in options.batch:
        arguments = make_arguments(config, program, batch, options)
        facts = compile_update(meta or plain, arguments, where)
        if meta and batch == options.batch[0]:
            one = compile_update(plain, arguments[:6], where)
            mean = (one["flops"] * (every - 1) + facts["flops"]) / every
        elif batch == options.batch[0]:
            mean = facts["flops"]
        found["batches"][batch] = {k: round(v, 1) for k, v in facts.items()}
        note = f"{method} {prior} {dtype} {batch}: {facts['memory'] / MIB:.0f} MiB"
        print(note, f"in {facts['seconds']:.0f} s", file=sys.stderr)
    found["flops_per_image"] = mean / options.batch[0]
    return found


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """A table, one line a method, prior and type."""
    batches = list(results[0]["batches"])
    header = [
        "method",
        "Meta",
        "type",
        "parameters, M",
        "checkpoint, MiB",
        "GFLOP an image",
        *(f"MiB at {batch}" for batch in batches),
    ]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for result in results:
        cells = [
            result["method"],
            "yes" if result["prior"] == "meta" else "no",
            result["dtype"],
            f"{result['parameters'] / 1e6:.1f}",
            f"{result['bytes']['checkpoint'] / MIB:.0f}",
            f"{result['flops_per_image'] / 1e9:.1f}",
            *(f"{facts['memory'] / MIB:.0f}" for facts in result["batches"].values()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--method", nargs="+", default=METHODS, choices=METHODS)
    add("--prior", nargs="+", default=PRIORS, choices=PRIORS)
    types = ("float32", "bfloat16")
    add("--dtype", nargs="+", default=types, choices=types)
    add("--batch", nargs="+", type=int, default=[32, 64, 128, 256], help="of a device")
    add("--target", default="cpu", help="cpu, or a TPU topology (v5e:2x2)")
    add("--pixels", type=int, default=224, help="side of an image")
    add("--classes", type=int, default=1000)
    add("--width", type=int, default=0, help="first stage's channels; 0: as published")
    add("--output", help="file for the JSON; else standard output")
    return parser.parse_args()


def main() -> None:
    """Compiles all, prints or writes JSON, prints the table."""
    options = parse()
    jax.config.update("jax_platforms", "cpu")  # a TPU only compiles here
    runs = itertools.product(options.method, options.prior, options.dtype)
    results = [measure(*run, options) for run in runs]
    report({"benchmark": "ImageNet-1000", "results": results}, options)
    print(markdown(results))


if __name__ == "__main__":
    main()
