"""Everything that a GPU is needed for, in one command that may be repeated.

    python benchmarks/gpu.py --output gpu_results [--data_dir TFDS_FOLDER]

Stages, in this order (--stages names some of them, separated by commas):

    speed      images/s of short runs, and of PyTorch (if installed) at a base step
    meta       time and memory of the gradient of alpha (benchmarks/meta_gradient.py)
    none, balanced, meta_run, lucir, lucir_balanced, podnet, ..., podnet0_relaxed
               the paper's CIFAR-100 protocol (B50, 5 steps) beside the paper's
               accuracies: IL-Baseline with the softmax, BalancedS-CE and Meta, LUCIR
               and PODNet with their own loss and BalancedS-CE, and without memory
               (0) with Relaxed too; a base step that one run has finished serves the
               others that share it

A stage consists of tasks, each a process of its own. The folder --output gets
summary.json and summary.md, rewritten when a task ends, <stage>.log with all that the
tasks print, and runs/ with the workdirs. Called again with the same --output it skips
what is done and continues runs from their checkpoints: where a command may only last
so long, give --limit_seconds and repeat it. Exit status: 0 all done, 1 a task failed,
3 something is left to do.

--reduced does everything at a tiny size, on CPU, with the digits data.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Argument of the configuration, runs of equal base steps, and average incremental
# accuracy with 5 steps (Jodelet et al., Table 1, and Table 3 for memory=0).
RUNS = {
    "none": ("prior=none", "il_baseline", 43.80),
    "balanced": ("prior=balanced", "il_baseline", 62.22),
    "meta_run": ("prior=meta", "il_baseline", 64.11),
    "lucir": ("method=lucir,prior=none", "lucir", 63.37),
    "lucir_balanced": ("method=lucir,prior=balanced", "lucir", 64.83),
    "podnet": ("method=podnet,prior=none", "podnet with NCA", 64.46),
    "podnet_balanced": ("method=podnet,prior=balanced", "podnet", 67.77),
    "lucir0": ("method=lucir,prior=none,memory=0", "lucir", 43.71),
    "lucir0_balanced": ("method=lucir,prior=balanced,memory=0", "lucir", 54.68),
    "lucir0_relaxed": (
        "method=lucir,prior=relaxed,epsilon=1,memory=0",
        "lucir",
        59.43,
    ),
    "podnet0": ("method=podnet,prior=none,memory=0", "podnet with NCA", 41.85),
    "podnet0_balanced": ("method=podnet,prior=balanced,memory=0", "podnet", 63.31),
    "podnet0_relaxed": (
        "method=podnet,prior=relaxed,epsilon=1,memory=0",
        "podnet",
        65.66,
    ),
}
STAGES = ("speed", "meta", *RUNS)
DTYPES = ("bfloat16", "float32")  # float32 is TF32 on GPUs, in JAX and in PyTorch
# Eager, and in two modes of torch.compile; the last one replays CUDA graphs.
TORCH = (*DTYPES, "bfloat16-compile-default", "bfloat16-compile-reduce-overhead")
GRACE = 30.0  # seconds that a task gets to save and end


class Task(NamedTuple):
    """A process that leaves a JSON file `result` if it succeeds."""

    name: str
    stage: str
    command: list[str]
    result: pathlib.Path


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    """The tasks of the chosen stages, each made when those before it have ended."""
    short = {"optim.base_epochs": 12, "optim.epochs": 12, "scenario.steps": 1}
    calls = f"-{options.updates_per_call}" if options.updates_per_call else ""
    if "speed" in options.stages:
        for dtype in DTYPES:
            name = f"speed-bsce_jax-{dtype}{calls}"
            yield run_task(name, "speed", options, short | {"model.dtype": dtype})
        for variant in TORCH[:3] if options.reduced else TORCH:
            flag = f"--torch={variant}"
            yield script_task(f"speed-torch-{variant}", "gpu.py", options, flag)
    if "meta" in options.stages:
        for dtype in DTYPES:
            flag = f"--dtype={dtype}"
            yield script_task(f"meta-{dtype}", "meta_gradient.py", options, flag)
    for stage in RUNS:
        if stage in options.stages:
            yield run_task(stage, stage, options, base_step(stage, options.output))


def run_task(
    name: str, stage: str, options: argparse.Namespace, settings: dict[str, Any]
) -> Task:
    """A run of bsce_jax.main with some fields of its configuration set."""
    argument = RUNS["balanced" if stage == "speed" else stage][0]
    file = "digits.py" if options.reduced else "cifar100.py"
    workdir = options.output / "runs" / name
    common = {
        "model.dtype": options.dtype,
        "updates_per_call": options.updates_per_call,
        "data.data_dir": options.data_dir,
        "checkpoint.minutes": 2.0,
    }
    if options.reduced:
        settings = settings | dict.fromkeys(("optim.base_epochs", "optim.epochs"), 2)
        # With equal counts, as in CIFAR-100, the priors share their base step.
        settings["data.max_per_class"] = 100
    command = [sys.executable, "-m", "bsce_jax.main"]
    command.append(f"--config={ROOT / 'configs' / file}:{argument}")
    command.append(f"--workdir={workdir}")
    command += [f"--config.{k}={v}" for k, v in (common | settings).items()]
    return Task(name, stage, command, workdir / "results.json")


def base_step(stage: str, output: pathlib.Path) -> dict[str, Any]:
    """The setting that takes over the base step of another run, if one is finished."""
    same = [name for name, run in RUNS.items() if run[1] == RUNS[stage][1]]
    ready = [name for name in same if finished_steps(output / "runs" / name)]
    needed = ready and stage not in ready
    return {"init_from": output / "runs" / ready[0]} if needed else {}


def finished_steps(workdir: pathlib.Path) -> int:
    """Steps that a run has finished."""
    path = workdir / "results.json"
    return len(json.loads(path.read_text())["steps"]) if path.exists() else 0


def script_task(name: str, script: str, options: argparse.Namespace, flag: str) -> Task:
    """A benchmark script that writes JSON."""
    result = options.output / "runs" / f"{name}.json"
    command = [sys.executable, str(ROOT / "benchmarks" / script), flag]
    command += [f"--output={result}"] + ["--reduced"] * options.reduced
    return Task(name, name.partition("-")[0], command, result)


def execute(
    task: Task, record: dict[str, Any], log: pathlib.Path, deadline: float
) -> Generator[None, None, None]:
    """Runs a task until it ends or the deadline comes, keeping its record.

    Yields every few seconds, for the record to be written; closing it ends the task.
    """
    before, start = record["seconds"], time.monotonic()
    record |= {"status": "running", "note": "", "log": log.name}
    record |= {"command": shlex.join(task.command), "attempts": record["attempts"] + 1}
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    with log.open("a") as file:
        print(f"$ {record['command']}", file=file, flush=True)
        process = subprocess.Popen(
            task.command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,  # Ctrl-C comes to this process alone, which passes it on
        )
        try:
            while process.poll() is None and time.monotonic() < deadline:
                record["seconds"] = round(before + time.monotonic() - start, 1)
                yield
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, min(5.0, deadline - time.monotonic())))
        finally:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            if process.poll() is None:
                process.kill()
            record["exit_status"] = process.wait()
            record["seconds"] = round(before + time.monotonic() - start, 1)
            judge(task, record, log)


def judge(task: Task, record: dict[str, Any], log: pathlib.Path) -> None:
    """Fills in the outcome of a task that has ended."""
    if record["exit_status"] == 0 and task.result.exists():
        found = json.loads(task.result.read_text())
        record["result"] = run_result(found) if "steps" in found else found
        record["status"] = "done"
    elif record["exit_status"] in (-signal.SIGTERM, -signal.SIGKILL, 128 + 15):
        record["status"] = "unfinished"
        if task.stage in RUNS:
            record["note"] = f"{finished_steps(task.result.parent)} steps finished"
    else:
        record["status"] = "failed"
        record["note"] = log.read_text(errors="replace").strip().splitlines()[-1][:300]


def run_result(results: dict[str, Any]) -> dict[str, Any]:
    """What a run's results.json says, in short."""
    images, seconds, steps = 0, 0.0, results["steps"]
    rates = [step["telemetry"]["images_per_second"] for step in steps]
    for rate, step in zip(rates, steps, strict=True):
        if rate:  # none in a base step that was taken over
            trained = step["result"]["train_images"] * len(step["result"]["loss"])
            images, seconds = images + trained, seconds + trained / rate
    return {
        **results["summary"],
        "top1": [step["result"]["top1"] for step in steps],
        "alpha": [value for step in steps for _, value in step["result"]["alpha"][-1:]],
        "images_per_s": images / seconds if seconds else None,
        "images_per_s_by_step": rates,
        "environment": steps[-1]["telemetry"],
        "base_step": "own" if rates[0] else "taken over",
    }


