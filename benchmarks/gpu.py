"""Everything that a GPU is needed for, in one command that may be repeated.

    python benchmarks/gpu.py --output gpu_results [--data_dir TFDS_FOLDER]

Stages, in this order (--stages names some of them, separated by commas):

    runs     the paper's CIFAR-100 cells with 5 steps, with memory (Table 1) and without
             (Table 3), and a fixed alpha (Table 5), all in one process:
             python -m bsce_jax.reproduce --in_process, in the folder reproduce
    graphs   more or less of an update in a CUDA graph (cuda_graphs.py)
    speed    every method and prior against PyTorch, if installed (speed.py), with what
             was fastest in `graphs`
    meta     time and memory of the gradient of alpha (meta_gradient.py)

A stage consists of tasks, each a process of its own. The folder --output gets
summary.json and summary.md, rewritten when a task ends, <stage>.log with all that the
tasks print, traces/ with profiles, and tasks/ with results. Called again with the same
--output it skips what is done and continues the runs from their checkpoints; a task
that was cut short begins again, but its finished rounds are in the summary. Where a
command may only last so long, give --limit_seconds and repeat it; no task begins that
has not a minute or two. Exit status: 0 all done, 1 a task failed, 3 something is left.

--reduced does everything at a tiny size, on CPU, with the digits data.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import speed_table

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAGES = ("runs", "graphs", "speed", "meta")
# Seconds that a task of a stage must have to be worth its start.
LEAST = {"runs": 120, "graphs": 60, "speed": 150, "meta": 90}
SCRIPTS = {"graphs": "cuda_graphs", "speed": "speed", "meta": "meta_gradient"}
METHODS = ("il_baseline", "lucir", "podnet")
# The cells of the whole runs, in this order: "5:..." is a row of Table 5.
ROWS = ("1:il_baseline_balanced", "1:il_baseline", "1:il_baseline_meta", "5:alpha-0.25")
ROWS += ("1:lucir_balanced", "1:lucir", "1:podnet_balanced", "1:podnet")
ROWS += ("3:lucir_balanced", "3:lucir_relaxed", "3:lucir")
ROWS += ("3:podnet_balanced", "3:podnet_relaxed", "3:podnet")
DTYPES = ("bfloat16", "float32")  # float32 is TF32 on GPUs, in JAX and in PyTorch
# Peak rates of an H100 SXM, dense; --tflops and --bandwidth give another device's.
TFLOPS, BANDWIDTH = ("bfloat16=989", "float32=494"), 3.35
GRACE = 15.0  # seconds that a task gets to save and end
LEFT = 3  # exit status of a task that has saved and has more to do


class Task(NamedTuple):
    """A process that leaves a JSON file `result` if it succeeds.

    `platforms` takes the place of JAX_PLATFORMS, "": does not.
    """

    name: str
    stage: str
    command: list[str]
    result: pathlib.Path
    platforms: str = ""


def tasks(options: argparse.Namespace, deadline: float) -> Iterator[Task]:
    """The tasks of the chosen stages, each made when those before it have ended."""
    pairs = [(m, dtype) for m in options.methods for dtype in options.dtypes]
    first = pairs[0]
    if "runs" in options.stages:
        yield runs_task(options, deadline)
    pairs = pairs[:1] if options.reduced else pairs
    common = ["--updates_per_call", str(options.updates_per_call)]
    flags = ["--method", first[0], "--dtype", first[1], *common, "--rounds", "3"]
    timed = script_task("graphs", *first, flags, options)
    if "graphs" in options.stages:
        yield timed
    for method, dtype in pairs if "speed" in options.stages else ():
        flags = ["--methods", method, "--dtypes", dtype, "--tflops", *options.tflops]
        flags += ["--bandwidth", str(options.bandwidth), *common]
        flags += ["--graphs", fastest(timed)]
        flags += ["--profile", str(options.output / "traces" / f"{method}-{dtype}")]
        flags += ["--no-startup"] if (method, dtype) != first else []
        yield script_task("speed", method, dtype, flags, options)
    for method, dtype in pairs if "meta" in options.stages else ():
        flags = ["--method", method, "--dtype", dtype]
        yield script_task("meta", method, dtype, flags, options)


def script_task(
    stage: str, method: str, dtype: str, flags: list[str], options: argparse.Namespace
) -> Task:
    """A benchmark script that writes JSON."""
    name = f"{stage}-{method}-{dtype}"
    result = options.output / "tasks" / f"{name}.json"
    script = ROOT / "benchmarks" / f"{SCRIPTS[stage]}.py"
    command = [sys.executable, str(script), *flags, f"--output={result}"]
    return Task(name, stage, command + ["--reduced"] * options.reduced, result)


def fastest(timed: Task) -> str:
    """The kind of graphs that a task has found to be the fastest, or XLA's own.

    What an earlier call with the same --output has found counts.
    """
    if not timed.result.exists():
        return "default"
    found = _json(timed.result)["results"]
    return max(found, key=lambda kind: kind["train"]["per_s"])["graphs"]


def runs_task(options: argparse.Namespace, deadline: float) -> Task:
    """The whole runs, as far as there is time."""
    output = options.output / "reproduce"
    command = [sys.executable, "-m", "bsce_jax.reproduce", f"--output={output}"]
    command.append("--in_process")
    if options.reduced:
        file = ROOT / "benchmarks" / "digits_reduced.py"
        command += ["--table", "1", "--rows", "il_baseline", "il_baseline_balanced"]
        command += [f"--file=cifar100={file}"]
    else:
        command += ["--table", "1", "3", "5", "--rows", *ROWS]
    command += ["--dataset", "cifar100", "--columns", "cifar100-5"]
    command += [] if options.reduced else ["5-average"]
    if options.limit_seconds:
        left = max(LEAST["runs"], deadline - time.monotonic())
        command.append(f"--minutes={left / 60:.2f}")
    fields = {"updates_per_call": options.updates_per_call}
    if options.dtype != "float32":  # a field that is set is a change of the protocol
        fields["model.dtype"] = options.dtype
    command += [f"--config.{name}={value}" for name, value in fields.items() if value]
    # JAX passes over cuda silently where cpu is named too.
    platforms = "" if options.reduced else "cuda"
    return Task("runs", "runs", command, output / "manifest.json", platforms)


def execute(
    task: Task, record: dict[str, Any], log: pathlib.Path, deadline: float
) -> Generator[None, None, None]:
    """Runs a task until it ends or the deadline comes, keeping its record.

    Yields every few seconds, for the record to be written; closing it ends the task.
    """
    before, start = record["seconds"], time.monotonic()
    record |= {"status": "running", "note": "", "log": log.name}
    record |= {
        "command": shlex.join(task.command),
        "attempts": record["attempts"] + 1,
    }
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    with log.open("a") as file:
        print(f"$ {record['command']}", file=file, flush=True)
        process = subprocess.Popen(
            task.command,
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "JAX_PLATFORMS": task.platforms or os.environ.get("JAX_PLATFORMS", ""),
            },
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
    if task.result.exists():  # of an unfinished task, what it has found so far
        read = found_runs if task.stage == "runs" else _json
        record["result"] = read(task.result)
    if record["exit_status"] == 0 and task.result.exists():
        record["status"] = "done"
    elif record["exit_status"] in (LEFT, -signal.SIGTERM, -signal.SIGKILL, 128 + 15):
        record["status"] = "unfinished"
    else:
        record["status"] = "failed"
        record["note"] = log.read_text(errors="replace").strip().splitlines()[-1][:300]


def _json(file: pathlib.Path) -> Any:
    return json.loads(file.read_text())


def found_runs(manifest: pathlib.Path) -> dict[str, Any]:
    """What the whole runs have found so far: status and accuracy of each, by name."""
    found = {}
    for cell in json.loads(manifest.read_text())["cells"]:
        for run in cell["runs"]:
            path = manifest.parent / run["workdir"] / "results.json"
            results = json.loads(path.read_text()) if path.exists() else {"steps": []}
            found[run["name"]] = {
                "status": run["status"],
                "steps": len(results["steps"]),
                "average_incremental_top1": results.get("summary", {}).get(
                    "average_incremental_top1"
                ),
                "seconds": sum(s["telemetry"]["seconds"] for s in results["steps"]),
            }
    return found


def markdown(summary: dict[str, Any]) -> str:
    """The summary for readers."""
    lines = ["# Results of benchmarks/gpu.py", f"`{summary['commands'][-1]}`"]
    if summary["reduced"]:
        lines.append("**Tiny sizes: the numbers mean nothing.**")
    outcomes, graphs, speed, meta, runs = [], [], [], [], []
    environment = None
    for name, task in summary["tasks"].items():
        result = task.get("result", {})
        outcomes.append([name, task["status"], task["seconds"], task.get("note")])
        environment = result.get("environment", environment)
        if task["stage"] == "runs":
            runs += [[run, *facts.values()] for run, facts in result.items()]
        elif task["stage"] == "graphs":
            for kind in result.get("results", []):
                figures = [kind[key]["per_s"] for key in ("train", "epoch")]
                ratio = kind["train"]["ratio"]["default"]
                graphs.append([kind["graphs"], *figures, ratio, kind["compile_s"]])
        elif task["stage"] == "speed":
            speed += result.get("results", [])
        else:
            part, targets = result.get("results", [{}])[-1], result.get("targets", {})
            for key in [key for key in part if key != "conv_chunks"]:
                row = [name.removeprefix("meta-"), key, part[key].get("ms_median")]
                for kind in ("time_ratio", "memory_ratio"):
                    row += [part[key].get(kind), targets.get(key, {}).get(kind)]
                meta.append(row)
    if environment:
        source = f"JAX {environment['versions']['jax']}, commit {environment['commit']}"
        lines.append(f"{environment['device']}, {source}")
    header = "gpu_graphs | training step, images/s | whole epochs, images/s"
    header += " | training step, default = 1 | compile s"
    lines += ["## CUDA graphs", table(header, graphs)]
    lines += ["## Speed", speed_table.markdown(speed)]
    header = "type | program | ms | time (train step = 1) | at most | memory | at most"
    lines += ["## Gradient of alpha", table(header, meta)]
    header = "run | status | steps | average incremental accuracy | seconds"
    lines += ["## Whole runs", "Beside the paper's numbers: reproduce/report.md"]
    lines += [table(header, runs)]
    lines += ["## Tasks", table("task | status | seconds | note", outcomes)]
    return "\n\n".join(lines) + "\n"


def table(header: str, rows: list[list[Any]]) -> str:
    """A Markdown table; cells are empty where there is no number."""
    lines = [f"| {header} |", "|" + "---|" * len(header.split("|"))]
    for row in rows:
        cells = [f"{c:.4g}" if isinstance(c, float) else c or "" for c in row]
        lines.append("| " + " | ".join(str(c).replace("|", "/") for c in cells) + " |")
    return "\n".join(lines)


def run_all(options: argparse.Namespace, summary: dict[str, Any]) -> None:
    """Runs what is not done yet, until the limit; keeps the summary on the disk."""
    deadline = time.monotonic() + (options.limit_seconds or 1e9) - GRACE
    for task in tasks(options, deadline):
        new = {"stage": task.stage, "status": "to do", "attempts": 0, "seconds": 0.0}
        record = summary["tasks"].setdefault(task.name, new)
        left = deadline - time.monotonic()
        if record["status"] != "done" and left > LEAST[task.stage]:
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
    add("--methods", nargs="+", default=METHODS, choices=METHODS)
    add("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    add("--dtype", default="float32", choices=DTYPES, help="of the whole runs")
    add("--updates_per_call", type=int, default=0, help="of all; 0: the default")
    add("--limit_seconds", type=float, default=0, help="of this call; 0: no limit")
    add("--tflops", nargs="*", default=TFLOPS, metavar="TYPE=NUMBER", help="peaks")
    add("--bandwidth", type=float, default=BANDWIDTH, help="peak, TB/s")
    add("--reduced", action="store_true", help="tiny sizes, on CPU")
    options = parser.parse_args()
    options.output, options.stages = options.output.resolve(), options.stages.split(",")
    if not set(options.stages) <= set(STAGES):
        parser.error(f"--stages: expected some of {','.join(STAGES)}")
    return options


def main() -> int:
    """Runs the chosen stages; returns the exit status."""
    options = parse()
    # "cpu" is for XLA's counts of FLOPs (cost.py). Without a GPU a task fails, and does
    # not take hours on the CPU: see meta_gradient.parse_reducible.
    platforms = "cpu" if options.reduced else "cuda,cpu"
    os.environ.setdefault("JAX_PLATFORMS", platforms)
    if options.data_dir:
        os.environ["TFDS_DATA_DIR"] = str(pathlib.Path(options.data_dir).resolve())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as by Ctrl-C
    (options.output / "tasks").mkdir(parents=True, exist_ok=True)
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
    return 1 if "failed" in statuses else 0 if statuses == {"done"} else 3


if __name__ == "__main__":
    sys.exit(main())
