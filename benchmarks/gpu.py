"""Everything that a GPU is needed for, in one command that may be repeated.

    python benchmarks/gpu.py --output gpu_results [--data_dir TFDS_FOLDER]

Stages, in this order (--stages names some of them):

    speed      images/s in training, against PyTorch (where it is installed) on the
               same device: data on the device, augmentation, all that a run does
    meta       time and memory of the gradient of alpha (benchmarks/meta_gradient.py)
    none, balanced, meta_run
               whole runs of the paper's CIFAR-100 protocol (B50, 5 steps, 250 epochs)
               with the softmax, BalancedS-CE and Meta BalancedS-CE, beside the paper's
               accuracies; a base step that one run has finished serves the others

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
import dataclasses
import importlib.util
import json
import os
import pathlib
import runpy
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAGES = ("speed", "meta", "none", "balanced", "meta_run")
# Average incremental accuracy of IL-Baseline with 5 steps (Jodelet et al., Table 1).
PAPER = {"none": 43.80, "balanced": 62.22, "meta_run": 64.11}
SPEED = (  # library-type-variant; PyTorch does what our base step does
    "bsce_jax-bfloat16-base",
    "torch-bfloat16-eager",
    "bsce_jax-float32-base",
    "torch-float32-eager",
    "torch-bfloat16-compile",
    "torch-bfloat16-graphs",
    "bsce_jax-bfloat16-incremental",
)
GRACE = 30.0  # seconds that a task gets to save and end
STOPPED = (-signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class Task:
    """A process that leaves a JSON file `result` if it succeeds."""

    name: str
    stage: str
    command: list[str]
    result: pathlib.Path


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    """The tasks of the chosen stages, each made when those before it have ended."""
    here = pathlib.Path(__file__).resolve()
    reduced = ["--reduced"] if options.reduced else []
    for stage in options.stages:
        if stage in PAPER:
            yield run_task(stage, options)
            continue
        for name in SPEED if stage == "speed" else ("bfloat16", "float32"):
            result = options.output / "runs" / f"{stage}-{name}.json"
            if stage == "speed":
                flags = [str(here), f"--measure={name}"]
                flags.append(f"--updates_per_call={options.updates_per_call}")
            else:
                flags = [str(here.with_name("meta_gradient.py")), f"--dtype={name}"]
            command = [sys.executable, *flags, f"--output={result}", *reduced]
            yield Task(f"{stage}-{name}", stage, command, result)


def run_task(stage: str, options: argparse.Namespace) -> Task:
    """A whole run; from another run's base step where one is finished."""
    prior = "meta" if stage == "meta_run" else stage
    file = "digits.py" if options.reduced else "cifar100.py"
    workdirs = {name: options.output / "runs" / name for name in PAPER}
    settings: dict[str, Any] = {
        "model.dtype": options.dtype,
        "updates_per_call": options.updates_per_call,
        "checkpoint.minutes": 2.0,
    }
    if options.reduced:
        settings |= {"optim.epochs": 2, "optim.base_epochs": 2}
        # With equal counts, as in CIFAR-100, the priors share their base step.
        settings["data.max_per_class"] = 100
    if options.data_dir:
        settings["data.data_dir"] = options.data_dir
    others = [path for path in workdirs.values() if finished_steps(path)]
    if others and workdirs[stage] not in others:
        settings["init_from"] = others[0]
    command = [sys.executable, "-m", "bsce_jax.main"]
    command.append(f"--config={ROOT / 'configs' / file}:prior={prior}")
    command.append(f"--workdir={workdirs[stage]}")
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    return Task(stage, stage, command, workdirs[stage] / "results.json")


def finished_steps(workdir: pathlib.Path) -> int:
    """Steps that a run has finished."""
    path = workdir / "results.json"
    return len(json.loads(path.read_text())["steps"]) if path.exists() else 0


def execute(
    task: Task, record: dict[str, Any], log: pathlib.Path, deadline: float
) -> Iterator[None]:
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
                wait(process, min(5.0, deadline - time.monotonic()))
        finally:
            if process.poll() is None:
                process.terminate()
                wait(process, GRACE)
            if process.poll() is None:
                process.kill()
            record["exit_status"] = process.wait()
            record["seconds"] = round(before + time.monotonic() - start, 1)
            judge(task, record, log)


