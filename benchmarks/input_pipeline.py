"""Images a core decodes and crops in a second: ours, tf.data, PyTorch's DataLoader.

The same JPEG files go through the project's input (records to uint8 batches, and
decode.py alone over bytes in memory), through tf.data and through PyTorch's
DataLoader, for the random-resized crop of training and for the central crop of
evaluation. Each runs in a process of its own on the same `--cores` (1) with as many
decoding threads or processes; rounds alternate. Prints a table, and JSON with every
number.

    python benchmarks/input_pipeline.py --images FOLDER --output input.json

The rate is images a second of CPU time, which other programs on the machine disturb
least; `per_wall_s` is by the clock. A ratio is the median over the rounds of our rate
over a rival's (1 is equal, higher is better), with the least and the most. TensorFlow
and PyTorch are not dependencies of the project; a rival that cannot be imported is
skipped. `--rival_python` names the interpreter of an environment that has them.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import types
from typing import Any

import input_rivals
import numpy as np

OURS, DECODE = "bsce_jax", "bsce_jax decode.py"
CONTENDERS: dict[str, dict[str, Any]] = {
    OURS: {"builder": "ours", "workers": 0},
    "bsce_jax (processes)": {"builder": "ours", "workers": -1},
    DECODE: {"builder": "decode"},
    "tf.data": {"builder": "tf.data", "antialias": False},
    "tf.data antialiased": {"builder": "tf.data", "antialias": True},
    "DataLoader": {"builder": "DataLoader", "workers": 0},
    "DataLoader (processes)": {"builder": "DataLoader", "workers": -1},
}
Spec = input_rivals.Spec


def build_ours(spec: Spec) -> tuple[input_rivals.Batches, str]:
    """The project's input end to end: records on disk to batches."""
    import grain

    from bsce_jax.data import batches, records, streaming

    count, path = len(spec["files"]), os.path.join(spec["folder"], "array_record")
    write_records(spec["files"], path)
    whole = types.SimpleNamespace(
        filename=path, skip=0, take=count, examples_in_shard=count
    )
    reader = streaming.Reader(
        records=records.Encoded([whole], "image", "label"),
        numbers=np.arange(count),
        labels=np.zeros(count, np.int32),
        shape=(spec["size"], spec["size"], 3),
        resize=spec["resize"],
        crop_area=(0.08, 1.0) if spec["crop"] == "train" else None,
    )
    epochs = 10**8 // count
    plan = batches.Shuffled(np.arange(count), spec["batch"], epochs, seed=0, step=0)
    rows = np.arange(spec["batch"])
    found = streaming.read(reader, plan, rows, workers=spec["workers"])
    # Rows that only complete the last batch of an epoch are no images.
    images = (batch["images"][batch["valid"] > 0] for batch in found)
    return images, f"grain {grain.__version__}"


def build_decode(spec: Spec) -> tuple[input_rivals.Batches, str]:
    """decode.py alone, over files in memory."""
    import simplejpeg

    from bsce_jax.data import decode

    encoded = [pathlib.Path(file).read_bytes() for file in spec["files"]]

    def crop(row: int) -> np.ndarray:
        data = encoded[row % len(encoded)]
        if spec["crop"] == "train":
            return decode.train_crop(data, spec["size"], np.random.default_rng(row))
        return decode.test_crop(data, spec["size"], resize=spec["resize"])

    def found() -> input_rivals.Batches:
        row = 0
        while True:
            yield np.stack([crop(row + i) for i in range(spec["batch"])])
            row += spec["batch"]

    return found(), f"simplejpeg {simplejpeg.__version__}"