def markdown(summary: dict[str, Any]) -> str:
    """The summary for readers."""
    lines = ["# Results of benchmarks/gpu.py", f"`{summary['commands'][-1]}`"]
    if summary["reduced"]:
        lines.append("**Tiny sizes: the numbers mean nothing.**")
    speed, meta, runs, environment = [], [], [], None
    for name, task in summary["tasks"].items():
        result = task.get("result", {})
        outcome = ": ".join(filter(None, (task["status"], task.get("note"))))
        environment = result.get("environment", environment)
        if task["stage"] == "speed":
            rates = result.get("images_per_s_by_step", [result.get("images_per_s")])
            for step, rate in zip(("base", "incremental"), rates, strict=False):
                speed.append([name.removeprefix("speed-"), step, rate, outcome])
        elif task["stage"] == "meta":
            part, targets = result.get("results", [{}])[-1], result.get("targets", {})
            for key in [key for key in part if key != "conv_chunks"] or [""]:
                values, goal = part.get(key, {}), targets.get(key, {})
                row = [name.removeprefix("meta-"), key, values.get("ms_median")]
                for kind in ("time_ratio", "memory_ratio"):
                    row += [values.get(kind), goal.get(kind)]
                meta.append([*row, outcome])
        else:
            row = [name, result.get("average_incremental_top1"), RUNS[name][2]]
            row += [result.get("images_per_s"), result.get("base_step")]
            runs.append([*row, task["seconds"], outcome])
    if environment:
        source = f"JAX {environment['versions']['jax']}, commit {environment['commit']}"
        lines.append(f"{environment['device']}, {source}")
    lines += ["## Training", table("program | step | images/s | outcome", speed)]
    header = "type | program | ms | time (train step = 1) | at most | memory | at most"
    lines += ["## Gradient of alpha", table(f"{header} | outcome", meta)]
    header = "run | average incremental accuracy | paper | images/s | base step"
    lines += ["## Whole runs", table(f"{header} | seconds | outcome", runs)]
    return "\n\n".join(lines) + "\n"