def wait(process: subprocess.Popen, seconds: float) -> None:
    """Waits for a process to end, but not longer than that."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, seconds))


def judge(task: Task, record: dict[str, Any], log: pathlib.Path) -> None:
    """Fills in the outcome of a task that has ended."""
    if record["exit_status"] == 0 and task.result.exists():
        found = json.loads(task.result.read_text())
        record["result"] = run_result(found) if task.stage in PAPER else found
        record["status"] = "done"
    elif record["exit_status"] in STOPPED:
        record["status"] = "unfinished"
        if task.stage in PAPER:
            record["note"] = f"{finished_steps(task.result.parent)} steps finished"
    else:
        record["status"] = "failed"
        lines = log.read_text(errors="replace").strip().splitlines()
        record["note"] = lines[-1][:300]


def run_result(results: dict[str, Any]) -> dict[str, Any]:
    """What a run's results.json says, in short."""
    images, seconds, steps = 0, 0.0, results["steps"]
    for step in steps:
        rate = step["telemetry"]["images_per_second"]
        if rate:  # none in a base step that was taken over
            trained = step["result"]["train_images"] * len(step["result"]["loss"])
            images, seconds = images + trained, seconds + trained / rate
    return {
        **results["summary"],
        "top1": [step["result"]["top1"] for step in steps],
        "alpha": [step["result"]["alpha"][-1:] for step in steps],
        "images": images,
        "images_per_s": images / seconds if seconds else None,
        "own_base_step": bool(steps[0]["telemetry"]["images_per_second"]),
    }


def markdown(summary: dict[str, Any]) -> str:
    """The summary for readers."""
    call, done = summary["calls"][-1], summary["tasks"]
    found = call["environment"]
    lines = [
        "# Results of benchmarks/gpu.py",
        "",
        f"{found['device']}, JAX {found['versions']['jax']}, Python "
        f"{found['versions']['python']}, commit {found['commit'] or 'unknown'}"
        + (", **reduced sizes: not comparable with anything**" * summary["reduced"]),
        "",
        f"`{call['command']}`",
    ]

    def of_stages(*stages: str) -> Iterator[tuple[str, dict[str, Any], dict]]:
        for name, task in done.items():
            if task["stage"] in stages:
                yield name, task, task.get("result") or {}

    torch = done.get("speed-torch-bfloat16-eager", {}).get("result") or {}
    rows = []
    for name, task, result in of_stages("speed"):
        rate, unit = result.get("images_per_s"), torch.get("images_per_s")
        ratio = rate / unit if rate and unit else None
        cells = [rate, result.get("ms_per_update"), ratio, result.get("device")]
        rows.append([name.removeprefix("speed-"), *cells, outcome(task)])
    header = "program | images/s | ms an update | PyTorch eager bfloat16 = 1 | device"
    lines += section("Training speed", header, rows)
    rows = []
    for _, task, result in of_stages("meta"):
        for part in result.get("results", [{}])[-1:]:
            for name in [key for key in part if key != "conv_chunks"]:
                values, goal = part[name], result["targets"].get(name, {})
                row = [result["options"]["dtype"], name, values["ms_median"]]
                for kind in ("time_ratio", "memory_ratio"):
                    row += [values[kind], goal.get(kind)]
                rows.append([*row, outcome(task)])
    header = "type | program | ms | train steps of time | at most | of memory | at most"
    lines += section("Gradient of alpha", header, rows)
    rows = []
    for name, task, result in of_stages(*PAPER):
        base = {True: "own", False: "taken over"}.get(result.get("own_base_step"))
        row = [name, result.get("average_incremental_top1"), PAPER[name]]
        row += [result.get("images_per_s"), base, task["seconds"], outcome(task)]
        rows.append(row)
    header = "run | average incremental accuracy | paper | images/s | base step | s"
    lines += section("Whole runs", header, rows)
    return "\n".join(lines) + "\n"


def outcome(task: dict[str, Any]) -> str:
    """Status of a task, and why."""
    return ": ".join(filter(None, (task["status"], task.get("note", ""))))


