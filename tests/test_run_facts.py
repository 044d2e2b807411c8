"""Speed, machine and configuration of runs, as the report shows them."""

import math

from bsce_jax.report import run_facts
from tests.example_page import make_run


def test_facts_of_a_run() -> None:
    run = make_run(steps=1, base=4)
    for record, seconds in zip(run["steps"], (60.0, 65.0), strict=True):
        record["telemetry"] |= {"seconds": seconds, "images_per_second": seconds}
    run["steps"][-1]["telemetry"]["devices"] = 8
    facts = run_facts.facts(run)
    assert (facts.images_per_second, facts.seconds) == (62.5, 125.0)
    assert facts.environment.device == "8 × NVIDIA H100 80GB HBM3"
    assert ("jax", "0.10.2") in facts.environment.versions
    odd = {"seconds": None, "images_per_second": "fast", "versions": 3, "devices": {}}
    for record in run["steps"]:
        record["telemetry"] = odd
    empty = run_facts.Environment("", "", ())
    assert run_facts.facts(run) == run_facts.Facts(None, None, "", 0, empty)
    assert run_facts.wall_time(run_facts.facts(run)) == "–"
    for record in run["steps"]:
        record["telemetry"] = {"seconds": math.nan, "images_per_second": math.inf}
    assert run_facts.facts(run) == run_facts.Facts(None, None, "", 0, empty)


def test_a_base_step_of_another_run_and_skipped_images_are_told() -> None:
    run = make_run(steps=1, base=4)
    assert run_facts.wall_time(run_facts.facts(run)).endswith(" min")
    run["config"]["init_from"] = "runs/first-seed0"
    run["steps"][0]["telemetry"]["skipped_test_images"] = 2
    run["steps"][1]["telemetry"]["skipped_test_images"] = 3
    facts = run_facts.facts(run)
    assert (facts.base_from, facts.skipped) == ("first-seed0", 3)
    assert run_facts.wall_time(facts).endswith(" min + base step")


def test_fields_that_differ_from_the_defaults_come_first() -> None:
    runs = [
        {
            "config": {
                "seed": seed,
                "prior": "meta",
                "name": "",
                "new": [1],
                "init_from": "x",
            }
        }
        for seed in (0, 1)
    ]
    changed, rest = run_facts.fields(runs, {"seed": 0, "prior": "none", "name": ""})
    assert changed == [("seed", "0, 1", "0"), ("prior", "meta", "none"),
                       ("new", "[1]", None)]  # fmt: skip
    assert rest == [("name", '""', '""')]


def test_units() -> None:
    times = [run_facts.duration(s) for s in (59.4, 60, 3599, 3600, 7500)]
    assert times == ["59 s", "1 min", "1 h 00 min", "1 h 00 min", "2 h 05 min"]
    assert run_facts.rate(41234.6) == "41\N{NARROW NO-BREAK SPACE}235"
    assert run_facts.short_commit("0123456789abcdef-dirty") == "0123456789-dirty"
