"""Whole runs of LUCIR and PODNet: phases, compiles, resume inside any of them."""

import numpy as np
import pytest

from bsce_jax.checkpoints import store
from bsce_jax.report import results as results_file
from tests import runs
from tests.test_resume import newest, start_and_wait

METHODS = ("lucir", "podnet")
# A checkpoint after every update; LUCIR's fine-tuning, which only ImageNet has, too.
EVERY_PHASE = ("--config.checkpoint.minutes=0", "--config.finetune.epochs=6")


@pytest.fixture(scope="module", params=METHODS)
def config(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return runs.config_file(
        folder, classes=7, base=4, steps=3, epochs=2, method=request.param
    )


@pytest.fixture(scope="module")
def undisturbed(config):
    workdir = config.parent / "undisturbed"
    runs.run(config, workdir, *EVERY_PHASE)
    return workdir


def test_a_run_reports_both_classifiers_and_its_fine_tuning(undisturbed):
    results = runs.results(undisturbed)
    assert results["status"] == "done"
    base, *others = [record["result"] for record in results["steps"]]
    assert base["finetune_loss"] == [] and len(base["loss"]) == 2
    for result in others:
        assert len(result["finetune_loss"]) == 6 and len(result["loss"]) == 2
    nearest = [result["top1_nearest_mean"] for result in (base, *others)]
    np.testing.assert_allclose(
        results["summary"]["average_incremental_nearest_mean"], np.mean(nearest)
    )
    assert max(nearest) > 40.0  # seven classes of patterns: chance is below 25


def test_nothing_compiles_at_a_new_step(undisturbed):
    counts = [r["telemetry"]["compiles"] for r in runs.results(undisturbed)["steps"]]
    assert counts[3] == counts[2]
    names = ("base_update", "incremental_update", "finetune_update", "evaluate")
    assert all(counts[3][name] == 1 for name in (*names, "features"))


def test_killed_inside_each_phase_the_run_has_the_same_bits(config, undisturbed):
    """Base: updates 1 to 4. Step 1: 5 to 8, and 9 to 14 of the fine-tuning."""
    workdir = config.parent / "killed"
    phases = []
    for number in (2, 6, 11):
        process = start_and_wait(config, workdir, number, EVERY_PHASE)
        process.kill()
        process.communicate()
        meta = store.read_meta(workdir / "checkpoints", newest(workdir))
        phases.append((meta["step"], meta["main"] is not None, meta["finished"]))
    assert phases[-1] == (1, True, False)
    assert phases[0][0] == 0 and (1, False, False) in phases
    runs.run(config, workdir, *EVERY_PHASE)
    ours, theirs = runs.results(workdir), runs.results(undisturbed)
    assert results_file.deterministic(ours) == results_file.deterministic(theirs)


OTHERS = [
    ("meta", []),
    pytest.param("balanced", [], marks=pytest.mark.slow),
    pytest.param("weighted", ["--config.alpha=0.5"], marks=pytest.mark.slow),
    pytest.param("relaxed", ["--config.epsilon=1"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("prior", "more"), OTHERS)
def test_a_prior_switches_the_fine_tuning_off(config, prior, more):
    workdir = config.parent / prior
    runs.run(config, workdir, f"--config.prior={prior}", *more)
    last = runs.results(workdir)["steps"][-1]["result"]
    assert last["finetune_loss"] == [] and np.isfinite(last["loss"]).all()
    assert (last["alpha"] != []) == (prior == "meta")


@pytest.mark.parametrize(
    "prior", ["none", "relaxed", pytest.param("balanced", marks=pytest.mark.slow)]
)
def test_without_memory(config, prior):
    workdir = config.parent / f"{prior}-0"
    overrides = ["--config.memory.kind=none", f"--config.prior={prior}"]
    if prior == "relaxed":
        overrides += ["--config.epsilon=0.2", "--config.epsilon_unit=percent"]
    done = runs.run(config, workdir, *overrides, "--config.finetune.epochs=3")
    found = runs.results(workdir)
    tuned = prior == "none"  # a prior switches the fine-tuning off in any case
    assert ("no fine-tuning: there is no memory" in done.stderr) == tuned
    for record in found["steps"]:
        result = record["result"]
        assert result["top1_nearest_mean"] is None and result["finetune_loss"] == []
        assert result["memory_images"] == 0 and np.isfinite(result["loss"]).all()
    assert found["summary"]["average_incremental_nearest_mean"] is None
