"""The priors: what each needs, and what it is in a step.

`config.prior` chooses the log-prior that is added to the logits in training (see
`bsce_jax.log_prior`); all that depends on which one it is stands here. Arrays are
NumPy's.
"""

from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray

from bsce_jax import log_prior as vectors
from bsce_jax.config import terms
from bsce_jax.errors import field_error

PAPER_EPSILON = (0.2, "percent")
"""Epsilon and its unit in all experiments of Jodelet et al. without memory."""

# Priors that are not those of a balanced set's counts, which exemplars and held-out
# images are.
_OWN_COUNTS = ("weighted", "meta", "relaxed")


def check(config: ConfigDict) -> None:
    """Refuses what does not go together with the prior.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    prior, kept = config.prior, config.memory
    if prior == "none":
        return
    if config.classification == "separated_softmax_ce":
        raise field_error("classification", config.classification, "auto with a prior")
    used = terms.with_prior(config.terms, prior, config.classification)
    if not any(map(terms.reads_log_prior, used)):
        raise field_error("prior", prior, "none: no softmax_ce among the terms")
    if prior == "meta" and kept.kind == "none":
        raise field_error("prior", "meta", "another prior where memory.kind is none")
    if prior == "meta" and kept.kind == "growing" and kept.per_class < 2:
        raise field_error(
            "memory.per_class", kept.per_class, "at least 2 for prior=meta"
        )
    if prior == "relaxed" and config.epsilon == 0 and kept.kind != "none":
        raise field_error(
            "epsilon", 0.0, "above 0: exemplars are labels of old classes"
        )
    for name, phase in config.phase.items():
        balanced = phase.images != "training" and phase.epochs > 0
        if prior in _OWN_COUNTS and balanced and phase.when_prior == "any":
            raise field_error(
                f"phase.{name}.when_prior", "any", f"none for prior={prior}"
            )


def fill_in(config: ConfigDict) -> None:
    """Gives prior=relaxed the paper's epsilon where there is none; in place."""
    if config.prior == "relaxed" and config.epsilon is None:
        config.epsilon, config.epsilon_unit = PAPER_EPSILON


def epsilon_count(config: ConfigDict) -> float:
    """Epsilon of Eq. 6 as a number of images (500 a class: 0.2 % is 1)."""
    if config.epsilon_unit == "percent":
        return config.epsilon / 100.0 * config.data.nominal_per_class
    return config.epsilon


def log_prior(
    config: ConfigDict, counts: NDArray, old: NDArray, seen: NDArray
) -> NDArray[np.float32]:
    """The log-prior of a training set, for alpha = 1.

    It is shifted to a maximum of 0, which changes no loss (Eq. 3 to 6 depend on ratios
    only), so that equal counts give the very same base step.

    Args:
      config: resolved configuration.
      counts: [C] training images of each class.
      old: [C] bool, classes learned in an earlier step.
      seen: [C] bool, classes learned so far, this step's included.

    Returns:
      float32 [C]; `vectors.EXCLUDED` for a class that takes no part.
    """
    counts = np.asarray(counts).astype(np.float32)
    if config.prior == "none":
        prior = vectors.uniform(seen)
    elif config.prior == "relaxed":
        prior = vectors.relaxed(counts, old, epsilon_count(config))
    else:
        prior = vectors.balanced(counts)
    found = np.asarray(prior)
    shifted = np.where(found > vectors.EXCLUDED, found - found.max(), found)
    return shifted.astype(np.float32)


def initial_alpha(config: ConfigDict) -> float:
    """Alpha of Eq. 5 as an incremental step begins."""
    return config.alpha if config.prior == "weighted" else 1.0


def learns_alpha(config: ConfigDict) -> bool:
    """Whether alpha is learned on a held-out set."""
    return config.prior == "meta"


def learns_alpha_in(config: ConfigDict, phase: ConfigDict) -> bool:
    """Whether alpha is learned in a phase: on the training set, where a network is."""
    later = phase.steps == "later" and phase.images == "training"
    return learns_alpha(config) and later and moves_network(phase.rate)


def moves_network(rates: Mapping[str, float]) -> bool:
    """Whether a phase trains more than what is a method's own, by its groups' rates."""
    return any(rate for group, rate in rates.items() if group != "own")