def section(title: str, header: str, rows: Iterable[list[Any]]) -> list[str]:
    """A headed Markdown table; empty cells where there is no number."""
    header += " | outcome"
    lines = [
        "",
        f"## {title}",
        "",
        f"| {header} |",
        "|---" * len(header.split("|")) + "|",
    ]
    for row in rows:
        cells = (
            "" if c is None else f"{c:.4g}" if type(c) is float else c for c in row
        )
        lines.append("| " + " | ".join(str(c).replace("|", "/") for c in cells) + " |")
    return lines


def measure(options: argparse.Namespace) -> None:
    """Measures one entry of SPEED and writes its JSON."""
    library, dtype, variant = options.measure.split("-")
    function = measure_ours if library == "bsce_jax" else measure_torch
    marks, found = function(dtype, variant, options)
    seconds = [
        later[0] - mark[0] for mark, later in zip(marks, marks[1:], strict=False)
    ]
    rates = [mark[1] / s for mark, s in zip(marks[1:], seconds, strict=True)]
    # The first of the calls compiled, and the second may still have warmed up.
    rates = rates[2:] or rates[-1:]
    rate = statistics.median(rates)
    found |= {
        "images_per_s": round(rate, 1),
        "images_per_s_best": round(max(rates), 1),
        "ms_per_update": round(1e3 * found["batch"] / rate, 3),
        "seconds_to_first_call": round(seconds[0], 1),
        "calls": len(rates),
    }
    options.output.write_text(json.dumps(found, indent=2) + "\n")


def measure_ours(
    dtype: str, variant: str, options: argparse.Namespace
) -> tuple[list[tuple[float, int]], dict[str, Any]]:
    """Trains a step as a run does, on random images.

    Args:
      dtype: compute type.
      variant: "base", the base step, or "incremental", the first one with a teacher.
      options: of the command line.

    Returns:
      (time, images since the mark before) when training starts and after each call,
      and facts for the result.
    """
    import numpy as np

    from bsce_jax import (
        experiment,
        parallel,
        plan,
        programs,
        scenario,
        session,
        training,
    )
    from bsce_jax.config import resolve
    from bsce_jax.context import make_context
    from bsce_jax.state import Images

    file = "digits.py" if options.reduced else "cifar100.py"
    config = runpy.run_path(str(ROOT / "configs" / file))["get_config"](
        "prior=balanced"
    )
    config.model.dtype, config.updates_per_call = dtype, options.updates_per_call
    config = resolve(config)
    images, labels = random_data(options.reduced)
    classes = int(labels.max()) + 1
    groups = config.scenario.base_classes, config.scenario.steps
    dataset = plan.Dataset(
        train_images=images,
        train_labels=labels,
        test_images=images[:1],
        test_labels=labels[:1],
        class_names=tuple(map(str, range(classes))),
        class_order=np.arange(classes),
        groups=scenario.class_groups(classes, *groups),
    )
    devices = parallel.create(config.parallel)
    compiled = programs.build(config, devices, classes)
    data = parallel.replicate(devices, Images(images, labels))
    run = session.Run(
        config, options.output.parent, dataset, compiled, data, data, {}, None
    )
    progress = session.initial(run)
    if variant == "incremental":
        progress = experiment.begin(run, progress, 1)
    step = plan.planned_steps(config, dataset)[progress.step]
    context = make_context(run, progress, step)
    marks = [(time.perf_counter(), 0)]

    def after_call(history: training.History, images: int) -> bool:
        marks.append((time.perf_counter(), images))
        return False

    with contextlib.suppress(training.StopRequested):
        training.fit(
            compiled,
            progress.state,
            context,
            data,
            training.make_plan(config, step),
            progress.history,
            after_call=after_call,
            save=lambda state, history: None,
            stop=lambda: enough(marks, options.seconds),
        )
    device = devices.mesh.devices.flat[0].device_kind
    facts = {"device": device, "batch": config.optim.batch_size}
    # The last call was fetched together with the one before.
    return marks[:-1], facts | {"updates_per_call": compiled.updates_per_call}


def enough(marks: list[tuple[float, int]], seconds: float) -> bool:
    """Whether calls were measured for that long, after three to warm up."""
    return len(marks) > 4 and marks[-1][0] - marks[3][0] >= seconds