def table(header: str, rows: list[list[Any]]) -> str:
    """A Markdown table; cells are empty where there is no number."""
    lines = [f"| {header} |", "|" + "---|" * len(header.split("|"))]
    for row in rows:
        cells = [f"{c:.4g}" if isinstance(c, float) else c or "" for c in row]
        lines.append("| " + " | ".join(str(c).replace("|", "/") for c in cells) + " |")
    return "\n".join(lines)


def measure_torch(options: argparse.Namespace) -> None:
    """Trains on random images in PyTorch what our base step trains."""
    import torch

    dtype, _, mode = options.torch.partition("-compile-")
    classes, size, channels, blocks, batch, updates, limit = 100, 32, 3, 5, 128, 50, 10
    if options.reduced:
        classes, size, channels, blocks, batch, updates, limit = 10, 8, 1, 1, 32, 5, 1
    device = "cpu" if options.reduced or not torch.cuda.is_available() else "cuda"
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    count, edge = 250 * classes, size // 8
    shape = (count, size + 2 * edge, size + 2 * edge, channels)
    padded = torch.randint(256, shape, dtype=torch.uint8, device=device)
    labels = torch.randint(classes, (count,), device=device)
    network = torch_resnet(blocks, channels, classes)
    network.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4, fused=True
    )
    pixels = torch.arange(size, device=device)

    def loss_of(index: Any, top: Any, left: Any, flip: Any) -> Any:
        rows, columns = top + pixels, left + torch.where(flip, pixels.flip(0), pixels)
        crops = padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        x = ((crops.float() / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)  # channels_last
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            return torch.nn.functional.cross_entropy(network(x), labels[index])

    if mode:
        loss_of = torch.compile(loss_of, mode=mode)

    def train() -> None:
        order = torch.randperm(count, device=device)[: updates * batch]
        for index in order.split(batch):
            shifts = torch.randint(2 * edge + 1, (2, len(index), 1), device=device)
            flip = torch.rand(len(index), 1, device=device) < 0.5
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(index, *shifts, flip)
            loss.backward()
            optimizer.step()
        if not loss.isfinite():  # waits for the device
            sys.exit("error: PyTorch's loss is not finite")

    times: list[float] = []
    while len(times) < 5 or times[-1] - times[3] < limit:  # the first warm up
        train()
        times.append(time.perf_counter())
    seconds = [b - a for a, b in zip(times[3:], times[4:], strict=False)]
    rate = updates * batch / statistics.median(seconds)
    name = torch.cuda.get_device_name() if device == "cuda" else device
    result = {"images_per_s": rate, "device": name, "torch": torch.__version__}
    options.output.write_text(json.dumps(result) + "\n")


def torch_resnet(blocks: int, channels: int, classes: int) -> Any:
    """The CIFAR ResNet of 6 * blocks + 2 layers, with 1x1 convolutions as shortcuts."""
    from torch import nn

    def convolution(inputs: int, outputs: int, size: int, stride: int) -> list[Any]:
        conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        return [conv, nn.BatchNorm2d(outputs)]

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            stride = outputs // inputs
            first = convolution(inputs, outputs, 3, stride)
            second = convolution(outputs, outputs, 3, 1)
            self.body = nn.Sequential(*first, nn.ReLU(True), *second)
            changed = convolution(inputs, outputs, 1, 2) if stride == 2 else []
            self.shortcut = nn.Sequential(*changed)

        def forward(self, x: Any) -> Any:
            return (self.body(x) + self.shortcut(x)).relu_()

    widths = [16] * (blocks + 1) + [32] * blocks + [64] * blocks
    stem = [*convolution(channels, 16, 3, 1), nn.ReLU(True)]
    body = [Block(*pair) for pair in zip(widths, widths[1:], strict=False)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)]
    return nn.Sequential(*stem, *body, *head)


