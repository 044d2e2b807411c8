"""Results files: schema 3, what is read of schema 2, writing, the summary."""

import copy
import json
import os
import pathlib
import shutil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsce_jax.errors import UserError
from bsce_jax.report import results, tables
from tests.example_results import make_results

ROOT = pathlib.Path(__file__).resolve().parent.parent


@settings(max_examples=10, deadline=None)
@given(
    name=st.text().map(lambda text: "".join(filter(str.isprintable, text))),
    seed=st.integers(0, 2**32 - 1),
    base=st.integers(1, 7),
    increment=st.integers(1, 3),
    steps=st.integers(0, 3),
    learned_alpha=st.booleans(),
    learned_own=st.booleans(),
    memory=st.booleans(),
    telemetry=st.dictionaries(
        st.text(), st.none() | st.floats(allow_nan=False, allow_infinity=False)
    ),
)
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, telemetry: dict[str, Any], **fields: Any
) -> None:
    written = make_results(**fields)
    written["steps"][-1]["telemetry"] = telemetry
    workdir = tmp_path_factory.mktemp("run")
    results.write(workdir, written)
    assert results.read(workdir) == written
    assert [path.name for path in workdir.iterdir()] == ["results.json"]


@pytest.mark.parametrize("function", ["os.replace", "os.fsync"])
def test_a_crash_while_writing_keeps_the_old_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    results.write(tmp_path, make_results(seed=1))

    def crash(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(function, crash)
        with pytest.raises(KeyboardInterrupt):
            results.write(tmp_path, make_results(seed=2))
    assert results.read(tmp_path) == make_results(seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_what_a_killed_write_left_behind_is_overwritten(tmp_path: pathlib.Path) -> None:
    (tmp_path / ".results.json.tmp").write_text('{"schema": 1, "na')
    results.write(tmp_path, make_results())
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_full_disk_is_one_clear_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="results.json cannot be written: No space"):
        results.write(tmp_path, make_results())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        ("[]", r"the whole is \[\], expected an object"),
        ('{"schema": 1}', "schema is 1, expected 3, or 2 in a file"),
        ("{}", "schema is None, expected 3"),
    ],
)
def test_reading_refuses_in_one_line(
    tmp_path: pathlib.Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        results.read(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


MISSING = object()
BAD_FIELDS: list[tuple[str, Any]] = [
    ("name", 3),
    ("status", "finished"),
    ("config", None),
    ("base_hash", MISSING),
    ("class_order", [0, 1, 2]),
    ("class_order", [0] * 8),
    ("extra", 1),
    ("summary", {}),
    ("summary.final_top1", "91"),
    ("steps", {}),
    ("steps.1.step", 2),
    ("steps.1.telemetry", MISSING),
    ("steps.1.result.num_old", 3),
    ("steps.1.result.num_seen", 9),
    ("steps.1.result.num_seen", True),
    ("steps.1.result.train_images", 2.0),
    ("steps.1.result.counts", [1, 2]),
    ("steps.1.result.counts", [1, 2, 3, 4, 5, -6]),
    ("steps.1.result.top1", 100.5),
    ("steps.1.result.top1", float("nan")),
    ("steps.0.result.top5", 99.0),
    ("steps.1.result.top5", None),
    ("steps.0.result.top1_old", 50.0),
    ("steps.1.result.top1_old", None),
    ("steps.1.result.top1_by_task", [1.0]),
    ("steps.1.result.top1_nearest_mean", 101.0),
    ("steps.1.result.loss", [1.5]),  # schema 2
    ("steps.1.result.phases", MISSING),
    ("steps.1.result.phases", []),
    ("steps.1.result.phases", {"incremental": [1.5]}),
    ("steps.1.result.phases.incremental", {"loss": [1.5]}),
    ("steps.1.result.phases.incremental.extra", []),
    ("steps.1.result.phases.incremental.loss", [float("inf"), 1.0]),
    ("steps.1.result.phases.incremental.accuracy", [50.0, 101.0]),
    ("steps.1.result.phases.incremental.accuracy", [50.0]),
    ("steps.1.result.alpha", [0.5]),
    ("steps.1.result.own", None),
    ("steps.1.result.own", {"scale": float("nan")}),
    ("steps.1.result.own", {"scale": [1.0]}),
    ("steps.1.result.parameters_sha256", "abc"),
    ("steps.1.result.confusion", []),  # only in the newest record
    ("steps.2.result.confusion", MISSING),
    ("steps.2.result.confusion", [[0, 8, 1]]),
    ("steps.2.result.confusion", [[0, 0, 0]]),
]


@pytest.mark.parametrize(("path", "value"), BAD_FIELDS)
def test_validation_names_the_field(path: str, value: Any) -> None:
    broken = make_results()
    results.validate(broken)
    *parents, field = path.split(".")
    target: Any = broken
    for parent in parents:
        target = target[int(parent) if parent.isdigit() else parent]
    if value is MISSING:
        del target[field]
    else:
        target[field] = value
    with pytest.raises(UserError) as error:
        results.validate(broken)
    message = str(error.value)
    assert field in message
    assert "\n" not in message
    for number in (parent for parent in parents if parent.isdigit()):
        assert f"steps[{number}]" in message


def test_a_step_may_have_any_phases_or_none() -> None:
    made = make_results()
    made["steps"][1]["result"]["phases"] = {}
    made["steps"][2]["result"]["phases"] = {
        "main": {"loss": [0.5, 0.25], "accuracy": [70.0, 80.0]},
        "bias": {"loss": [1], "accuracy": []},
    }
    results.validate(made)


def of_schema_2(made: dict[str, Any]) -> dict[str, Any]:
    """The same results as an earlier version wrote them."""
    made = copy.deepcopy(made) | {"schema": 2}
    for record in made["steps"]:
        result = record["result"]
        finetuning = result["phases"].pop("finetune", {"loss": []})
        (trained,) = result.pop("phases").values()
        assert result.pop("own") == {}
        result["loss"], result["train_accuracy"] = trained["loss"], trained["accuracy"]
        result["finetune_loss"] = finetuning["loss"]
    return made


def test_schema_2_is_read_as_schema_3(tmp_path: pathlib.Path) -> None:
    made = make_results()
    finetuned = made["steps"][2]["result"]["phases"]
    finetuned["finetune"] = {"loss": [0.3, 0.2], "accuracy": []}
    older = of_schema_2(made)
    text = json.dumps(older)
    (tmp_path / "results.json").write_text(text)
    found = results.read(tmp_path)
    assert found == made
    assert [list(r["result"]["phases"]) for r in found["steps"]] == [
        ["base"],
        ["incremental"],
        ["incremental", "finetune"],
    ]
    assert (tmp_path / "results.json").read_text() == text
    with pytest.raises(UserError, match="schema is 2, expected 3"):
        results.write(tmp_path, older)
    results.write(tmp_path, found)
    assert json.loads((tmp_path / "results.json").read_text())["schema"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": MISSING}, r"steps\[1\].result.loss is missing"),
        ({"finetune_loss": None}, r"steps\[1\].result.finetune_loss is None"),
        ({"train_accuracy": [101.0]}, r"steps\[1\].result.train_accuracy is \[101"),
        ({"top1": -1.0}, r"steps\[1\].result.top1 is -1.0"),
        ({"extra": 1}, r"steps\[1\].result.extra is unknown"),
    ],
)
def test_a_broken_file_of_schema_2_is_refused_in_one_line(
    tmp_path: pathlib.Path, change: dict[str, Any], message: str
) -> None:
    older = of_schema_2(make_results())
    for field, value in change.items():
        older["steps"][1]["result"][field] = value
        if value is MISSING:
            del older["steps"][1]["result"][field]
    (tmp_path / "results.json").write_text(json.dumps(older))
    with pytest.raises(UserError, match=message) as error:
        results.read(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("steps", ["[3]", '[{"result": 3}]', "{}", "3", "null"])
def test_a_file_of_schema_2_that_no_program_wrote(
    tmp_path: pathlib.Path, steps: str
) -> None:
    text = f'{{"schema": 2, "steps": {steps}}}'
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError):
        results.read(tmp_path)


COMMITTED = sorted(ROOT.glob("results/*/*.json"))


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_the_committed_results_can_be_read(
    tmp_path: pathlib.Path, file: pathlib.Path
) -> None:
    shutil.copy(file, tmp_path / "results.json")
    found = results.read(tmp_path)
    assert found["schema"] == results.SCHEMA
    written = json.loads(file.read_text())
    for given_, record in zip(written["steps"], found["steps"], strict=True):
        if written["schema"] == results.SCHEMA:
            assert record == given_
            continue
        first, *others = record["result"]["phases"].items()
        assert first[0] == ("incremental" if record["step"] else "base")
        assert first[1]["loss"] == given_["result"]["loss"]
        tuned = [history["loss"] for _, history in others]
        assert tuned == [x for x in [given_["result"]["finetune_loss"]] if x]
    assert results.summary(found["steps"]) == found["summary"]
    assert str(found["steps"][-1]["result"]["num_seen"]) in tables.step_table(found)


def test_there_are_committed_results() -> None:
    assert len(COMMITTED) > 20


def test_a_long_value_is_shortened_in_the_message() -> None:
    broken = make_results()
    broken["config"] = "x" * 1000
    with pytest.raises(UserError) as error:
        results.validate(broken)
    assert len(str(error.value)) < 120


def test_summary_by_hand() -> None:
    steps = [
        {"result": {"top1": 90.0, "top5": None, "top1_base": 90.0,
                    "top1_nearest_mean": 80.0, "top1_by_task": [90.0]}},
        {"result": {"top1": 60.0, "top5": 80.0, "top1_base": 50.0,
                    "top1_nearest_mean": 70.0, "top1_by_task": [50.0, 80.0]}},
        {"result": {"top1": 48.0, "top5": 70.0, "top1_base": 40.0,
                    "top1_nearest_mean": 60.0, "top1_by_task": [40.0, 60.0, 70.0]}},
    ]  # fmt: skip
    assert results.summary(steps) == {
        "average_incremental_top1": 66.0,
        "average_incremental_top5": None,  # the base step has none
        "average_incremental_nearest_mean": 70.0,
        "final_top1": 48.0,
        "final_base_top1": 40.0,
        "forgetting": 35.0,  # mean of 90 - 40 and 80 - 60
    }
    steps[0]["result"]["top5"] = 99.0
    assert results.summary(steps)["average_incremental_top5"] == 83.0
    steps[2]["result"]["top1_nearest_mean"] = None
    assert results.summary(steps)["average_incremental_nearest_mean"] is None
    assert results.summary(steps[:1])["forgetting"] is None
    assert set(results.summary([]).values()) == {None}


def test_the_deterministic_part_ignores_telemetry_alone() -> None:
    undisturbed, resumed = make_results(), make_results()
    resumed["steps"][1]["telemetry"] = {"seconds": 99.0, "resumed": True}
    resumed["config"]["data.data_dir"] = "elsewhere"
    assert resumed != undisturbed
    assert results.deterministic(resumed) == results.deterministic(undisturbed)
    for field in undisturbed["steps"][1]["result"]:
        changed = copy.deepcopy(undisturbed)
        changed["steps"][1]["result"][field] = "changed"
        assert results.deterministic(changed) != results.deterministic(undisturbed)


def test_the_file_is_strict_json(tmp_path: pathlib.Path) -> None:
    bad = make_results()
    bad["steps"][0]["telemetry"]["own"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        results.write(tmp_path, bad)
    assert not list(tmp_path.iterdir())
    results.write(tmp_path, make_results())
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == make_results()


def test_a_class_order_of_imagenet_is_a_setting(tmp_path: pathlib.Path) -> None:
    """As long as its field allows, which other texts may not be."""
    written = make_results(steps=1)
    written["config"]["scenario.class_order"] = ", ".join(map(str, range(1000)))
    results.write(tmp_path, written)
    assert results.read(tmp_path) == written
    written["config"]["data.name"] = written["config"]["scenario.class_order"]
    with pytest.raises(UserError, match="config.data.name"):
        results.write(tmp_path, written)


@pytest.mark.parametrize(
    "wrong", [{"method": 5}, {"data.name": True}, {"prior": None}, {"short": "x"}]
)
def test_settings_of_another_type_give_a_title(wrong: dict[str, Any]) -> None:
    made = make_results(steps=1)
    made["config"] |= wrong
    assert tables.title(made) == made["name"]
