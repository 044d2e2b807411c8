"""The JSON of a checkpoint: its number, its meta, and what each array must be."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from bsce_jax import untrusted
from bsce_jax.checkpoints import orbax_files
from bsce_jax.errors import UserError


class CheckpointError(UserError):
    """A checkpoint cannot be written, read or fitted to its target."""


class DamagedError(CheckpointError):
    """A checkpoint is incomplete or its checksums do not match."""


def spec_of(leaf: Any) -> dict[str, Any]:
    """Shape and dtype as JSON."""
    return {"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name}


def array_hash(array: np.ndarray) -> str:
    """SHA-256 of dtype, shape and bytes."""
    digest = hashlib.sha256(f"{array.dtype.name}{array.shape}".encode())
    # Flat bytes, since bfloat16 offers no buffer of its own.
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _json_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all entries but the hash itself, independent of key order."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def seal(number: int, leaves: dict[str, Any], meta: Mapping[str, Any]) -> dict:
    """The manifest: number, meta, and shape, dtype and hash of each array."""
    specs = {name: spec_of(x) | {"sha256": array_hash(x)} for name, x in leaves.items()}
    # Through JSON and back, so that its hash is that of what will be read.
    meta = json.loads(json.dumps(dict(meta)))
    manifest = {"number": number, "meta": meta, "arrays": specs}
    return manifest | {"sha256": _json_hash(manifest)}


def read(path: epath.Path) -> dict[str, Any]:
    """Reads and verifies the manifest of a checkpoint.

    Raises:
      DamagedError: there is none, or it is not what `seal` has made.
    """
    if not path.exists():
        what = ": a link to nothing" if os.path.islink(path) else ""
        raise DamagedError(f"no checkpoint {path.name} in {path.parent}{what}")
    try:
        found = untrusted.read_json(path / orbax_files.MANIFEST, "its JSON")
        whole = isinstance(found, dict) and found.get("sha256") == _json_hash(found)
    except (UserError, RecursionError) as error:
        raise damaged(path, f"its JSON is unreadable: {error}") from error
    if not whole:
        raise damaged(path, "checksum of its JSON does not match")
    if not _is_complete(found):
        raise damaged(path, "its JSON lacks fields")
    if str(found["number"]) != path.name:
        raise damaged(path, f"holds checkpoint {found['number']}")
    return found


def _is_complete(manifest: Mapping[str, Any]) -> bool:
    """Whether it has the fields of a manifest, and those of each array."""
    meta, arrays = manifest.get("meta"), manifest.get("arrays")
    if "number" not in manifest or not isinstance(meta, dict):
        return False
    return isinstance(arrays, dict) and all(
        isinstance(spec, dict) and spec.keys() == {"shape", "dtype", "sha256"}
        for spec in arrays.values()
    )


def damaged(path: epath.Path, reason: str) -> DamagedError:
    """The error of a checkpoint that is there."""
    return DamagedError(f"checkpoint {path} is damaged: {reason}")