def write_records(files: list[str], path: str) -> None:
    """Writes the files as one shard, as bsce_jax.data.prepare image_folder does."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    from bsce_jax.data.builders import shards

    writer = ArrayRecordWriter(path, shards.OPTIONS)
    for file in files:
        example = tf_example_pb2.Example()
        feature = example.features.feature
        feature["image"].bytes_list.value.append(pathlib.Path(file).read_bytes())
        feature["label"].int64_list.value.append(0)
        writer.write(example.SerializeToString())
    writer.close()


class Contender:
    """A process that runs rounds of one pipeline."""

    def __init__(self, python: str, script: str) -> None:
        """Starts it."""
        self._process = subprocess.Popen(
            [python, script, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )

    def ask(self, line: str) -> dict[str, Any]:
        """Sends a line to `input_rivals.serve` and waits for the answer."""
        assert self._process.stdin and self._process.stdout
        print(line, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(f"error: a pipeline ended with status {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process and those that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def measure(files: list[str], crop: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times all contenders on the files, in turn, for one kind of crop."""
    common = {
        "files": files,
        "crop": crop,
        "size": options.size,
        "resize": options.resize,
        "batch": options.batch,
        "cores": sorted(os.sched_getaffinity(0))[-options.cores :],
    }
    ours, rivals = __file__, input_rivals.__file__
    running, facts = {}, {}
    rounds: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for name in options.contenders.split(","):
            mine = name.startswith(OURS)
            python = sys.executable if mine else options.rival_python
            spec = common | CONTENDERS[name] | {"folder": tempfile.mkdtemp(dir=folder)}
            if spec.get("workers") == -1:
                spec["workers"] = options.cores
            contender = Contender(python, ours if mine else rivals)
            stack.callback(contender.close)
            found = contender.ask(json.dumps(spec))
            if "missing" in found:
                print(f"{name}: skipped, {found['missing']}", file=sys.stderr)
                continue
            running[name], facts[name] = contender, found
        for _ in range(options.rounds):
            for name, contender in running.items():
                found = contender.ask(str(options.seconds))
                rounds.setdefault(name, []).append(found)
    return summary(rounds, facts)


def summary(
    rounds: dict[str, list[dict[str, float]]], facts: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Rates of every contender, and ratios of ours to each rival's."""
    rates = {
        name: {
            clock: [r["images"] / r[clock] for r in found] for clock in ("cpu", "wall")
        }
        for name, found in rounds.items()
    }
    result: dict[str, Any] = {}
    for name, clocks in rates.items():
        result[name] = facts[name] | {
            "per_core_s": spread(clocks["cpu"]),
            "per_wall_s": spread(clocks["wall"]),
        }
        if name.startswith(OURS):
            continue
        for own in (OURS, DECODE):
            if own in rates:
                pairs = zip(rates[own]["cpu"], clocks["cpu"], strict=True)
                ratio = spread([mine / theirs for mine, theirs in pairs])
                result[name][f"ratio of {own}"] = ratio
    return result


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most, of 4 digits."""
    numbers = statistics.median(values), min(values), max(values)
    names = ("median", "least", "most")
    return {n: float(f"{v:.4g}") for n, v in zip(names, numbers, strict=True)}


def table(results: dict[str, dict[str, Any]]) -> str:
    """One row a contender, one column a crop of a folder; images a CPU second."""
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    lines = ["| images/s a core |" + "".join(f" {c} |" for c in results)]
    lines.append("|---|" + "---|" * len(results))
    for name in names:
        cells = [cell(found.get(name)) for found in results.values()]
        lines.append(f"| {name} |" + "".join(f" {text} |" for text in cells))
    return "\n".join(lines)


def cell(found: dict[str, Any] | None) -> str:
    """Median [least-most], and the ratio of ours."""
    if found is None:
        return ""
    rate = found["per_core_s"]
    text = f"{rate['median']:.0f} [{rate['least']:.0f}-{rate['most']:.0f}]"
    ratio = found.get(f"ratio of {OURS}")
    return f"{text}, ours x{ratio['median']:.2f}" if ratio else text


def main() -> None:
    """Reads the flags, measures, prints the table and prints or writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", nargs="+", required=True, help="folders of JPEGs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a round")
    parser.add_argument("--crops", default="train,test")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--rival_python", default=sys.executable)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--resize", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--most_files", type=int, default=500)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--output", help="file for the JSON; else standard output")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for folder in options.images:
        found = pathlib.Path(folder).rglob("*.[jJ][pP]*[gG]")
        files = [str(path) for path in sorted(found)][: options.most_files]
        if not files:
            sys.exit(f"error: no JPEG in {folder}")
        for crop in options.crops.split(","):
            title = f"{pathlib.Path(folder).name}, {crop}"
            results[title] = measure(files, crop, options)
    print(table(results))
    text = json.dumps(
        {
            "benchmark": "input pipeline, images/s of CPU time",
            **{
                name: getattr(options, name)
                for name in ("rounds", "seconds", "batch", "cores")
            },
            "load_average": round(os.getloadavg()[0], 1),
            "machine": platform.processor() or platform.machine(),
            "results": results,
        },
        indent=2,
    )
    if options.output:
        pathlib.Path(options.output).write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        input_rivals.serve({"ours": build_ours, "decode": build_decode})
    else:
        main()
