"""The costs of ImageNet: the script runs at tiny sizes; the manual has its numbers."""

import argparse
import json

import pytest

from tests.runs import ROOT
from tests.test_benchmarks import load, run  # noqa: F401

IMAGES = 1_281_167
MANUAL = ROOT / "docs" / "launching.md"


def test_sizes_of_the_manual(load):  # noqa: F811
    cost, manual = load("imagenet_cost"), MANUAL.read_text()
    options = argparse.Namespace(pixels=224, classes=1000, width=0)
    for method in ("il_baseline", "podnet"):
        config, program = cost.make_program(method, "balanced", "float32", options)
        found = cost.sizes(config, program, options)
        assert f"{found['parameters'] / 1e6:.1f} M" in manual
        assert f"{found['bytes']['checkpoint'] / 2**20:.0f} MiB" in manual


@pytest.mark.slow
def test_imagenet_cost(tmp_path):
    output = tmp_path / "cost.json"
    flags = ["--method=il_baseline", "--prior=meta", "--dtype=float32", "--batch=2"]
    flags += ["--pixels=32", "--classes=20", "--width=4", f"--output={output}"]
    assert "MiB at 2" in run("imagenet_cost.py", *flags, reduced=False)
    (found,) = json.loads(output.read_text())["results"]
    assert 0 < found["flops_per_image"] < found["flops_per_image_with_alpha"]
    assert found["batches"]["2"]["memory"] > found["bytes"]["parameters"] > 0
    for steps, old in (("5", 10 + 12 + 14 + 16 + 18), ("10", sum(range(10, 20)))):
        facts = found["runs"][steps]
        assert facts["images"] == 100 * (IMAGES // 50 + 20 * old)
        assert facts["checkpoints"] == (int(steps) + 3) * found["bytes"]["checkpoint"]


@pytest.mark.slow
def test_numbers_of_the_manual(tmp_path):
    """And the table of what hosts decode, which the manual has without numbers."""
    flags = ["--method", "il_baseline", "podnet", "--dtype=float32", "--batch"]
    flags += ["--decode_rate=300", f"--output={tmp_path / 'cost.json'}"]
    text = run("imagenet_cost.py", *flags, reduced=False)
    costs, chips, runs, hosts = (
        [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
        for table in text.strip().split("\n\n")
    )
    manual = MANUAL.read_text()
    for _, _, _, parameters, checkpoint, flops in costs:
        assert f"{parameters} M" in manual and f"{checkpoint} MiB" in manual
        assert f"| {flops} |" in manual
    for _, _, *found in chips:
        assert f"| {' | '.join(found)} |" in manual
    for _, _, *found in runs:
        assert f"| {' | '.join(found)} |" in manual
    decoded, plain, *_ = hosts
    assert decoded[2:] == ["36,000", "33,600", "14,400", "31,200"]
    assert plain == ["il_baseline", "no", "3.5-5.8", "4.5-7.5", "1.2-2.0", "0.8-1.4"]
