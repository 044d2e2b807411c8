"""Procedures: what a method does besides its loss terms, one file each.

The network, losses, phases and hyper-parameters of a method are in configs/methods/. A
module here is found by its name, `config.method`; all that it may define is optional.

Compiled, pure, the only such hook:

* ``forward(apply, network, batch, context, **options) -> (outputs, network)``: how a
  batch becomes outputs, of the student, of the teacher and in evaluation. ``apply(
  network, images, valid) -> (outputs, network)`` is one pass of the model. The outputs
  are a dict: "logits" [B, C] are trained, "scores" [B, C] (where absent the logits)
  predict; terms find there what they need. What the network that comes back has in
  `batch_stats` and `extra` is kept in training. A phase uses the function that its
  `forward` names; evaluation, features and predictions use ``forward`` itself.

On the host, NumPy arrays in and out, once a step:

* ``initial(sizes, **options) -> Own``: what a method trains beside the model and what
  it keeps, before the base step; see `Sizes`.
* ``begin(step) -> Network``: before an incremental step is trained; `step` has the
  network as the step before left it.
* ``companions(features, labels, num_old, count, **options) -> int32 [N, count]``: for
  a phase with ``beside="companions"`` and every image of an epoch the places of those
  that go with it, -1 = none; of the N images, by place, features float32 [N, D] of the
  teacher and labels int [N], -1 where an image cannot be read. Once an epoch.
* ``exemplars(step, count) -> list``: the exemplars of each new class, `count` int
  indices in order of choice, in the place of `config.memory.selection`.
* a function that a phase's `begin` names, ``(step) -> Network``: as that phase begins,
  with the exemplars of the new classes chosen.
* ``finish(step) -> Network``: after the last phase of every step, the base step
  included, and the choice of its exemplars.
* ``replaced(network) -> (indices, images)``: after a step, int [n] and uint8 [n, H, W,
  channels]: what stands in the place of training images from then on. Images that are
  on the devices only.

And constants:

* ``ABOUT``: what it is in a few words, see `About`.
* ``OPTIONS``: its own settings, name -> default; they are `config.options`.
* ``LIMITS``: name -> (least, most) of those that have any, None = no bound.
* ``HEADS``: names of the heads it can work with.
* ``NEEDS_MEMORY``: whether it is refused without exemplars.
* ``NEEDS_RESIDENT``: whether it is refused with streamed images.
* ``PRIORS``: the priors that have a meaning with it.

Methods do not import one another.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray

from bsce_jax.compute.state import Network
from bsce_jax.errors import field_error
from bsce_jax.models import new_rows

FORWARD = "forward"


class Sizes(NamedTuple):
    """What the arrays of a method may depend on.

    Attributes:
      classes: length of the class axis.
      features: of an image, D.
      image: height, width and channels.
      new: classes of the step that brings most.
      exemplars: of a class, at most.
    """

    classes: int
    features: int
    image: tuple[int, int, int]
    new: int
    exemplars: int


Features = Callable[..., list[tuple[NDArray, NDArray]]]
"""``(groups, view="plain")``: of each group of image indices those that could be
read, int [n], and their features, float32 [n, D], in evaluation mode."""


class Own(NamedTuple):
    """What a method adds to a network: dicts of float32 parameters, and of arrays."""

    params: dict[str, Any]
    extra: dict[str, Any]


class Step(NamedTuple):
    """What a method sees of a step, on the host.

    Attributes:
      number: 0 is the base step.
      num_old, num_seen: classes before the step, and with it.
      network: NumPy arrays.
      new: training images of each new class, int indices.
      exemplars: of each class seen, int indices in order of choice; none of a class
        whose exemplars are not chosen yet.
      features: of groups of images, with this network; see compute.views.VIEWS.
      options: `config.options`.
      rng: for random choices; the same whenever the step is repeated.
      mirrored: whether the training images are mirrored at random.
      images: of int indices [n] the training images, uint8 [n, H, W, channels]; None
        where they are streamed.
      normalization: mean and standard deviation of each channel, of pixels in [0, 1].
    """

    number: int
    num_old: int
    num_seen: int
    network: Network
    new: Sequence[NDArray]
    exemplars: Sequence[NDArray]
    features: Features
    options: Mapping[str, Any]
    rng: np.random.Generator
    mirrored: bool
    images: Callable[[NDArray], NDArray] | None
    normalization: tuple[Sequence[float], Sequence[float]]

    @property
    def head(self) -> dict[str, NDArray]:
        """Parameters of the head; the class axis is the last."""
        return self.network.params["head"]

    def with_head(self, head: Mapping[str, NDArray]) -> Network:
        """The network with another head."""
        return self.network.replace(params={**self.network.params, "head": head})

    def new_features(self) -> list[NDArray]:
        """Features of each new class, [images, D]."""
        return [found for _, found in self.features(self.new)]


def imprinted(step: Step) -> Network:
    """A `begin` of several methods: the new rows of a cosine head are imprinted."""
    rows = new_rows.imprint(step.head, step.new_features(), step.num_old)
    return step.with_head(rows)


def clustered(step: Step) -> Network:
    """A `begin` of several methods: new proxies are centres of k-means (PODNet)."""
    features = step.new_features()
    head = new_rows.k_means(step.head, features, step.num_old, step.rng)
    return step.with_head(head)


class About(NamedTuple):
    """What a method is, a few words each: `ABOUT` of its module.

    Attributes:
      title: as the paper calls it.
      head: the classifier.
      losses: what is minimised, in incremental steps.
      besides: what else is done.
      source: of the method.
    """

    title: str
    head: str
    source: str
    losses: str = ""
    besides: str = ""


def names() -> list[str]:
    """All methods."""
    return sorted(found.name for found in pkgutil.iter_modules(__path__))


def about(name: str) -> About:
    """What a method is; one that does not say so is called as its module.

    Raises:
      UserError: there is no such method.
    """
    return getattr(module(name), "ABOUT", About(name, "any", "your own"))


def module(name: str) -> ModuleType:
    """The module of a method.

    Raises:
      UserError: there is no such method.
    """
    known = names()
    if name not in known:
        raise field_error("method", name, f"one of {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{name}")


def options(name: str) -> dict[str, Any]:
    """The settings of a method and their defaults."""
    return dict(getattr(module(name), "OPTIONS", {}))


def initial(config: ConfigDict, sizes: Sizes) -> Own:
    """What the method adds to a network, before the base step."""
    make = getattr(module(config.method), "initial", None)
    return make(sizes, **config.options) if make else Own({}, {})


def check(config: ConfigDict) -> None:
    """Checks that the method exists and can work as it is configured.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    method, name = module(config.method), config.method
    heads = getattr(method, "HEADS", None)
    if heads is not None and config.model.head not in heads:
        allowed = f"{' or '.join(heads)} for method={name}"
        raise field_error("model.head", config.model.head, allowed)
    priors = getattr(method, "PRIORS", None)
    if priors is not None and config.prior not in priors:
        raise field_error(
            "prior", config.prior, f"{' or '.join(priors)} for method={name}"
        )
    memory = config.memory
    if getattr(method, "NEEDS_MEMORY", False):
        if memory.kind == "none":
            raise field_error(
                "memory.kind", "none", f"growing or fixed for method={name}"
            )
        if memory.kind == "growing" and not memory.per_class:
            raise field_error("memory.per_class", 0, f"at least 1 for method={name}")
    if getattr(method, "NEEDS_RESIDENT", False) and config.data.loading != "resident":
        allowed = f"resident for method={name}"
        raise field_error("data.loading", config.data.loading, allowed)
    for phase, section in config.phase.items():
        for field in ("forward", "begin"):
            given = section[field]
            if given and not callable(getattr(method, given, None)):
                allowed = f"'' or a function of the method {name}"
                raise field_error(f"phase.{phase}.{field}", given, allowed)
        if section.beside == "companions" and not hasattr(method, "companions"):
            allowed = f"'' or memory: the method {name} chooses no companions"
            raise field_error(f"phase.{phase}.beside", "companions", allowed)
