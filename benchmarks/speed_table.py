"""The results of speed.py as a table."""

from collections.abc import Mapping, Sequence
from typing import Any


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """A table of all methods and priors."""
    header = (
        "method | prior | type | train images/s | over eager | over compiled | "
        "epoch images/s | over loader | evaluation images/s | herding classes/s | "
        "compile s | program MiB | share of the floor"
    )
    lines = [f"| {header} |", "|" + "---|" * len(header.split("|"))]
    for result in results:
        for prior, f in result["priors"].items():
            ratio = f["train"]["ratio"]
            fastest = [v for k, v in ratio.items() if k.startswith("compile")]
            cells = [
                result["method"],
                prior,
                result["dtype"],
                f["train"]["per_s"],
                ratio.get("eager"),
                min(fastest) if fastest else None,
                f["epoch"]["per_s"],
                f["epoch"]["ratio"].get("loader"),
                f["evaluate"]["per_s"],
                f["herding"]["per_s"],
                round(sum(f["compile_s"].values()), 1),
                round((f["temp_bytes"] + f["argument_bytes"]) / 2**20, 1),
                f.get("share_of_floor"),
            ]
            texts = ["" if cell is None else str(cell) for cell in cells]
            lines.append("| " + " | ".join(texts) + " |")
    for result in results:
        for name, more in result["more_time_percent"].items():
            title = f"{result['method']}, {result['dtype']}, {name}"
            lines.append(
                f"\n{title}: {more['median']} % more time an update "
                f"({more['least']} to {more['most']})"
            )
    return "\n".join(lines)
