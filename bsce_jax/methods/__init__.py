"""Procedures: what a method does besides its loss terms, one file each.

The network, losses and hyper-parameters of a method are in configs/methods/. A module
here is found by its name, `config.method`, and may define

* ``begin(head, features, first, rng) -> head``: the head's rows of the new classes,
  before an incremental step is trained. `head` holds the head's parameters (float32,
  class axis last), `features` one array [images, D] for each new class, of the
  network as the step before left it, and `first` is the position of the first new
  class. Where it is absent, new rows keep their initial values.
* ``HEADS``: names of the heads that `begin` can work with.

Methods do not import one another.
"""

import importlib
import pkgutil
from types import ModuleType

from ml_collections import ConfigDict

from bsce_jax.errors import field_error


def module(name: str) -> ModuleType:
    """The module of a method.

    Raises:
      UserError: there is no such method.
    """
    known = sorted(found.name for found in pkgutil.iter_modules(__path__))
    if name not in known:
        raise field_error("method", name, f"one of {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{name}")


def check(config: ConfigDict) -> None:
    """Checks that the method exists and can work with the head.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    heads = getattr(module(config.method), "HEADS", None)
    if heads is not None and config.model.head not in heads:
        allowed = f"{' or '.join(heads)} for method={config.method}"
        raise field_error("model.head", config.model.head, allowed)
