"""Whole runs from the command line."""

import json
import os
import pathlib
import re
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from bsce_jax import experiment
from bsce_jax.checkpoints import store
from bsce_jax.errors import UserError
from tests import runs

KEPT = "--config.checkpoint.keep=99"
BALANCED = ("--config.prior=balanced", KEPT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def config(folder) -> pathlib.Path:
    return runs.config_file(folder, classes=6, base=4, steps=2, epochs=2)


@pytest.fixture(scope="module")
def balanced(config, folder) -> pathlib.Path:
    workdir = folder / "balanced"
    runs.here(config, workdir, *BALANCED)
    return workdir


def failure(capsys, config, workdir, *overrides) -> str:
    """The line with which a run ends."""
    runs.here(config, workdir, *overrides, status=2)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("bsce_jax: ")
    return line


def test_a_run_writes_results_pictures_events_and_a_table(config, balanced, capsys):
    results = runs.results(balanced)
    assert results["status"] == "done" and len(results["steps"]) == 3
    base, first, last = (record["result"] for record in results["steps"])
    assert (base["num_old"], first["num_old"], last["num_seen"]) == (0, 4, 6)
    assert first["counts"] == [3, 3, 3, 3, 8] and last["memory_images"] == 15
    assert list(base["phases"]) == ["base"] and list(last["phases"]) == ["incremental"]
    for values in last["phases"]["incremental"].values():
        assert len(values) == 2
    assert last["alpha"] == [] and last["own"] == {}
    accuracies = [record["result"]["top1"] for record in results["steps"]]
    mean = results["summary"]["average_incremental_top1"]
    np.testing.assert_allclose(mean, np.mean(accuracies))
    for picture in ("curves.png", "confusion.png"):
        Image.open(balanced / picture).verify()
    assert list((balanced / "tensorboard").iterdir())
    assert {s["telemetry"]["gpu_graphs"] for s in results["steps"]} == {"default"}
    runs.here(config, balanced, *BALANCED)
    assert "average incremental accuracy" in capsys.readouterr().out
    assert runs.results(balanced) == results


def test_a_step_is_saved_when_it_is_trained_and_when_it_is_finished(balanced):
    """Whatever happens while exemplars are chosen and accuracies measured."""
    folder = balanced / "checkpoints"
    kept = [store.read_meta(folder, n) for n in store.numbers(folder)]
    found = []
    for meta in kept:
        ((phase, history),) = meta["histories"]
        found.append((meta["step"], phase, history["updates"], meta["finished"]))
    trained = [(0, "base", 4), (1, "incremental", 4), (2, "incremental", 4)]
    assert found == [(*place, end) for place in trained for end in (False, True)]


def losses(workdir) -> list[list[float]]:
    """Of each step's first phase."""
    steps = [record["result"]["phases"] for record in runs.results(workdir)["steps"]]
    return [next(iter(phases.values()))["loss"] for phases in steps]


def test_the_command_line_runs_and_its_numbers_do_not_change(config, folder):
    """Of commit 1f61b28, before there was another method or another phase."""
    done = runs.run(config, folder / "real", *BALANCED, small=False)
    assert "average incremental accuracy" in done.stdout
    assert "step 2/2: 6 classes, top-1" in done.stderr
    expected = [
        [1.3578385710716248, 1.3182989358901978],
        [4.743176746368408, 4.742072582244873],
        [5.661604487377664, 5.659922786380934],
    ]
    np.testing.assert_allclose(losses(folder / "real"), expected, rtol=1e-5)


@pytest.mark.slow
def test_the_numbers_of_meta_do_not_change(config, folder):
    runs.run(config, folder / "real meta", "--config.prior=meta", small=False)
    expected = [
        [4.730926990509033, 4.740799903869629],
        [5.645136496599982, 5.638440637027516],
    ]
    np.testing.assert_allclose(losses(folder / "real meta")[1:], expected, rtol=1e-5)


@pytest.mark.slow
def test_all_priors_share_the_base_step_and_its_bits(config, folder, balanced):
    shared = runs.results(balanced)
    for prior, more in (
        ("none", []),
        ("weighted", ["--config.alpha=0.5"]),
        ("relaxed", ["--config.epsilon=0.2", "--config.epsilon_unit=percent"]),
        ("meta", []),
    ):
        workdir = folder / prior
        own = [f"--config.prior={prior}", *more]
        runs.here(config, workdir, *own, f"--config.init_from={balanced}")
        results = runs.results(workdir)
        assert results["base_hash"] == shared["base_hash"]
        assert (
            results["steps"][0]["result"]["parameters_sha256"]
            == (shared["steps"][0]["result"]["parameters_sha256"])
        )
        assert results["config_hash"] != shared["config_hash"]
        assert "base_update" not in results["steps"][-1]["telemetry"]["compiles"]
        last, other = results["steps"][-1]["result"], shared["steps"][-1]["result"]
        assert last["parameters_sha256"] != other["parameters_sha256"]
        if prior == "meta":  # one image of each class is held out
            assert last["counts"] == [2, 2, 2, 2, 2, 7]
            assert last["alpha"][-1][1] != 1.0
            Image.open(workdir / "alpha.png").verify()
    # Its own base step gives the bits that were taken over.
    runs.here(config, folder / "alone", "--config.prior=meta")
    alone, taken = runs.results(folder / "alone"), runs.results(folder / "meta")
    for a, b in zip(alone["steps"], taken["steps"], strict=True):
        assert a["result"] == b["result"]


@pytest.mark.parametrize(
    "method", [pytest.param("slda", marks=pytest.mark.slow), "ncm"]
)
def test_a_method_starts_from_the_base_step_of_il_baseline(folder, balanced, method):
    """The model's leaves are taken over; what it has of its own is this run's."""
    (folder / method).mkdir()
    config = runs.config_file(
        folder / method, classes=6, base=4, steps=2, epochs=2, method=method
    )
    # IL-Baseline's data set: the same files.
    where = f"--config.data.data_dir={folder / 'data'}"
    taken, alone = folder / method / "taken", folder / method / "alone"
    runs.here(config, taken, where, f"--config.init_from={balanced}")
    runs.here(config, alone, where)
    ours, theirs, base = (runs.results(path) for path in (taken, alone, balanced))
    assert ours["base_hash"] == theirs["base_hash"] == base["base_hash"]
    assert "base_update" not in ours["steps"][-1]["telemetry"]["compiles"]
    for a, b in zip(ours["steps"], theirs["steps"], strict=True):
        assert a["result"] == b["result"]


def test_init_from_another_base_step_is_refused(config, folder, balanced, capsys):
    overrides = (f"--config.init_from={balanced}", "--config.optim.weight_decay=0.1")
    line = failure(capsys, config, folder / "refused", *overrides)
    assert "config.init_from" in line and "weight_decay" in line
    nowhere = f"--config.init_from={folder / 'nowhere'}"
    line = failure(capsys, config, folder / "refused", nowhere)
    assert f"config.init_from={str(folder / 'nowhere')!r}: " in line


def test_a_workdir_of_another_configuration_is_refused(config, balanced, capsys):
    line = failure(capsys, config, balanced, "--config.prior=none")
    assert "prior: 'balanced' there, 'none' here" in line
    line = failure(capsys, config, balanced, "--config.model.width=5")
    assert "another configuration" in line


def test_load_predicts_and_the_command_line_prints_names(balanced, folder, capsys):
    from bsce_jax import predict
    from bsce_jax.data import resident

    predictor = runs.load(balanced)
    arrays = resident.load("blobs", "test", str(folder / "data"))
    found = predictor(arrays.images)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, rtol=1e-5)
    results = runs.results(balanced)
    position = {c: i for i, c in enumerate(results["class_order"])}
    labels = np.array([position[int(label)] for label in arrays.labels])
    correct = 100 * np.mean(found.probabilities.argmax(axis=1) == labels)
    np.testing.assert_allclose(correct, results["steps"][-1]["result"]["top1"])
    assert runs.load(balanced, step=0).class_names == predictor.class_names[:4]
    Image.fromarray(arrays.images[0, :, :, 0]).save(folder / "image.png")
    with runs.small_network():
        assert predict.main([str(balanced), str(folder / "image.png")]) == 0
        assert predict.main([str(balanced), str(folder / "none.png")]) == 2
    shown = capsys.readouterr()
    header, line = shown.out.splitlines()
    assert header.split() == ["file", "class", "probability", "second", "third"]
    assert line.startswith(f"{folder}/image.png  ")
    assert "none.png" in shown.err
    with pytest.raises(UserError, match="step=7"):
        runs.load(balanced, step=7)
    with pytest.raises(UserError, match="expected uint8"):
        predictor(arrays.images.astype(np.float32))


