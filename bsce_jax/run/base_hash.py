"""What may be shared: all that reaches the base step."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from bsce_jax.config import terms
from bsce_jax.config.hashes import digest, flatten
from bsce_jax.run.dataset import Dataset

_BASE_SECTIONS = ("data.", "model.", "optim.base_")


_BASE_FIELDS = (
    "seed",
    "matmul_precision",
    "optim.batch_size",
    "optim.momentum",
    "optim.weight_decay",
    "optim.decay",
    "optim.clip",
    "optim.schedule",
)


_NOT_BASE = (
    "data.data_dir",
    "data.nominal_per_class",
    "data.workers",
    "data.timeout",
    "data.corrupt",
)


def reaches_base(name: str) -> bool:
    """Whether a field, by its dotted name, reaches the base step as it stands."""
    chosen = name in _BASE_FIELDS or name.startswith(_BASE_SECTIONS)
    return chosen and name not in _NOT_BASE


def base_hash(config: ConfigDict, dataset: Dataset) -> str:
    """Identifies all that reaches the base step: equal hashes may share one.

    The class order counts as far as it decides the base classes and the head's rows;
    the log-prior counts up to an additive constant; terms that need old classes, the
    memory and the later steps do not count.
    """
    fields = flatten(config)
    part = {name: fields[name] for name in fields if reaches_base(name)}
    base = dataset.groups[0].stop
    part["class_order"] = [int(i) for i in dataset.class_order[:base]]
    part["num_classes"] = dataset.num_classes
    counts = dataset.images_per_class[:base]
    equal = bool(np.all(counts == counts[0]))
    part["terms"] = _base_terms(config, base, equal)
    if config.prior != "none" and not equal:
        part["counts"] = [int(n) for n in counts]
    return digest(part)


def _base_terms(config: ConfigDict, base: int, equal: bool) -> dict[str, Any]:
    """What each term is in the base step; rescaling has no effect on equal classes."""
    found = {}
    for name, term in config.terms.items():
        what, weight = terms.in_base_step(name), terms.weight(name, term, 0, base)
        if what and weight:
            options = {**term.to_dict(), "weight": weight}
            if equal:
                options |= {k: False for k in terms.RESCALING if k in options}
            found[name if what in config.terms else what] = options
    return found
