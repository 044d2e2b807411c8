"""A configuration as flat fields, its hash, and what makes two differ."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

# Fields that cannot change the results of a run that ends: not part of its hash.
NOT_HASHED = (
    "name",
    "print_plan",
    "log_seconds",
    "compile_cache",
    "init_from",
    "checkpoint",
    "data.data_dir",
    "data.workers",
    "data.timeout",
    "data.corrupt",  # a run that "refuse" has ended goes on with "skip"
)


def flatten(config: ConfigDict) -> dict[str, Any]:
    """The configuration as one dict with dotted names."""
    flat: dict[str, Any] = {}

    def visit(section: Mapping[str, Any], prefix: str) -> None:
        for name, value in section.items():
            if isinstance(value, Mapping):
                visit(value, f"{prefix}{name}.")
            else:
                flat[prefix + name] = list(value) if type(value) is tuple else value

    visit(config.to_dict(), "")
    return flat


def digest(values: Any) -> str:
    """SHA-256 (hexadecimal) of JSON-able values, independent of dict order."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def config_hash(config: ConfigDict) -> str:
    """Identifies all fields that can change the results."""
    return digest({n: v for n, v in flatten(config).items() if is_hashed(n)})


def is_hashed(name: str) -> bool:
    """Whether a field, by its dotted name, can change the results."""
    return not any(name == n or name.startswith(n + ".") for n in NOT_HASHED)


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What makes the hashes of two flattened configurations differ, in a line."""
    names = sorted(
        name
        for name in theirs.keys() | ours.keys()
        if is_hashed(name) and theirs.get(name) != ours.get(name)
    )
    shown = [f"{n}: {theirs.get(n)!r} there, {ours.get(n)!r} here" for n in names[:3]]
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return "; ".join(shown) + more
