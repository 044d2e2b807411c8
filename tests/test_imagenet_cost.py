"""The costs of ImageNet: the script runs at tiny sizes; the manual has its numbers."""

import argparse
import json

import pytest

from tests.runs import ROOT
from tests.test_benchmarks import ENVIRONMENT, load, run  # noqa: F401

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


def test_exchanges_between_devices_of_a_program(load):  # noqa: F811
    """As XLA writes them for a TPU: layouts, tuples, and the starts of some."""
    text = """
  %all-reduce.1 = f32[64]{0:T(256)S(1)} all-reduce(%x), channel_id=1
  %all-reduce.2 = (f32[64]{0:T(256)}, /*index=1*/bf16[2,3]{1,0}) all-reduce(%x, %y)
  %start = f32[8]{0} all-reduce-start(%z), channel_id=3
  %done = f32[8]{0} all-reduce-done(%start)
  ROOT %gathered = f32[2,2]{1,0} all-gather(%w), dimensions={0}
  %fusion = f32[64]{0} fusion(%all-reduce.1), kind=kLoop
"""
    found = load("cost").collectives(text)
    assert found == {"all-reduce": [256, 268, 32], "all-gather": [16]}


@pytest.mark.slow
def test_imagenet_cost(tmp_path, monkeypatch):
    """The program of a slice, with this machine's devices in the place of its chips."""
    monkeypatch.setitem(ENVIRONMENT, "JAX_NUM_CPU_DEVICES", "4")
    output = tmp_path / "cost.json"
    flags = ["--method=il_baseline", "--prior=meta", "--dtype=float32", "--batch=2"]
    flags += ["--pixels=32", "--classes=20", "--width=4", f"--output={output}"]
    text = run("imagenet_cost.py", *flags, reduced=False)
    assert (
        "MiB at 2" in text
        and "| cpu | 4 | 1 | il_baseline | yes | float32 | 2 |" in text
    )
    (found,) = json.loads(output.read_text())["results"]
    assert 0 < found["flops_per_image"] < found["flops_per_image_with_alpha"]
    facts = found["batches"]["2"]
    assert facts["memory"] > found["bytes"]["parameters"] > 0
    ((kind, exchanged),) = facts["collectives"].items()
    assert kind == "all-reduce" and facts["moved"] > sum(exchanged)
    # The gradient of every parameter, and the statistics of BatchNorm.
    assert sum(exchanged) > found["bytes"]["parameters"]
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
