"""Whole runs of the paper's three methods: phases, compiles, resume inside any of them.

Those of the methods that it compares with are in test_comparators.py.
"""

import numpy as np
import pytest

from bsce_jax.checkpoints import store
from bsce_jax.report import results as results_file
from tests import runs

METHODS = ("il_baseline", "lucir", "podnet")
# All fine-tune here, though IL-Baseline never does and LUCIR on ImageNet alone.
FINETUNE = ("--config.phase.finetune.epochs=6",)
EVERY_UPDATE = ("--config.checkpoint.minutes=0", "--config.checkpoint.keep=1000")
LATER = ["incremental", "finetune"]


@pytest.fixture(scope="module", params=METHODS)
def config(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return runs.config_file(
        folder, classes=7, base=4, steps=3, epochs=2, method=request.param
    )


@pytest.fixture(scope="module")
def undisturbed(config):
    """A run that has kept a checkpoint of every update."""
    workdir = config.parent / "undisturbed"
    runs.here(config, workdir, *FINETUNE, *EVERY_UPDATE)
    return workdir


def test_a_run_reports_both_classifiers_and_its_phases(undisturbed):
    results = runs.results(undisturbed)
    assert results["status"] == "done"
    base, *others = [record["result"] for record in results["steps"]]
    assert list(base["phases"]) == ["base"]
    assert len(base["phases"]["base"]["loss"]) == 2
    for result in others:
        assert list(result["phases"]) == LATER
        epochs = [len(phase["loss"]) for phase in result["phases"].values()]
        assert epochs == [2, 6]
    nearest = [result["top1_nearest_mean"] for result in (base, *others)]
    np.testing.assert_allclose(
        results["summary"]["average_incremental_nearest_mean"], np.mean(nearest)
    )
    assert max(nearest) > 40.0  # seven classes of patterns: chance is below 25


def test_one_program_a_phase_and_nothing_compiles_at_a_new_step(undisturbed):
    counts = [r["telemetry"]["compiles"] for r in runs.results(undisturbed)["steps"]]
    assert counts[3] == counts[2]
    updates = [f"{phase}_update" for phase in ("base", *LATER)]
    assert all(counts[3][name] == 1 for name in (*updates, "evaluate", "features"))


def places(workdir) -> dict[tuple, int]:
    """The first checkpoint inside each phase of steps 0 and 1, and where each ended.

    (step, phase or "" before the first one, whether the phase or the step has ended)
    """
    found: dict[tuple, int] = {}
    folder = workdir / "checkpoints"
    for number in store.numbers(folder):
        meta = store.read_meta(folder, number)
        phase, history = (meta["histories"] or [["", {}]])[-1]
        if meta["step"] < 2 and history.get("updates", 0) > 1:
            found.setdefault((meta["step"], phase, meta["finished"]), number)
    return found


def same_bits_from(config, undisturbed, number, name, *overrides) -> None:
    copy = config.parent / name
    runs.cut(undisturbed, copy, number)
    runs.here(config, copy, *overrides, *EVERY_UPDATE)
    ours, theirs = runs.results(copy), runs.results(undisturbed)
    assert results_file.deterministic(ours) == results_file.deterministic(theirs)


@pytest.mark.slow
def test_cut_inside_each_phase_the_run_has_the_same_bits(config, undisturbed):
    """As if it had been killed there: test_resume.py has processes that are."""
    found = places(undisturbed)
    inside = {(0, "base", False), *((1, phase, False) for phase in LATER)}
    assert found.keys() >= inside
    for place in sorted(inside):
        where = "-".join(map(str, place))
        same_bits_from(config, undisturbed, found[place], where, *FINETUNE)


@pytest.mark.slow
def test_cut_after_any_update_the_run_has_the_same_bits(config, undisturbed):
    """Every sixth, and the end of a step."""
    ended = [number for (*_, end), number in places(undisturbed).items() if end]
    assert ended
    numbers = store.numbers(undisturbed / "checkpoints")
    for number in sorted({*numbers[1::6], *ended}):
        same_bits_from(config, undisturbed, number, f"cut{number}", *FINETUNE)


@pytest.mark.slow
def test_the_method_s_own_network_trains_as_well(config):
    workdir = config.parent / "real"
    runs.run(config, workdir, *FINETUNE, small=False)
    counts = [r["telemetry"]["compiles"] for r in runs.results(workdir)["steps"]]
    assert counts[3] == counts[2]


OTHERS = [
    pytest.param("meta", [], marks=pytest.mark.slow),  # IL-Baseline's: test_experiment
    ("balanced", []),
    pytest.param("weighted", ["--config.alpha=0.5"], marks=pytest.mark.slow),
    pytest.param("relaxed", ["--config.epsilon=1"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("prior", "more"), OTHERS)
def test_a_prior_switches_the_fine_tuning_off(config, prior, more):
    workdir = config.parent / prior
    runs.here(config, workdir, f"--config.prior={prior}", *more, *FINETUNE)
    last = runs.results(workdir)["steps"][-1]["result"]
    assert list(last["phases"]) == ["incremental"]
    assert np.isfinite(last["phases"]["incremental"]["loss"]).all()
    assert (last["alpha"] != []) == (prior == "meta")


@pytest.mark.parametrize(
    "prior",
    [
        pytest.param("none", marks=pytest.mark.slow),
        "relaxed",
        pytest.param("balanced", marks=pytest.mark.slow),
    ],
)
def test_without_memory(config, prior, caplog):
    workdir = config.parent / f"{prior}-0"
    overrides = ["--config.memory.kind=none", f"--config.prior={prior}", *FINETUNE]
    if prior == "relaxed":
        overrides += ["--config.epsilon=0.2", "--config.epsilon_unit=percent"]
    caplog.set_level("INFO", "bsce_jax")
    runs.here(config, workdir, *overrides)
    found = runs.results(workdir)
    tuned = prior == "none"  # a prior switches the fine-tuning off in any case
    assert ("no phase finetune: there is no memory" in caplog.text) == tuned
    for record in found["steps"]:
        result = record["result"]
        (phase,) = result["phases"].values()
        assert result["top1_nearest_mean"] is None and result["memory_images"] == 0
        assert np.isfinite(phase["loss"]).all()
    assert found["summary"]["average_incremental_nearest_mean"] is None


def test_load_classifies_as_the_run_did(config, undisturbed):
    predictor = runs.load(undisturbed)
    images, labels = runs.test_images(undisturbed)
    predicted = predictor(images).probabilities.argmax(axis=1)
    found = np.zeros((7, 7), int)
    np.add.at(found, (labels, predicted), 1)
    recorded = np.zeros((7, 7), int)
    for i, j, count in runs.results(undisturbed)["steps"][-1]["result"]["confusion"]:
        recorded[i, j] = count
    np.testing.assert_array_equal(found, recorded)
