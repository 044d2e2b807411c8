"""Results that somebody else has written, or damaged: predictions and reports."""

import copy
import functools
import json
import pathlib
from typing import Any

import pytest

from bsce_jax import predict
from bsce_jax.config import hashes, method_module, recorded, resolve
from bsce_jax.config.fields import default_config
from bsce_jax.errors import UserError
from bsce_jax.report import __main__ as report
from bsce_jax.report import results
from tests import runs
from tests.example_results import make_results

MISSING = type("Missing", (), {"__repr__": lambda self: "missing"})()


@functools.cache
def _flat() -> str:
    config = default_config()
    method_module(str(runs.ROOT / "configs" / "x.py"), "mnemonics").configure(
        config, "digits"
    )
    config.data.mean, config.data.std = (0.5,), (0.25,)
    config.model.name = "resnet8"
    config.scenario.base_classes, config.scenario.steps = 4, 2
    return json.dumps(hashes.flatten(resolve.resolve(config)))


def flat() -> dict[str, Any]:
    """A configuration as results.json has it."""
    return json.loads(_flat())


def changed(values: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """A copy in which the field at `place`, a path of "/", is another or missing."""
    values = copy.deepcopy(values)
    part: Any = values
    keys = [int(key) if key.isdigit() else key for key in place.split("/")]
    *parents, field = keys
    for parent in parents:
        part = part[parent]
    if value is MISSING:
        del part[field]
    else:
        part[field] = value
    return values


def refused(workdir: pathlib.Path, values: Any, message: str) -> None:
    """Before a checkpoint is looked for: there is none."""
    (workdir / results.FILE_NAME).write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as error:
        predict.load(workdir)
    line = str(error.value)
    assert line.startswith(f"{workdir / results.FILE_NAME}: ") and "\n" not in line
    assert len(line) < 600


def test_a_configuration_comes_back_as_it_was() -> None:
    found = recorded.nested(flat(), ["method", "model.", "optim.", "data.mean"])
    assert hashes.flatten(found) == flat() and found.data.mean == (0.5,)
    newer = flat() | {"data.unheard_of": 3, "phase.base.unheard_of": [1]}
    assert hashes.flatten(recorded.nested(newer, [])) == flat()
    older = {name: value for name, value in flat().items() if "epochs" not in name}
    defaults = {n: 0 for n in flat() if n.startswith("phase.") and "epochs" in n}
    found = hashes.flatten(recorded.nested(older, ["model."]))
    assert found == older | defaults


WRONG = [None, "x", [], ["x"], {"a": 1}, True, 10**30, 0.1234]


@pytest.mark.parametrize("name", ["model.width", "data.mean", "memory.kind", "method"])
@pytest.mark.parametrize("value", WRONG, ids=str)
def test_a_value_of_another_type_is_one_line(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^config\.{name}=") as error:
        found = recorded.nested(flat() | {name: value}, [])
        assert name == "data.mean" and found.data.mean == ()  # of no channels
        raise UserError("config.data.mean=()")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["model", "method.x", "terms", "options", "phase.base.terms", "memory.kind."],
)
def test_a_field_inside_of_another_is_one_line_or_unheard_of(name: str) -> None:
    for values in (flat() | {name: 3}, {name: 3} | flat()):
        try:
            assert hashes.flatten(recorded.nested(values, [])) == flat()
        except UserError as error:
            assert "\n" not in str(error) and f"config.{name[:5]}" in str(error)


def test_predictions_miss_no_field_without_a_word(tmp_path: pathlib.Path) -> None:
    made = make_results() | {"config": flat()}
    section_of_each = ("method", "model.name", "data.std", "options.halves")
    for name in (*section_of_each, "optim.clip", "prior", "meta.fraction"):
        message = f"config.{name} is missing"
        refused(tmp_path, changed(made, f"config/{name}", MISSING), message)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("config", {}, "made by a version before 0.2"),
        ("config/data.mean", [0.5, 0.5, 0.5], "data.mean=.*expected 1 numbers, one a"),
        ("config/data.std", [], "data.std=.*expected 1 numbers"),
        ("config/model.name", "resnet7", "model='resnet7' is unknown"),
        ("config/method", "os", "method='os': expected one of"),
        ("config/scenario.base_classes", 7, "steps=2"),
        ("config/options.halves", "many", "options.halves='many'"),
        ("config/" + "x" * 10**6, 1, "config is 'xxx"),
        ("config/seed", "x" * 10**6, "config.seed is 'xxx"),
        ("config/seed", float("1e300"), "config.seed is 1e"),
        ("image_shape", [8, 8], "image_shape is .8, 8., expected three counts"),
        ("image_shape", [8, 8, 0], "image_shape"),
        ("image_shape", [10**9, 10**9, 1], "image_shape"),
        ("image_shape", "8x8", "image_shape"),
        ("image_shape", MISSING, "image_shape is missing"),
        ("name", "x" * 10**6, "name is 'xxx.*expected text of 4000"),
        ("name", "\x1b[2J", "name is"),
        ("name", "\ud800", "name is"),
        ("class_names/1", "\ud800", "class_names is"),
        ("data", {"other": {"images": 1, "digest": ""}}, "data is"),
        (
            "steps/1/telemetry/seconds",
            "long",
            "telemetry.seconds is 'long', expected a",
        ),
        ("steps/1/telemetry/images_per_second", [], "images_per_second is"),
        ("steps/0/telemetry/skipped_test_images", True, "skipped_test_images is True"),
        ("steps/1/result/top1", 10**400, "top1 is"),
        ("steps/1/result/memory_images", 10**400, "memory_images is"),
        ("steps/2/result/confusion", [[0, 0, 10**400]], "confusion is"),
        ("steps/1/result/own", {"scale": 10**400}, "own is"),
        ("steps/1/result/top1_nearest_mean", None, "average_incremental_nearest_mean"),
        ("summary/average_incremental_top1", None, "expected a number"),
        ("summary/average_incremental_top5", 50.0, "expected null"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "replace").decode(),
)
def test_a_field_that_cannot_be_is_one_line(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    place: str,
    value: Any,
    message: str,
) -> None:
    made = make_results() | {"config": flat()}
    refused(tmp_path, changed(made, place, value), message)
    if not place.startswith("config"):  # of which a report shows what there is
        assert report.main([str(tmp_path)]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith(f"error: {tmp_path}") and shown.count("\n") == 1


def test_results_nested_too_deep_are_one_line(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / results.FILE_NAME
    path.write_text("[" * 5000 + "]" * 5000)
    assert report.main([str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert shown == f"error: {path} is not valid: its values are nested too deep\n"
