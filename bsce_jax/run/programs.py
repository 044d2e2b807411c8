"""The compiled functions of a run, built from its configuration."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from bsce_jax import models
from bsce_jax.compute import optim, steps, updates
from bsce_jax.compute.parallel import Kind, Parallel, compile_step
from bsce_jax.compute.state import PyTree
from bsce_jax.config import terms
from bsce_jax.data import augment
from bsce_jax.models import convolution


@dataclasses.dataclass(frozen=True)
class Programs:
    """Compiled functions; each compiles once, at its first call.

    Attributes:
      parallel: the devices.
      model: the network.
      base_update, incremental_update, meta_update: see updates.make_train_update and
        make_meta_update; the base program has neither teacher nor old classes.
      finetune_update: as incremental_update, for balanced fine-tuning.
      evaluate, features: see steps.make_evaluate and make_features.
      optimizer, alpha_optimizer: optax.
      updates_per_call: U of the plans that the updates take.
    """

    parallel: Parallel
    model: nn.Module
    base_update: Callable
    incremental_update: Callable
    meta_update: Callable | None
    finetune_update: Callable | None
    evaluate: Callable
    features: Callable
    optimizer: optax.GradientTransformation
    alpha_optimizer: optax.GradientTransformation
    updates_per_call: int


def build(config: ConfigDict, devices: Parallel, num_classes: int) -> Programs:
    """Builds everything compiled.

    Raises:
      UserError: an unknown network or loss.
    """
    model = build_model(config, devices, num_classes)
    main = main_program(config, model)
    base = dataclasses.replace(main, terms=_terms(config, base=True), meta=None)
    tuned = dataclasses.replace(
        main,
        meta=None,
        trainable=("head",) if config.finetune.trainable == "head" else (),
        batch_norm=config.finetune.batch_norm,
    )
    compiled = functools.partial(compile_step, devices)
    whole: Kind = "replicated"
    rows: Kind = "batch"

    def update(function: Callable, name: str, more: tuple = ()) -> Callable:
        return compiled(
            function,
            name=name,
            inputs=(whole,) * 5 + (rows, *more),
            outputs=(whole, whole),
            donate=(0,),
        )

    meta_update = finetune_update = None
    if main.meta is not None:
        meta_update = update(updates.make_meta_update(main), "meta_update", (rows,))
    if config.finetune.epochs:
        finetune_update = update(updates.make_train_update(tuned), "finetune_update")
    return Programs(
        parallel=devices,
        model=model,
        base_update=update(updates.make_train_update(base), "base_update"),
        incremental_update=update(
            updates.make_train_update(main), "incremental_update"
        ),
        meta_update=meta_update,
        finetune_update=finetune_update,
        evaluate=compiled(
            steps.make_evaluate(main),
            name="evaluate",
            inputs=(whole,) * 4 + (rows,),
            outputs=(rows,) * 4,
        ),
        features=compiled(
            steps.make_features(main),
            name="features",
            inputs=(whole,) * 4 + (rows,),
            outputs=(rows, rows),
        ),
        optimizer=main.optimizer,
        alpha_optimizer=optim.alpha_optimizer(
            config.meta.optimizer, config.meta.learning_rate
        ),
        updates_per_call=updates_per_call(config, devices),
    )


def main_program(config: ConfigDict, model: nn.Module) -> steps.Program:
    """The static part of the main training of an incremental step."""
    o = config.optim
    return steps.Program(
        model=model,
        terms=_terms(config, base=False),
        optimizer=optim.sgd(o.momentum, o.weight_decay, o.clip),
        train_images=train_transform(config),
        test_images=test_transform(config),
        meta=_meta(config) if config.prior == "meta" else None,
    )


def train_transform(config: ConfigDict) -> Callable:
    """(uint8 images, key, rows) -> augmented, normalised images."""
    data = config.data
    return functools.partial(
        augment.train_images,
        padding=data.padding,
        flip=data.flip,
        brightness=data.brightness,
        mean=tuple(data.mean),
        std=tuple(data.std),
        dtype=jnp.dtype(config.model.dtype),
    )


def test_transform(config: ConfigDict) -> Callable:
    """uint8 images -> normalised images."""
    return functools.partial(
        augment.test_images,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        dtype=jnp.dtype(config.model.dtype),
    )


def build_model(config: ConfigDict, devices: Parallel, num_classes: int) -> nn.Module:
    """The configured network."""
    m = config.model
    chunks = m.conv_chunks or convolution.default_chunks(
        devices.platform, devices.num_devices
    )
    return models.create(
        m.name,
        num_classes,
        width=m.width or None,
        shortcut=m.shortcut,
        final_relu=m.final_relu,
        stem=m.stem,
        head=m.head,
        proxies=m.proxies,
        dtype=m.dtype,
        conv_chunks=chunks,
    )


def network_shapes(model: nn.Module, image_shape: tuple[int, ...]) -> PyTree:
    """What `init_model` returns, as jax.ShapeDtypeStruct."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(functools.partial(model.init, train=False), key, images)


def init_model(model: nn.Module, image_shape: tuple[int, ...], seed: int) -> PyTree:
    """Fresh {"params", "batch_stats"}, the head's rows of all classes included."""
    images = jnp.zeros((1, *image_shape), jnp.float32)
    # Dozens of random generators that run once: on CPU LLVM's optimiser would take
    # several times as long as everything else here.
    fast = {"xla_backend_optimization_level": 0}
    initialize = jax.jit(
        functools.partial(model.init, train=False),
        compiler_options=fast if jax.default_backend() == "cpu" else None,
    )
    return initialize(jax.random.key(seed), images)


def updates_per_call(config: ConfigDict, devices: Parallel) -> int:
    """U: on CPU 1 (a loop around convolutions is slow there), else about 50.

    Streamed images come one batch a call: they are large, and so is an update. With
    the meta prior a larger U is a multiple of meta.every, because a call then starts
    with an update of alpha.
    """
    single = devices.platform == "cpu" or config.data.loading == "streaming"
    count = config.updates_per_call or (1 if single else 50)
    if config.prior == "meta" and count > 1:
        count = -(-count // config.meta.every) * config.meta.every
    return count


def _terms(config: ConfigDict, base: bool) -> tuple[steps.Term, ...]:
    """The configured terms; without those that need old classes in the base step."""
    found = []
    for name, term in sorted(config.terms.items()):
        if source := terms.in_base_step(name) if base else name:
            function = terms.module(source).term
            found.append(steps.Term(name, function, terms.options(term)))
    return tuple(found)


def _meta(config: ConfigDict) -> steps.Meta:
    meta = config.meta
    return steps.Meta(
        optimizer=optim.alpha_optimizer(meta.optimizer, meta.learning_rate),
        every=meta.every,
        inner_learning_rate=meta.inner_learning_rate,
        minimum=meta.minimum,
        maximum=meta.maximum,
        batch_norm=meta.batch_norm,
        logarithmic=meta.variable == "log_alpha",
    )
