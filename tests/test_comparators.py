"""The methods that the paper compares with: a whole run of each, cut and spread."""

import numpy as np
import pytest

import bsce_jax
from bsce_jax.checkpoints import store
from bsce_jax.report import results
from tests import runs

PHASES = {  # of an incremental step
    "ncm": [],
    "slda": [],
    "icarl": ["incremental"],
    "eeil": ["incremental", "balanced"],
    "bic": ["incremental", "bias"],
    "ss_il": ["incremental"],
    "spb": ["incremental"],
    "spb_i": ["incremental"],
    "spb_m": ["incremental"],
    "geodl": ["incremental"],
    "lucir_dde": ["incremental"],
    "podnet_dde": ["incremental", "finetune"],
    "tpcil_like": ["incremental"],
    "mnemonics": ["incremental", "exemplars"],
}
IN_BASE = {"mnemonics": ["base", "base_exemplars"]}  # the base alone elsewhere
WITHOUT_MEMORY = ("ncm", "slda", "spb", "spb_i", "spb_m")
EVERY_UPDATE = ("--config.checkpoint.minutes=0", "--config.checkpoint.keep=1000")


# Their whole runs are slow checks; their losses and phases have fast ones elsewhere.
SLOW = ("eeil", "spb_i", "spb_m", "lucir_dde", "podnet_dde", "mnemonics")


def marked(*methods):
    return [pytest.param(m, marks=[pytest.mark.slow] * (m in SLOW)) for m in methods]


@pytest.fixture(scope="module", params=marked(*PHASES))
def method(request):
    return request.param


@pytest.fixture(scope="module")
def config(method, tmp_path_factory):
    folder = tmp_path_factory.mktemp(method)
    return runs.config_file(folder, classes=8, base=4, steps=2, epochs=2, method=method)


def overrides(method) -> tuple[str, ...]:
    kind = "none" if method in WITHOUT_MEMORY else "growing"
    more = ("--config.phase.incremental.replay=4",) if method == "ss_il" else ()
    return (f"--config.memory.kind={kind}", "--config.memory.per_class=4", *more)


@pytest.fixture(scope="module")
def workdir(method, config):
    """A run that has kept a checkpoint of every update."""
    folder = config.parent / "whole"
    runs.here(config, folder, *overrides(method), *EVERY_UPDATE)
    return folder


def test_a_run_learns_and_says_what_it_did(method, workdir):
    found = runs.results(workdir)
    assert found["status"] == "done" and len(found["steps"]) == 3
    for step, record in enumerate(found["steps"]):
        result = record["result"]
        in_base = IN_BASE.get(method, ["base"])
        assert list(result["phases"]) == (PHASES[method] if step else in_base)
        for phase in result["phases"].values():
            assert np.isfinite(phase["loss"]).all()
        assert result["own"].keys() == (
            {"scale", "shift"} if method == "bic" else set()
        )
    assert found["summary"]["average_incremental_top1"] > 100 / 8
    compiled = found["steps"][-1]["telemetry"]["compiles"]
    for name in ("base", *PHASES[method]):
        assert compiled[f"{name}_update"] == 1
    assert compiled["evaluate"] == 1


def test_predictions_are_those_of_the_accuracies(method, workdir):
    """bsce_jax.load gives the recorded confusions, whatever the method predicts by."""
    with runs.small_network():
        predictor = bsce_jax.load(workdir)
    images, labels = runs.test_images(workdir)
    names = predictor(images).names
    predicted = [predictor.class_names.index(name) for name in names]
    confusion = np.zeros((8, 8), int)
    np.add.at(confusion, (labels, predicted), 1)
    result = runs.results(workdir)["steps"][-1]["result"]
    recorded = np.zeros((8, 8), int)
    for i, j, count in result["confusion"]:
        recorded[i, j] = count
    np.testing.assert_array_equal(confusion, recorded)


def cut_and_compare(method, config, workdir):
    """Goes on once in each phase of the last step, and where none was left to do."""
    seen = set()
    for number in store.numbers(workdir / "checkpoints"):
        meta = store.read_meta(workdir / "checkpoints", number)
        phase = meta["histories"][-1][0] if meta["histories"] else ""
        place = (phase, meta["finished"])
        if meta["step"] != 1 + bool(meta["histories"]) or place in seen:
            continue
        seen.add(place)
        copy = config.parent / f"cut{number}"
        runs.cut(workdir, copy, number)
        runs.here(config, copy, *overrides(method), *EVERY_UPDATE)
        ours, theirs = (
            results.deterministic(runs.results(folder)) for folder in (copy, workdir)
        )
        assert ours == theirs, place
    assert {phase for phase, _ in seen} >= set(PHASES[method])