@pytest.mark.parametrize(
    "how", ["json", pytest.param("arrays", marks=pytest.mark.slow)]
)
def test_a_step_is_loaded_whatever_befalls_the_others(balanced, tmp_path, how):
    copy = shutil.copytree(balanced, tmp_path / "copy")
    numbers = store.numbers(copy / "checkpoints")
    ends = [
        copy / "checkpoints" / str(n)
        for n in numbers
        if store.read_meta(copy / "checkpoints", n)["finished"]
    ]
    for other in (ends[0], ends[2]):
        if how == "json":
            (other / "manifest" / "data.json").write_text("[" * 10**5)
        else:
            shutil.rmtree(other / "arrays")
    assert len(runs.load(copy, step=1).class_names) == 5
    for step in (0, 2):
        with pytest.raises(UserError, match=f"checkpoint {ends[step]} is damaged") as e:
            runs.load(copy, step=step)
        assert "\n" not in str(e.value)


@pytest.mark.slow
def test_a_run_whose_workdir_is_removed_ends_and_makes_no_other(
    config, folder, capsys, monkeypatch
):
    workdir, start = folder / "gone", experiment.begin

    def lose(run, *arguments):
        run.writer.wait()
        shutil.rmtree(workdir)
        return start(run, *arguments)

    monkeypatch.setattr(experiment, "begin", lose)
    line = failure(capsys, config, workdir, "--config.prior=balanced")
    assert line.startswith(f"bsce_jax: --workdir='{workdir}' is gone: it was removed")
    assert not workdir.exists()