def random_data(reduced: bool) -> tuple[Any, Any]:
    """Random uint8 images [N, H, W, channels], sorted by int32 labels [N]."""
    import numpy as np

    classes, per_class, shape = 100, 500, (32, 32, 3)
    if reduced:
        classes, per_class, shape = 10, 144, (8, 8, 1)
    labels = np.repeat(np.arange(classes, dtype=np.int32), per_class)
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (len(labels), *shape), np.uint8), labels


def measure_torch(
    dtype: str, variant: str, options: argparse.Namespace
) -> tuple[list[tuple[float, int]], dict[str, Any]]:
    """The base step in PyTorch: the same network, augmentation and optimiser.

    Args, Returns: as `measure_ours`; the variants are "eager", "compile" (all of it
    but the optimiser) and "graphs" (compiled, and replayed as CUDA graphs).
    """
    import torch

    device = "cpu" if options.reduced or not torch.cuda.is_available() else "cuda"
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32, which is XLA's default too
    images, labels = (torch.from_numpy(a) for a in random_data(options.reduced))
    base, size, padding = len(labels) // 2, images.shape[1], images.shape[1] // 8
    blocks, batch, updates = (1, 32, 10) if options.reduced else (5, 128, 50)
    classes, channels = int(labels.max()) + 1, images.shape[3]
    labels = labels.to(device, torch.int64)
    widths = (0, 0, padding, padding, padding, padding)
    padded = torch.nn.functional.pad(images, widths).to(device)
    network = torch_resnet(blocks, channels, classes)
    network.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4, fused=True
    )
    pixels = torch.arange(size, device=device)

    def loss_of(index: Any, top: Any, left: Any, flip: Any) -> Any:
        rows, columns = (
            top + pixels,
            left + torch.where(flip, size - 1 - pixels, pixels),
        )
        crops = padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        normalised = (crops.float() / 255 - 0.5) / 0.25
        x = normalised.permute(0, 3, 1, 2)  # NHWC in memory: channels_last
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            return torch.nn.functional.cross_entropy(network(x), labels[index])

    if variant != "eager":
        mode = {"compile": "default", "graphs": "reduce-overhead"}[variant]
        loss_of = torch.compile(loss_of, mode=mode)
    order = torch.randperm(base, device=device)
    marks, first = [(time.perf_counter(), 0)], 0
    while not enough(marks, options.seconds):
        for _ in range(updates):
            if first + batch > base:
                order, first = torch.randperm(base, device=device), 0
            index = order[first : first + batch]
            first += batch
            top, left = torch.randint(2 * padding + 1, (2, batch, 1), device=device)
            flip = torch.rand(batch, 1, device=device) < 0.5
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(index, top, left, flip)
            loss.backward()
            optimizer.step()
        if not loss.isfinite():  # waits for the device
            sys.exit("error: PyTorch's loss is not finite")
        marks.append((time.perf_counter(), updates * batch))
    name = torch.cuda.get_device_name() if device == "cuda" else device
    facts = {"device": name, "batch": batch, "torch": torch.__version__}
    return marks, facts | {"updates_per_call": updates}


def torch_resnet(blocks: int, channels: int, classes: int) -> Any:
    """The CIFAR ResNet of 6 * blocks + 2 layers, with 1x1 convolutions as shortcuts."""
    from torch import nn

    def convolution(inputs: int, outputs: int, size: int, stride: int) -> list[Any]:
        conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        return [conv, nn.BatchNorm2d(outputs)]

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            first, second = (inputs, outputs, 3, stride), (outputs, outputs, 3, 1)
            self.body = nn.Sequential(
                *convolution(*first), nn.ReLU(True), *convolution(*second)
            )
            changes = stride != 1 or inputs != outputs
            self.shortcut = nn.Sequential(
                *(convolution(inputs, outputs, 1, stride) if changes else [])
            )

        def forward(self, x: Any) -> Any:
            return nn.functional.relu(self.body(x) + self.shortcut(x), inplace=True)

    layers = [*convolution(channels, 16, 3, 1), nn.ReLU(True)]
    width = 16
    for outputs in (16, 32, 64):
        for block in range(blocks):
            layers.append(
                Block(width, outputs, 2 if block == 0 and outputs > 16 else 1)
            )
            width = outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
    return nn.Sequential(*layers, *head)