def only(*methods):
    return pytest.mark.parametrize("method", marked(*methods), indirect=True)


@pytest.mark.slow
@only("bic")
def test_a_run_cut_inside_a_phase_of_its_own(method, config, workdir):
    cut_and_compare(method, config, workdir)


@pytest.mark.slow
@only(*(name for name in PHASES if name != "bic"))
def test_a_run_cut_inside_any_phase_ends_with_the_same_bits(method, config, workdir):
    cut_and_compare(method, config, workdir)


@only("bic", "mnemonics", "ss_il")
def test_a_run_from_a_base_step_that_is_there_ends_as_one_of_its_own(
    method, config, workdir
):
    """What is the method's own is this run's: BiC's scale, Mnemonics' exemplars."""
    taken = config.parent / "taken"
    runs.here(config, taken, *overrides(method), f"--config.init_from={workdir}")
    ours, theirs = (
        [record["result"] for record in runs.results(folder)["steps"]]
        for folder in (taken, workdir)
    )
    assert ours == theirs
    compiled = runs.results(taken)["steps"][-1]["telemetry"]["compiles"]
    assert "base_update" not in compiled


def eight_devices_train_as_one(method, config, workdir, mode):
    """Batches of 16 rows, the last of an epoch partial; float32."""
    copy = config.parent / mode
    runs.here(config, copy, *overrides(method), f"--config.parallel={mode}", devices=8)
    ours, theirs = (runs.results(folder)["steps"] for folder in (copy, workdir))
    for a, b in zip(ours, theirs, strict=True):
        for name, phase in b["result"]["phases"].items():
            np.testing.assert_allclose(
                a["result"]["phases"][name]["loss"], phase["loss"], rtol=2e-3, atol=2e-4
            )
        for name, value in b["result"]["own"].items():
            assert a["result"]["own"][name] == pytest.approx(value, rel=1e-2, abs=1e-3)


@pytest.mark.slow
def test_eight_devices_of_pmap_train_as_one(method, config, workdir):
    eight_devices_train_as_one(method, config, workdir, "pmap")


@pytest.mark.slow
@only("bic", "lucir_dde", "mnemonics")
def test_eight_devices_of_jit_train_as_one(method, config, workdir):
    """Its collectives are the compiler's: what is the method's own does not add any."""
    eight_devices_train_as_one(method, config, workdir, "jit")


STREAMED = (
    "--config.data.loading=streaming",
    "--config.data.image_size=8",
    "--config.data.random_resized_crop=False",
)


@pytest.mark.slow
@only("ncm", "icarl", "eeil", "bic", "ss_il", "lucir_dde")
def test_streamed_images_give_the_bits_of_resident_ones(method, config, workdir):
    """Those whose batches differ: images held out, replayed, balanced, companions."""
    copy = config.parent / "streamed"
    runs.here(config, copy, *overrides(method), *STREAMED)
    ours, theirs = (
        [record["result"] for record in runs.results(folder)["steps"]]
        for folder in (copy, workdir)
    )
    assert ours == theirs


@only("mnemonics")
def test_mnemonics_refuses_streamed_images_in_one_line(method, config, capsys):
    runs.here(config, config.parent / "no", *overrides(method), *STREAMED, status=2)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "config.data.loading='streaming': expected resident" in line


def state_of(workdir, step: int) -> dict:
    """JSON of the checkpoint at the end of a step."""
    for number in store.numbers(workdir / "checkpoints"):
        meta = store.read_meta(workdir / "checkpoints", number)
        if meta["step"] == step and meta["finished"]:
            return meta
    raise AssertionError(step)


@only("icarl")
def test_icarl_s_accuracy_is_that_of_the_nearest_mean(workdir):
    for record in runs.results(workdir)["steps"]:
        assert record["result"]["top1"] == record["result"]["top1_nearest_mean"]


@only("bic")
def test_bic_learns_its_two_numbers_in_incremental_steps_only(workdir):
    own = [record["result"]["own"] for record in runs.results(workdir)["steps"]]
    assert own[0] == {"scale": 1.0, "shift": 0.0}
    assert all(o["scale"] != 1.0 and o["shift"] != 0.0 for o in own[1:])


@only("ncm", "slda")
def test_the_networks_of_ncm_and_slda_are_not_trained_later(workdir):
    ends = [state_of(workdir, step) for step in (1, 2)]
    assert ends[0]["before"] == ends[1]["before"] > 0
    assert ends[0]["histories"] == ends[1]["histories"] == []