def run_all(options: argparse.Namespace, summary: dict[str, Any]) -> None:
    """Runs what is not done yet, until the limit; keeps the summary on the disk."""
    deadline = time.monotonic() + (options.limit_seconds or 1e9) - GRACE
    for task in tasks(options):
        new = {"stage": task.stage, "status": "to do", "attempts": 0, "seconds": 0.0}
        record = summary["tasks"].setdefault(task.name, new)
        if "torch" in task.name and not importlib.util.find_spec("torch"):
            record |= {"status": "skipped", "note": "PyTorch is not installed"}
        elif record["status"] != "done" and time.monotonic() < deadline:
            log = options.output / f"{task.stage}.log"
            with contextlib.closing(execute(task, record, log, deadline)) as running:
                for _ in running:
                    write(options.output, summary)
            print(task.name, record["status"], record["note"], flush=True)
        write(options.output, summary)


def write(folder: pathlib.Path, summary: dict[str, Any]) -> None:
    """Replaces summary.json and summary.md: a crash leaves the old or the new ones."""
    text = json.dumps(summary, indent=2) + "\n"
    for name, content in (("summary.json", text), ("summary.md", markdown(summary))):
        temporary = folder / f".{name}.tmp"
        temporary.write_text(content)
        temporary.replace(folder / name)


def parse() -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", type=pathlib.Path, required=True, help="folder of all results")
    add("--data_dir", default="", help="of tfds, with cifar100 prepared")
    add("--stages", default=",".join(STAGES), help="some of them, by commas")
    add("--dtype", default="bfloat16", choices=DTYPES, help="of the whole runs")
    add("--updates_per_call", type=int, default=0, help="of all runs; 0: the default")
    add("--limit_seconds", type=float, default=0, help="of this call; 0: no limit")
    add("--reduced", action="store_true", help="tiny sizes, on CPU")
    add("--torch", choices=TORCH, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    options.output, options.stages = options.output.resolve(), options.stages.split(",")
    if not set(options.stages) <= set(STAGES):
        parser.error(f"--stages: expected some of {','.join(STAGES)}")
    return options


def main() -> int:
    """Runs the chosen stages; returns the exit status."""
    options = parse()
    if options.torch:
        measure_torch(options)
        return 0
    if options.reduced:
        os.environ["JAX_PLATFORMS"] = "cpu"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as by Ctrl-C
    (options.output / "runs").mkdir(parents=True, exist_ok=True)
    file = options.output / "summary.json"
    summary: dict[str, Any] = {"reduced": options.reduced, "commands": [], "tasks": {}}
    if file.exists():
        summary = json.loads(file.read_text())
    if summary["reduced"] != options.reduced:
        sys.exit(f"error: {file} is of other sizes (--reduced): give another --output")
    summary["commands"].append("python " + shlex.join(sys.argv))
    with contextlib.suppress(KeyboardInterrupt):
        run_all(options, summary)
    write(options.output, summary)
    print(f"\n{markdown(summary)}\n{file}")
    found = summary["tasks"].values()
    statuses = {task["status"] for task in found if task["stage"] in options.stages}
    return 1 if "failed" in statuses else 0 if statuses <= {"done", "skipped"} else 3


if __name__ == "__main__":
    sys.exit(main())