def environment() -> dict[str, Any]:
    """The package's record of versions, device and commit, from another process."""
    code = "import json; from bsce_jax import telemetry\n"
    code += "print(json.dumps(telemetry.environment()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        sys.exit("error: bsce_jax cannot be imported, see above")
    return json.loads(done.stdout.splitlines()[-1])


def parse() -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    path = pathlib.Path
    parser.add_argument("--output", type=path, required=True, help="folder")
    parser.add_argument(
        "--data_dir", default="", help="of tfds, with cifar100 prepared"
    )
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them")
    parser.add_argument("--dtype", default="bfloat16", help="of the whole runs")
    parser.add_argument(
        "--updates_per_call", type=int, default=0, help="0: the default"
    )
    parser.add_argument("--limit_seconds", type=float, default=0, help="0: no limit")
    parser.add_argument("--reduced", action="store_true", help="tiny sizes, on CPU")
    parser.add_argument("--seconds", type=float, default=10, help="of a speed test")
    parser.add_argument("--measure", choices=SPEED, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.output = options.output.resolve()
    options.stages = [s for s in STAGES if s in options.stages.split(",")]
    return options


def run_all(options: argparse.Namespace, summary: dict[str, Any]) -> None:
    """Runs what is not done yet, until the limit; `summary` is always up to date."""
    deadline = time.monotonic() + (options.limit_seconds or 1e9) - GRACE
    for task in tasks(options):
        new = {"stage": task.stage, "status": "to do", "attempts": 0, "seconds": 0.0}
        record = summary["tasks"].setdefault(task.name, new)
        if record["status"] == "done" or time.monotonic() >= deadline:
            continue
        if missing := unavailable(task, options):
            record |= {"status": "skipped", "note": missing, "result": None}
        else:
            record["call"] = len(summary["calls"]) - 1
            log = options.output / f"{task.stage}.log"
            with contextlib.closing(execute(task, record, log, deadline)) as running:
                for _ in running:
                    write(options.output, summary)
        write(options.output, summary)
        print(f"{task.name}: {outcome(record)}, {record['seconds']:.0f} s", flush=True)


def unavailable(task: Task, options: argparse.Namespace) -> str:
    """Why a task cannot be run here; "" if it can."""
    if "torch" in task.name and not importlib.util.find_spec("torch"):
        return "PyTorch is not installed"
    if "graphs" in task.name and options.reduced:
        return "CUDA graphs need a GPU"
    return ""


def write(folder: pathlib.Path, summary: dict[str, Any]) -> None:
    """Replaces summary.json and summary.md: a crash leaves the old or the new ones."""
    text = json.dumps(summary, indent=2) + "\n"
    for name, content in (("summary.json", text), ("summary.md", markdown(summary))):
        temporary = folder / f".{name}.tmp"
        temporary.write_text(content)
        temporary.replace(folder / name)


def main() -> int:
    """Runs the chosen stages; returns the exit status."""
    options = parse()
    if options.reduced:
        os.environ["JAX_PLATFORMS"] = "cpu"
        options.seconds = min(options.seconds, 1.0)
    if options.measure:
        measure(options)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as by Ctrl-C
    (options.output / "runs").mkdir(parents=True, exist_ok=True)
    file = options.output / "summary.json"
    summary: dict[str, Any] = {"reduced": options.reduced, "calls": [], "tasks": {}}
    if file.exists():
        summary = json.loads(file.read_text())
    if summary["reduced"] != options.reduced:
        sys.exit(f"error: {file} is of other sizes (--reduced): give another --output")
    call = {"command": "python " + shlex.join(sys.argv), "started": time.time()}
    summary["calls"].append(call | {"environment": environment()})
    try:
        run_all(options, summary)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    finally:
        write(options.output, summary)
    print(f"\n{markdown(summary)}\n{file}")
    records = [r for r in summary["tasks"].values() if r["stage"] in options.stages]
    statuses = {record["status"] for record in records}
    if "failed" in statuses:
        return 1
    return 0 if statuses <= {"done", "skipped"} else 3


if __name__ == "__main__":
    sys.exit(main())
