"""The priors in the configuration: refusals, epsilon, and the vector of a step."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from bsce_jax import log_prior as vectors
from bsce_jax.config import priors
from bsce_jax.config.fields import default_config, phase
from bsce_jax.config.hashes import flatten
from bsce_jax.config.resolve import resolve
from bsce_jax.errors import UserError

COUNTS = np.array([20, 20, 500, 480, 0])
OLD = np.array([True, True, False, False, False])
SEEN = np.array([True, True, True, True, False])


def example(prior: str = "none", **values: object) -> ConfigDict:
    config = default_config()
    config.terms = ConfigDict({"softmax_ce": {"weight": 1.0}})
    config.prior = prior
    config.update_from_flattened_dict(values)
    return config


def balanced_phase(**changes: object) -> ConfigDict:
    config = example()
    config.phases = (*config.phases, "last")
    config.phase.last = phase(images="exemplars", epochs=1, **changes)
    return config


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"prior": "meta", "memory.kind": "none"}, "prior"),
        ({"prior": "meta", "memory.per_class": 1}, "memory.per_class"),
        ({"prior": "relaxed", "epsilon": 0.0}, "epsilon"),
        ({"prior": "weighted", "classification": "separated_softmax_ce"}, "classific"),
    ],
)
def test_refusals(values, named):
    with pytest.raises(UserError, match=f"^config.{named}[a-z]*=.*: expected "):
        resolve(example(**values))


def test_a_prior_needs_a_classification_loss():
    config = example("balanced")
    config.terms = ConfigDict({"kd": {"weight": 1.0}})
    message = "config.prior='balanced': expected none: no softmax_ce among the terms"
    with pytest.raises(UserError, match=message):
        resolve(config)


@pytest.mark.parametrize("prior", ["none", "balanced", "weighted", "meta", "relaxed"])
def test_a_balanced_phase_goes_with_the_priors_of_its_counts_only(prior):
    config = balanced_phase()
    config.prior = prior
    if prior in ("none", "balanced"):
        resolve(config)
    else:
        message = f"phase.last.when_prior='any': expected none for prior={prior}"
        with pytest.raises(UserError, match=message):
            resolve(config)
    for name, value in (("when_prior", "none"), ("epochs", 0), ("images", "training")):
        other = config.copy_and_resolve_references()
        other.phase.last[name] = value
        resolve(other)


@pytest.mark.parametrize(
    "values",
    [
        {"prior": "meta", "memory.kind": "fixed", "memory.per_class": 0},
        {"prior": "meta", "memory.per_class": 2},
        {"prior": "relaxed"},
        {"prior": "relaxed", "memory.kind": "none"},
        {"prior": "relaxed", "memory.kind": "none", "epsilon": 0.0},
        {"prior": "relaxed", "epsilon": 1e-9},
    ],
)
def test_what_goes_together_is_allowed(values):
    config = resolve(example(**values))
    assert resolve(config) == config


@pytest.mark.parametrize(("images", "epsilon"), [(500, 1), (1300, 2.6), (100, 0.2)])
def test_the_epsilon_of_the_paper_is_a_percentage_of_any_data_set(images, epsilon):
    config = resolve(example("relaxed", **{"data.nominal_per_class": images}))
    assert (config.epsilon, config.epsilon_unit) == (0.2, "percent")
    assert priors.epsilon_count(config) == pytest.approx(epsilon)


def test_an_epsilon_that_is_given_stays():
    found = resolve(example("relaxed", epsilon=2))
    assert (found.epsilon, found.epsilon_unit) == (2.0, "count")
    assert priors.epsilon_count(found) == 2.0
    config = example("relaxed", epsilon=0.0, **{"memory.kind": "none"})
    assert priors.epsilon_count(resolve(config)) == 0.0
    for prior in ("none", "balanced", "weighted", "meta"):
        config = resolve(example(prior))
        assert config.epsilon is None and flatten(config)["epsilon"] is None
        assert config.epsilon_unit == "count"


def expected(config: ConfigDict) -> np.ndarray:
    """The vector from the formulas of the paper, in float64."""
    numbers = {
        "none": SEEN.astype(float),
        "relaxed": np.where(OLD, config.epsilon or 0.0, COUNTS),
    }.get(config.prior, COUNTS.astype(float))
    with np.errstate(divide="ignore"):
        found = np.log(numbers)
    return np.where(numbers > 0, found - found.max(), vectors.EXCLUDED)


@pytest.mark.parametrize(
    ("prior", "values"),
    [
        ("none", {}),
        ("balanced", {}),
        ("weighted", {"alpha": 0.5}),
        ("meta", {}),
        ("relaxed", {"epsilon": 1.0}),
        ("relaxed", {"epsilon": 0.0, "memory.kind": "none"}),
    ],
)
def test_the_log_prior_of_a_step(prior, values):
    config = resolve(example(prior, **values))
    found = priors.log_prior(config, COUNTS, OLD, SEEN)
    assert found.dtype == np.float32 and found.shape == COUNTS.shape
    assert found.max() == 0
    np.testing.assert_allclose(found, expected(config), rtol=1e-6, atol=1e-6)
    assert found[-1] == np.float32(vectors.EXCLUDED)


def test_equal_counts_give_the_same_base_step():
    counts, old = np.array([500, 500, 0]), np.zeros(3, bool)
    seen = np.array([True, True, False])
    one, *others = (
        priors.log_prior(resolve(example(prior)), counts, old, seen)
        for prior in ("none", "balanced", "weighted", "meta", "relaxed")
    )
    for other in others:
        np.testing.assert_array_equal(one, other)


def test_alpha_is_fixed_or_learned():
    config = example("weighted", alpha=0.25)
    assert priors.initial_alpha(config) == 0.25 and not priors.learns_alpha(config)
    for prior in ("none", "balanced", "meta", "relaxed"):
        config = example(prior, alpha=0.25)
        assert priors.initial_alpha(config) == 1.0
        assert priors.learns_alpha(config) == (prior == "meta")
