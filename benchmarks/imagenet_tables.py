"""The tables of `imagenet_cost.py`: what chips and their hosts must do."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MIB = 2**20
UTILISATION = (0.3, 0.5)  # of the peak: an estimate


class Chip(NamedTuple):
    """An accelerator and the host that it usually comes in.

    Attributes:
      peak: FLOP/s in bfloat16, as the manufacturer says.
      bandwidth: bytes/s of its memory, as the manufacturer says.
      cores: physical cores of a host; clouds sell two virtual CPUs a core.
      chips: of a host.
    """

    peak: float
    bandwidth: float
    cores: int
    chips: int


# Peaks: cloud.google.com/tpu/docs/v4 and /v5e, NVIDIA's data sheets of A100 (40 GB) and
# H100 SXM (dense). Hosts: Google's ct4p-hightpu-4t (240 virtual CPUs), ct5lp-hightpu-8t
# (224), a2-highgpu-8g (96) and a3-highgpu-8g (208).
CHIPS = {
    "v4": Chip(275e12, 1228e9, 120, 4),
    "v5e": Chip(197e12, 819e9, 112, 8),
    "A100": Chip(312e12, 1555e9, 48, 8),
    "H100": Chip(989e12, 3350e9, 104, 8),
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def name_of(result: Mapping[str, Any]) -> list[str]:
    """The first two cells of a line: method, and whether with Meta."""
    return [result["method"], "yes" if result["prior"] == "meta" else "no"]


def short(number: float, digits: int) -> str:
    """A number with so many digits, besides zeros for thousands."""
    rounded = float(f"{number:.{digits}g}")
    return f"{rounded:,.{max(0, digits - len(str(int(rounded))))}f}"


def span(numbers: Sequence[float], digits: int) -> str:
    """The range of some numbers."""
    return f"{short(min(numbers), digits)}-{short(max(numbers), digits)}"


def cost_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Parameters, checkpoint, FLOPs and memory."""
    header = ["method", "Meta", "type", "parameters, M", "checkpoint, MiB"]
    header += ["GFLOP an image", *(f"MiB at {b}" for b in results[0]["batches"])]
    rows = [
        [
            *name_of(result),
            result["dtype"],
            f"{result['parameters'] / 1e6:.1f}",
            f"{result['bytes']['checkpoint'] / MIB:.0f}",
            f"{result['flops_per_image'] / 1e9:.1f}",
            *(f"{facts['memory'] / MIB:,.0f}" for facts in result["batches"].values()),
        ]
        for result in results
    ]
    return table(header, rows)


def rates(result: Mapping[str, Any], chip: Chip) -> list[float]:
    """Images a second that keep a chip busy, least and most."""
    return [share * chip.peak / result["flops_per_image"] for share in UTILISATION]


def slice_table(results: Sequence[Mapping[str, Any]], name: str) -> str:
    """What was compiled for a slice, and what bounds the images/s of a chip.

    Of a chip at its full bandwidth, as if an operation found nothing in the caches that
    another left, and at the share of the peak that is estimated.
    """
    chip = CHIPS.get(name.partition(":")[0])
    header = ["slice", "chips", "hosts", "method", "Meta", "type", "images a chip"]
    header += ["collectives an update (MB)", "MiB a chip", "GB moved a chip"]
    header += ["images/s a chip: by bytes", "by FLOPs"]
    rows = []
    for result in results:
        for batch, facts in result["batches"].items():
            exchanged = [
                f"{len(sizes)} {kind} ({sum(sizes) / 1e6:.1f})"
                for kind, sizes in facts["collectives"].items()
            ]
            bounds = [short(chip.bandwidth * batch / facts["moved"], 3)] if chip else []
            bounds += [span(rates(result, chip), 3)] if chip else []
            rows.append(
                [
                    name,
                    *(str(result[key]) for key in ("chips", "hosts")),
                    *name_of(result),
                    result["dtype"],
                    str(batch),
                    ", ".join(exchanged),
                    f"{facts['memory'] / MIB:,.0f}",
                    f"{facts['moved'] / 1e9:.2f}",
                    *(bounds or ["", ""]),
                ]
            )
    return table(header, rows)


def chip_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Images a second that keep a chip busy; in brackets, those of each core."""
    header = ["method", "Meta"]
    header += [f"{name} ({c.cores // c.chips} cores)" for name, c in CHIPS.items()]
    rows = []
    for result in results:
        cells = name_of(result)
        for chip in CHIPS.values():
            found = rates(result, chip)
            cores = [rate * chip.chips / chip.cores for rate in found]
            cells.append(f"{span(found, 3)} ({span(cores, 2)})")
        rows.append(cells)
    return table(header, rows)


def host_table(results: Sequence[Mapping[str, Any]], rate: float) -> str:
    """Chips that a host feeds, whose cores decode so many images a second each."""
    header, decoded = ["method", "Meta"], ["a host decodes, images/s", ""]
    for name, chip in CHIPS.items():
        header.append(f"{name}: {chip.cores} cores, {chip.chips} chips")
        decoded.append(short(chip.cores * rate, 3))
    rows = [decoded]
    for result in results:
        chips = [
            [chip.cores * rate / found for found in rates(result, chip)]
            for chip in CHIPS.values()
        ]
        rows.append([*name_of(result), *(span(found, 2) for found in chips)])
    return table(header, rows)


def run_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Images that a run trains on, and its checkpoints."""
    header = ["method", "Meta", "epochs"]
    for count in results[0]["runs"]:
        header += [f"images, M ({count} steps)", f"checkpoints, GiB ({count})"]
    rows = []
    for result in results:
        cells = [*name_of(result), str(result["epochs"])]
        for facts in result["runs"].values():
            cells.append(f"{facts['images'] / 1e6:.0f}")
            cells.append(f"{facts['checkpoints'] / MIB / 1024:.1f}")
        rows.append(cells)
    return table(header, rows)


def every(results: Sequence[Mapping[str, Any]], target: str, decode_rate: float) -> str:
    """All tables; those of chips, runs and hosts are of the first type alone.

    Args:
      results: what `imagenet_cost.measure` returns of each method.
      target: what was compiled for: "cpu", or a TPU slice.
      decode_rate: images/s that a core decodes; 0 leaves the table of hosts out.
    """
    one = [result for result in results if result["dtype"] == results[0]["dtype"]]
    found = [cost_table(results), chip_table(one), run_table(one)]
    if decode_rate:
        found.append(host_table(one, decode_rate))
    if results[0]["batches"]:
        found.append(slice_table(results, target))
    return "\n".join(found)
