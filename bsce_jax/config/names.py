"""What a run is called, of its flattened and resolved configuration."""

from collections.abc import Mapping
from typing import Any

from bsce_jax import methods
from bsce_jax.errors import UserError

Flat = Mapping[str, Any]


def default_name(flat: Flat) -> str:
    """The name of a run that was given none: data set, method, prior and steps."""
    steps = f"{flat['scenario.steps']}steps"
    parts = [flat["data.name"], flat["method"], _short_prior(flat), steps]
    if flat.get("short", 1) > 1:
        parts.append(f"short{flat['short']}")
    return "-".join(parts)


def _short_prior(flat: Flat) -> str:
    prior = flat["prior"]
    if prior == "weighted":
        return f"weighted{flat['alpha']:g}"
    if prior == "relaxed":
        unit = "pc" if flat["epsilon_unit"] == "percent" else ""
        return f"relaxed{flat['epsilon']:g}{unit}"
    return prior


def title(flat: Flat) -> str:
    """Method and prior as the paper has them, for a legend."""
    try:
        method = methods.about(flat["method"]).title
    except UserError:  # somebody's own, which is not here
        method = flat["method"]
    prior = {"balanced": "BalancedS-CE", "meta": "Meta BalancedS-CE"}.get(flat["prior"])
    if flat["prior"] == "weighted":
        prior = f"BalancedS-CE, alpha = {flat['alpha']:g}"
    if flat["prior"] == "relaxed":
        unit = " %" if flat["epsilon_unit"] == "percent" else ""
        prior = f"Relaxed, epsilon = {flat['epsilon']:g}{unit}"
    return f"{method} + {prior}" if prior else method
