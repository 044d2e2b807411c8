"""What may be shared: all that reaches the base step."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from bsce_jax.config import terms
from bsce_jax.config.hashes import base_fields, digest, flatten
from bsce_jax.run.dataset import Dataset
from bsce_jax.run.phases import configured, held_out_once


def base_hash(config: ConfigDict, dataset: Dataset) -> str:
    """Identifies all that reaches the base step: equal hashes may share one.

    The training records and their order count, and the class order as far as it decides
    the base classes and the head's rows; the log-prior counts up to an additive
    constant; terms that need old classes, the memory and the later steps do not count.
    """
    part = base_fields(flatten(config))
    base = dataset.groups[0].stop
    part["class_order"] = [int(i) for i in dataset.class_order[:base]]
    part["num_classes"] = dataset.num_classes
    part["data"] = dataset.train.digest
    counts = dataset.images_per_class[:base]
    equal = bool(np.all(counts == counts[0]))
    part["terms"] = [
        _base_terms(
            terms.of_phase(config.terms, config.phase[phase.name].terms), base, equal
        )
        for phase in configured(config)
        if phase.steps == "base"
    ]
    if never := held_out_once(config, dataset).shape[1]:
        part["held_out"] = never
    if config.optim.weight_decay_by_step == "groups/step":
        part["groups"] = len(dataset.groups)
    if config.prior != "none" and not equal:
        part["counts"] = [int(n) for n in counts]
    return digest(part)


def _base_terms(used: ConfigDict, base: int, equal: bool) -> dict[str, Any]:
    """What each term is in the base step; rescaling has no effect on equal classes."""
    found = {}
    for name, term in used.items():
        what, weight = terms.in_base_step(name), terms.weight(name, term, 0, base)
        if what and weight:
            options = {**term.to_dict(), "weight": weight}
            if equal:
                options |= {k: False for k in terms.RESCALING if k in options}
            found[name if what in used else what] = options
    return found
