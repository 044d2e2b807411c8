"""A checkpoint with some of its arrays alone."""

import json

import jax
from etils import epath

from bsce_jax.checkpoints import orbax_files, store


def copy(
    directory: epath.PathLike,
    number: int,
    to: epath.PathLike,
    parts: tuple[str, ...],
) -> None:
    """Copies checkpoint `number` into the folder `to`: its meta, and some arrays.

    Args:
      directory: the folder of all checkpoints.
      number: of the checkpoint there, and of the copy.
      to: folder of the copy.
      parts: how the names of the arrays begin, such as "state/network/".

    Raises:
      CheckpointError: it cannot be read, is damaged, or cannot be written.
    """
    store.read_meta(directory, number)  # or the JSON is not to be trusted
    path = epath.Path(directory) / str(number) / orbax_files.MANIFEST
    target = {
        name: jax.ShapeDtypeStruct(spec["shape"], spec["dtype"])
        for name, spec in json.loads(path.read_text())["arrays"].items()
        if name.startswith(parts)
    }
    found = store.restore(directory, number, target, partial=True)
    store.save(to, number, found.arrays, found.meta)