@pytest.mark.slow
def test_a_run_whose_workdir_is_removed_at_its_end_has_not_succeeded(
    config, folder, capsys, monkeypatch
):
    workdir = folder / "gone late"

    def lose(run, progress, finished):
        save(run, progress, finished)
        if run.results["status"] == "done":
            run.writer.wait()
            shutil.rmtree(workdir)

    save = experiment.save
    monkeypatch.setattr(experiment, "save", lose)
    line = failure(capsys, config, workdir, "--config.prior=balanced")
    assert line.startswith(f"bsce_jax: --workdir='{workdir}' is gone: it was removed")
    assert not workdir.exists()


def test_many_files_are_predicted_in_batches(balanced, folder, capsys, monkeypatch):
    """Of the evaluation's 64; all but a bad file are printed."""
    from bsce_jax import predict

    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8)).astype(np.uint8)
    paths = [str(folder / f"{i}.png") for i in range(2)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    predictor, sizes = runs.load(balanced), []
    named: list[int] = []

    def counted(images):
        sizes.append(len(images))
        return predictor.predict(images)

    def load(workdir, step):
        named.append(step)
        return predictor._replace(predict=counted)

    monkeypatch.setattr(predict, "load", load)
    files = [paths[i % 3 == 0] for i in range(130)]
    assert predict.main([str(balanced), *files]) == 0
    assert sizes == [64, 64, 2] and named == [-1]
    # Flags may stand anywhere.
    assert predict.main([str(balanced), "--step", "1", paths[0]]) == 0
    assert predict.main([str(balanced), paths[0], "--step", "1"]) == 0
    assert named == [-1, 1, 1]
    capsys.readouterr()
    assert predict.main([str(balanced), *files]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    names = predictor(pixels[..., None]).names
    expected = [[file, names[paths.index(file)]] for file in files]
    assert [line.split()[:2] for line in lines] == expected
    (folder / "bad.png").write_bytes(b"none")
    files.insert(1, str(folder / "bad.png"))
    assert predict.main([str(balanced), *files]) == 2
    shown = capsys.readouterr()
    assert [line.split()[:2] for line in shown.out.splitlines()[1:]] == expected
    assert "bad.png' cannot be read" in shown.err and shown.err.count("\n") == 1


def test_a_folder_of_images_is_predicted_as_a_table_or_json(balanced, folder, capsys):
    """In any shape and colour; without an image some of the data set's are shown."""
    from bsce_jax import predict

    photos = folder / "photos"
    (photos / "more").mkdir(parents=True)
    files = {"b.png": (9, 30), "a.JPG": (8, 8), "more/c.webp": (40, 12)}
    for name, size in files.items():
        Image.new("RGB", size, "orange").save(photos / name)
    (photos / "notes.txt").write_text("no image")
    with runs.small_network():
        assert predict.main([str(balanced), str(photos), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert predict.main([str(balanced)]) == 0
        table = capsys.readouterr().out.splitlines()
        assert predict.main([str(balanced), str(photos / "more"), "--step=0"]) == 0
        assert predict.main([str(balanced), str(folder / "data"), "--json"]) == 2
    assert [one["file"] for one in found] == [
        str(photos / name) for name in sorted(files)
    ]
    for one in found:
        assert one["best"][0] == {k: one[k] for k in ("class", "probability")}
        chances = [best["probability"] for best in one["best"]]
        assert len(chances) == 3 and chances == sorted(chances, reverse=True)
    assert table[0].split()[:3] == ["file", "true", "class"] and len(table) == 11
    assert "no image in the folder" in capsys.readouterr().err


def test_the_commands_that_a_run_ends_with_work_as_they_stand(
    config, folder, balanced, capsys, monkeypatch
):
    from bsce_jax import predict
    from bsce_jax.report import __main__ as report

    runs.here(config, balanced, *BALANCED)  # it is done: only shown again
    out = capsys.readouterr().out
    *_, last = out.partition("\n\naverage incremental accuracy")
    _, _, files = last.partition("\n\n")
    results, curves, confusion, word, *commands = files.splitlines()
    assert all(map(os.path.isfile, (results, curves, confusion))) and word == "next:"
    for command in commands:
        python, dash, module, *words = shlex.split(command)
        assert (python, dash) == ("python", "-m")
        main = {"bsce_jax.report": report.main, "bsce_jax.predict": predict.main}
        with runs.small_network():
            assert main[module](words) == 0, command
    assert len(commands) == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"P5 20000 20000 255\n", "400000000 pixels"),  # a decompression bomb
        (b"P5 10000 10000 255\n", "truncated"),  # large, and cut short
    ],
)
def test_a_file_that_is_no_image_is_one_line(tmp_path, content, reason):
    from bsce_jax import predict

    path = tmp_path / "image"
    path.write_bytes(content)
    for resize in (-1, 8):
        with pytest.raises(UserError, match=f"image '{path}' cannot.*{reason}") as e:
            predict.read_image(str(path), (8, 8, 3), resize)
        assert "\n" not in str(e.value)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_eight_devices_give_the_results_of_one(config, folder, balanced, mode):
    """In another order of summation: losses within rounding."""
    overrides = ("--config.prior=balanced", f"--config.parallel={mode}")
    runs.here(config, folder / mode, *overrides, devices=8)
    np.testing.assert_allclose(losses(folder / mode), losses(balanced), rtol=2e-3)


def test_the_plan_is_printed_without_training(config, folder, capsys):
    workdir = folder / "plan"
    runs.here(config, workdir, "--config.print_plan", "--config.prior=balanced")
    assert not (workdir / "results.json").exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split()[:6] == ["1", "incremental", "5", "20", "12", "3..8"]
    assert "ms: about" in lines[-1] and "MiB" in lines[-1]


def test_a_plan_that_cannot_be_carried_out_is_refused(config, folder, balanced, capsys):
    """As the run itself would be."""
    plan = ("--config.print_plan", "--config.optim.weight_decay=0.1")
    line = failure(capsys, config, balanced, *plan)
    assert "another configuration" in line and "weight_decay" in line
    line = failure(
        capsys, config, folder / "planned", *plan, f"--config.init_from={balanced}"
    )
    assert "config.init_from" in line and "weight_decay" in line


def test_a_plan_counts_the_exemplars_that_every_batch_replays(config, folder, capsys):
    replay = ("--config.print_plan", "--config.phase.incremental.replay=4")
    runs.here(config, folder / "replay", *replay)
    lines = capsys.readouterr().out.splitlines()
    # 8 new images of a class and 12 exemplars, as without replay.
    assert lines[3].split()[:6] == ["1", "incremental", "5", "20", "12", "3..8"]
    assert "updates of 16 or 20 images" in lines[-1]


@pytest.mark.parametrize(
    ("base_rate", "rate", "words"),
    [
        ("1e4", "0.1", r"0, phase base at update \d; last good: none"),
        (
            "0.1",
            "1e4",
            r"1, phase incremental at update \d; last good: checkpoint 5 in",
        ),
    ],
)
def test_nan_stops_the_run_and_names_step_and_update(
    config, folder, capsys, base_rate, rate, words
):
    rates = {"base": base_rate, "incremental": rate}
    overrides = [f"--config.phase.{n}.learning_rate={r}" for n, r in rates.items()]
    large = [n for n, r in rates.items() if r == "1e4"]
    overrides += [f"--config.phase.{n}.rate.head=1e6" for n in large]
    line = failure(capsys, config, folder / f"nan{base_rate}", *overrides)
    assert re.search(f"^bsce_jax: the .* is (nan|inf) in step {words}", line), line


def test_a_network_that_is_not_finite_stops_the_run_too(config, folder, capsys):
    """The loss of its last update still is: the head grows by 1e10 in each of four."""
    fields = ("epochs=4", "milestones=()", "learning_rate=1e3", "rate.head=1e4")
    overrides = [f"--config.phase.base.{field}" for field in fields]
    overrides += ["--config.phase.base.rate.convolutions=0"]
    overrides += ["--config.phase.base.rate.batch_norms=0"]
    overrides += ["--config.optim.batch_size=32", "--config.optim.weight_decay=1e3"]
    line = failure(capsys, config, folder / "inf", *overrides)
    words = "the network is not finite in step 0, phase base after update 3; last good"
    assert line.startswith(f"bsce_jax: {words}")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.phase.base.epoch=3", ["unknown", "epoch"]),
        ("--config.phase.base.epochs=1e2", ["config.phase.base.epochs=1e2"]),
        ("--config.terms=1", ["config.terms is a section", "terms.kd"]),
        ("--config.terms.kd.weight=half", ["terms.kd.weight='half'", "rho"]),
        ("--config.prior=other", ["config.prior='other'", "balanced"]),
        ("--config.memory.per_class=9", ["9 exemplars", "class '0' has 8"]),
        ("--config.scenario.steps=5", ["5"]),
        ("--config.scenario.class_order=best", ["best"]),
        ("--config.data.name=nothing", ["nothing"]),
        ("--config.phase.base.milestones=(3,1)", ["milestones", "ascending"]),
        ("--workdri=x", ["workdri"]),
        ("--config.model.name=vgg", ["vgg", "resnet"]),
    ],
)
def test_mistakes_are_one_line(config, folder, override, words, capsys):
    from bsce_jax import main

    arguments = ["main", f"--config={config}", f"--workdir={folder / 'wrong'}"]
    assert main.main([*arguments, override]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("bsce_jax: "), lines
    assert all(word in lines[-1] for word in words), lines
    assert not any("Traceback" in line for line in lines)


def test_a_missing_or_broken_configuration_file_is_one_line(capsys, tmp_path):
    from bsce_jax import main

    for arguments, word in (
        ([], "--config"),
        ([f"--config={tmp_path}/none.py"], "none.py"),
        (["--config=configs/cifar100.py:steps=x"], "steps"),
        (["--config=configs/cifar100.py:method=mine"], "mine"),
        (["--config=configs/digits.py", "extra"], "extra"),
    ):
        assert main.main(["main", *arguments]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and word in lines[0], lines


def test_the_results_are_json_that_the_report_reads(balanced, folder):
    from bsce_jax.report.__main__ import main

    assert main([str(balanced), "--output", str(folder / "report")]) == 0
    assert (folder / "report" / "curves.png").stat().st_size > 0
    assert json.dumps(runs.results(balanced))
