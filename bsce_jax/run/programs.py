"""The compiled functions of a run, built from its configuration."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from bsce_jax import methods, models, scenario
from bsce_jax.compute import graphs, inference, optim, parallel, steps, updates
from bsce_jax.compute.state import OWN, Array, Network, PyTree
from bsce_jax.config import priors, terms
from bsce_jax.data import augment
from bsce_jax.models import convolution
from bsce_jax.run.phases import configured
from bsce_jax.run.quotas import exemplars_per_class


@dataclasses.dataclass(frozen=True)
class Programs:
    """Compiled functions; each compiles once, at its first call.

    Attributes:
      devices: where they run.
      model: the network.
      updates: phase name -> see updates.make_train_update.
      meta_updates: phase name -> see updates.make_meta_update, of those phases in
        which alpha is learned.
      evaluate, features: see inference.make_evaluate and make_features.
      epoch_features: phase name -> see updates.make_epoch_features, of those phases
        whose images have companions.
      optimizer, alpha_optimizer: optax.
      updates_per_call: U of the plans that the updates take.
      of_updates: has compiled the updates; its kind of CUDA graphs.
    """

    devices: parallel.Parallel
    model: nn.Module
    updates: Mapping[str, Callable]
    meta_updates: Mapping[str, Callable]
    evaluate: Callable
    features: Callable
    epoch_features: Mapping[str, Callable]
    optimizer: optax.GradientTransformationExtraArgs
    alpha_optimizer: optax.GradientTransformation
    updates_per_call: int
    of_updates: graphs.Graphs


def build(
    config: ConfigDict,
    devices: parallel.Parallel,
    num_classes: int,
    compile_step: Callable = parallel.compile_step,
    of_updates: graphs.Graphs | None = None,
) -> Programs:
    """Builds everything compiled: by `compile_step`, training programs by `of_updates`.

    Raises:
      UserError: an unknown network, loss or kind of graphs.
    """
    model = build_model(config, devices, num_classes)
    compiled = functools.partial(compile_step, devices)
    of_updates = of_updates or graphs.Graphs(config.gpu_graphs, devices)
    whole: parallel.Kind = "replicated"
    rows: parallel.Kind = "batch"

    def update(function: Callable, name: str) -> Callable:
        inputs, outputs = (whole,) * 5 + (rows,), (whole, whole)
        return of_updates.compiled(
            compiled(function, name=name, inputs=inputs, outputs=outputs, donate=(0,))
        )

    def shown(function: Callable, name: str, constants: int, found: int) -> Callable:
        inputs, outputs = (whole,) * constants + (rows,), (rows,) * found
        return compiled(function, name=name, inputs=inputs, outputs=outputs)

    trained, meta_trained, companions = {}, {}, {}
    for phase in configured(config):
        program = phase_program(config, model, phase.name)
        alpha_stays = updates.make_train_update(dataclasses.replace(program, meta=None))
        trained[phase.name] = update(alpha_stays, f"{phase.name}_update")
        if program.meta is not None:
            alpha_learns = updates.make_meta_update(program)
            meta_trained[phase.name] = update(alpha_learns, f"{phase.name}_meta_update")
        if phase.beside == "companions":
            of_epoch = updates.make_epoch_features(program)
            companions[phase.name] = shown(of_epoch, "epoch_features", 4, 2)
    tested = test_program(config, model)
    return Programs(
        devices=devices,
        model=model,
        updates=trained,
        meta_updates=meta_trained,
        evaluate=shown(inference.make_evaluate(tested), "evaluate", 3, 4),
        features=shown(inference.make_features(tested), "features", 4, 2),
        epoch_features=companions,
        optimizer=tested.optimizer,
        alpha_optimizer=optim.alpha_optimizer(
            config.meta.optimizer, config.meta.learning_rate
        ),
        updates_per_call=updates_per_call(config, devices),
        of_updates=of_updates,
    )


def phase_program(config: ConfigDict, model: nn.Module, name: str) -> steps.Program:
    """The static part of a phase's training.

    Terms that need old classes are not part of a phase of the base step.
    """
    phase = config.phase[name]
    base = phase.steps == "base"
    learns_alpha = priors.learns_alpha_in(config, phase)
    program, o = test_program(config, model), config.optim
    return dataclasses.replace(
        program,
        terms=_terms(terms.of_phase(config.terms, phase.terms), base),
        train_images=train_transform(config, phase.augment),
        forward=forward(config, phase.forward),
        meta=_meta(config) if learns_alpha else None,
        frozen=frozenset(group for group, rate in phase.rate.items() if not rate),
        batch_norm=phase.batch_norm,
        noise=optim.Noise(o.noise, o.noise_epochs, config.short) if o.noise else None,
    )


def test_program(config: ConfigDict, model: nn.Module) -> steps.Program:
    """The static part of evaluation, features and predictions.

    A method with a `forward` has its own outputs there whatever its phases do.
    """
    o = config.optim
    return steps.Program(
        model=model,
        terms=(),
        optimizer=optim.sgd(o.momentum, o.weight_decay, o.clip, o.decayed),
        train_images=train_transform(config, True),
        test_images=test_transform(config),
        forward=forward(config, methods.FORWARD),
    )


def train_transform(config: ConfigDict, augmented: bool) -> Callable:
    """(uint8 images, key, rows) -> normalised images, augmented or as in the test."""
    if not augmented:
        plain = test_transform(config)
        return lambda images, key, rows: plain(images)
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


def build_model(
    config: ConfigDict, devices: parallel.Parallel, num_classes: int
) -> nn.Module:
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
        auxiliary=m.auxiliary,
        kernel_scales=m.kernel_scales,
        dtype=m.dtype,
        conv_chunks=chunks,
    )


def network_shapes(
    config: ConfigDict, model: nn.Module, image_shape: tuple[int, ...]
) -> Network:
    """What `init_network` returns, as jax.ShapeDtypeStruct."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, key, images)
    found = _network(config, model, variables, images)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), found
    )


