"""No program is compiled when an incremental step begins."""

import subprocess
import time

import pytest

from tests import runs
from tests.test_resume import newest


@pytest.mark.slow
def test_nothing_compiles_at_a_new_step_over_26_steps(tmp_path):
    """Programs by name over a base step and 25 steps, with a kill and a resume.

    Of processes of their own: here other tests have compiled eager operations.
    """
    config = runs.config_file(tmp_path, classes=29, base=4, steps=25)
    workdir = tmp_path / "run"
    overrides = ("--config.prior=meta",)
    process = subprocess.Popen(
        runs.command(config, workdir, *overrides),
        cwd=runs.ROOT,
        env=runs.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while newest(workdir) < 60 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    runs.run(config, workdir, *overrides)
    records = runs.results(workdir)["steps"]
    counts = [record["telemetry"]["compiles"] for record in records]
    resumed = next(i for i in range(1, len(counts)) if "base_update" not in counts[i])
    assert 2 <= resumed <= 24
    programs = ("incremental_update", "incremental_meta_update", "evaluate", "features")
    for name in programs:
        assert counts[resumed - 1].get(name) == 1
        assert counts[-1].get(name) == 1, counts[-1]
    assert counts[0]["base_update"] == 1
    # Neither these nor anything else, eager operations included.
    assert counts[resumed - 1] == counts[2]
    assert counts[-1] == counts[resumed + 1]