def init_network(
    config: ConfigDict, model: nn.Module, image_shape: tuple[int, ...]
) -> Network:
    """A fresh network, the head's rows of all classes and the method's own included."""
    images = jnp.zeros((1, *image_shape), jnp.float32)
    # Dozens of random generators that run once: on CPU LLVM's optimiser would take
    # several times as long as everything else here.
    fast = {"xla_backend_optimization_level": 0}
    initialize = jax.jit(
        functools.partial(model.init, train=False),
        compiler_options=fast if jax.default_backend() == "cpu" else None,
    )
    variables = initialize(jax.random.key(config.seed), images)
    return _network(config, model, variables, images)


def _network(
    config: ConfigDict, model: nn.Module, variables: PyTree, images: Array
) -> Network:
    """The model's variables and what the method adds to them."""
    apply = functools.partial(model.apply, train=False)
    _, out = jax.eval_shape(apply, variables, images)
    groups = scenario.class_groups(
        model.num_classes, config.scenario.base_classes, config.scenario.steps
    )
    sizes = methods.Sizes(
        classes=model.num_classes,
        features=out["features"].shape[-1],
        image=images.shape[1:],
        new=max(map(len, groups)),
        exemplars=max(exemplars_per_class(config, g.stop) for g in groups),
    )
    own = methods.initial(config, sizes)
    params = variables["params"] | ({OWN: own.params} if own.params else {})
    return Network(params, variables["batch_stats"], own.extra)


def forward(config: ConfigDict, name: str) -> steps.Forward:
    """A function of the method's module with its options; the network alone for ""."""
    function = getattr(methods.module(config.method), name, None) if name else None
    if function is None:
        return steps.plain
    return functools.partial(function, **config.options)


def updates_per_call(config: ConfigDict, devices: parallel.Parallel) -> int:
    """U: on CPU 1 (a loop around convolutions is slow there), else about 50.

    Streamed images come one batch a call: they are large, and so is an update. With
    the meta prior a larger U is a multiple of meta.every, because a call then starts
    with an update of alpha.
    """
    single = devices.platform == "cpu" or config.data.loading == "streaming"
    count = config.updates_per_call or (1 if single else 50)
    if priors.learns_alpha(config) and count > 1:
        count = -(-count // config.meta.every) * config.meta.every
    return count


def _terms(used: ConfigDict, base: bool) -> tuple[steps.Term, ...]:
    """Configured terms; without those that need old classes in the base step."""
    found = []
    for name, term in sorted(used.items()):
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
