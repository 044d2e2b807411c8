"""The incremental step that the benchmarks time, made from the package's own parts.

The first of 5 steps of CIFAR-100 B50 as configs/cifar100.py has it: network, losses,
batch size, memory and every field, with random images in the place of CIFAR-100's,
which need not be prepared.
"""

import dataclasses
import functools
import pathlib
import runpy
import time
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from bsce_jax.compute import graphs, parallel
from bsce_jax.compute.state import PyTree, StepContext
from bsce_jax.config import terms
from bsce_jax.config.resolve import resolve
from bsce_jax.run import feed, loop, setup
from bsce_jax.run.context import has_teacher, phase_context
from bsce_jax.run.dataset import Dataset, Split
from bsce_jax.run.phases import StepData, configured, planned
from bsce_jax.run.programs import Programs, build
from bsce_jax.run.progress import Progress, initial

ROOT = pathlib.Path(__file__).resolve().parent.parent
RATE = 1e-3  # learning rate: random labels must not end in NaN
# Is told nothing, and asks for nothing.
UNWATCHED = loop.Watch(lambda *_: None, lambda: False, lambda *_: None, lambda: 0)


class Sizes(NamedTuple):
    """What --reduced and a CPU make smaller.

    Attributes:
      classes: of the experiment; half of them are in the base step.
      images: training images of a class.
      tests: test images of a class.
      pixels: side of an image.
      batch: images of a batch, of B_t too; 0 is the configuration's.
      reduced: the smallest networks and a small memory.
    """

    classes: int = 100
    images: int = 500
    tests: int = 100
    pixels: int = 32
    batch: int = 0
    reduced: bool = False


CPU = Sizes(images=100, tests=20)
REDUCED = Sizes(20, images=24, tests=4, pixels=8, batch=16, reduced=True)


def sizes(reduced: bool, on_cpu: bool | None = None) -> Sizes:
    """Those of a benchmark: the configuration's, but for fewer images on CPU."""
    if on_cpu is None:
        on_cpu = jax.default_backend() == "cpu"
    return REDUCED if reduced else CPU if on_cpu else Sizes()


class Program:
    """A jitted function of the package, compiled ahead at its first call.

    Equal programs, such as those of the softmax and of BalancedS-CE, are compiled once:
    autotuning could choose other kernels for each.

    Attributes:
      compiled: jax.stages.Compiled, once it has been called.
      seconds: of tracing, lowering and compiling.
    """

    _known: ClassVar[dict[Any, tuple[Any, float]]] = {}

    def __init__(self, jitted: Any, kind: str = "default") -> None:
        """Takes a jitted function and a kind of CUDA graphs; compiles nothing yet."""
        self._jitted, self.compiled, self.seconds = jitted, cast(Any, None), 0.0
        self._kind = kind
        self._arguments: tuple[PyTree, ...] = ()

    def __call__(self, *arguments: PyTree) -> Any:
        """Calls it."""
        if self.compiled is None:
            self._arguments = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments
            )
            start = time.perf_counter()
            lowered = self._jitted.lower(*arguments)
            self.seconds = time.perf_counter() - start
            self.compiled, seconds = self._compile(lowered, arguments)
            self.seconds += seconds
        return self.compiled(*arguments)

    def _compile(self, lowered: Any, arguments: PyTree) -> tuple[Any, float]:
        """The compiled program, and the seconds that it took when it was compiled."""
        key = self._kind, lowered.as_text(), jax.tree.structure(arguments)
        if key not in self._known:
            start = time.perf_counter()
            built = lowered.compile(compiler_options=graphs.OPTIONS[self._kind] or None)
            self._known[key] = built, time.perf_counter() - start
        return self._known[key]

    def one_update(self) -> tuple[Any, Any]:
        """The same with one update a call and so no loop: traced, and compiled.

        XLA's analysis counts the body of a loop once or not at all.
        """
        *whole, schedule, streams = self._arguments
        first = lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)  # noqa: E731
        short = jax.tree.map(first, (schedule, streams))
        arguments = (*whole, *short)
        traced = self._jitted.trace(*arguments)
        return traced, self._compile(traced.lower(), arguments)[0]


@dataclasses.dataclass
class Problem:
    """One method and prior at the beginning of the first incremental step.

    Attributes:
      run: configuration, data on the devices and programs, each a `Program`.
      trainings: of each phase of the base step and of this one, all epochs.
      progress: in this step; its state is moved on by whoever trains, and its buffers
        reused; its teacher is another network than the student.
    """

    run: setup.Run
    trainings: list[loop.Training]
    progress: Progress

    @property
    def programs(self) -> Programs:
        """The compiled functions."""
        return self.run.programs

    @property
    def training(self) -> loop.Training:
        """The step's main training."""
        return next(t for t in self.trainings if t.data.step)

    @property
    def data(self) -> StepData:
        """Of the step's main training."""
        return self.training.data

    @functools.cached_property
    def context(self) -> StepContext:
        """Of the step's main training, on the devices."""
        return self.context_of(self.training)

    def context_of(self, training: loop.Training) -> StepContext:
        """The constants of a training, on the devices."""
        run, data, network = self.run, training.data, self.progress.state.network
        context = phase_context(run.config, run.dataset, data, network)
        if has_teacher(data):
            context = context.replace(teacher=self.progress.teacher)
        return parallel.replicate(run.devices, context)

    def train(
        self, first: int, count: int, training: loop.Training | None = None
    ) -> None:
        """Dispatches a call of some updates of a training, the main one by default."""
        if training is None:
            training, context = self.training, self.context
        else:
            context = self.context_of(training)
        which = loop.Loop(self.programs, self.run.train, training)
        state = self.progress.state
        self.progress.state, _ = loop.call(which, state, context, first, count)


def load(name: str, argument: str) -> ConfigDict:
    """What a file of configs/ gives for an argument, not resolved."""
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](argument)


def configuration(method: str, prior: str, dtype: str, sizes: Sizes) -> ConfigDict:
    """configs/cifar100.py for a method and prior, cut to the sizes."""
    config = load("cifar100", f"method={method},prior={prior}")
    config.model.dtype = dtype
    config.gpu_graphs = "default"  # Program compiles with those that it is given
    if sizes.batch:
        config.optim.batch_size = config.meta.batch_size = sizes.batch
        config.evaluation.batch_size = 4 * sizes.batch
    if sizes.reduced:
        shortest = {"resnet32": "resnet8", "podnet32": "podnet14"}
        config.model.name = shortest[config.model.name]
        config.model.width, config.model.conv_chunks = 4, 1
        config.data.padding, config.memory.per_class = 1, 6
    config.scenario.base_classes = sizes.classes // 2
    return resolve(config)


def dataset(config: ConfigDict, sizes: Sizes) -> Dataset:
    """Random images in the classes of the scenario, in equal numbers."""
    rng, base = np.random.default_rng(0), sizes.classes // 2
    new = base // config.scenario.steps
    image_shape = sizes.pixels, sizes.pixels, 3
    edges = [0, *range(base, sizes.classes + 1, new)]

    def split(name: str, count: int) -> Split:
        labels = np.repeat(np.arange(sizes.classes, dtype=np.int32), count)
        images = rng.integers(0, 256, (len(labels), *image_shape), np.uint8)
        return Split(name, np.arange(len(labels)), labels, images)

    return Dataset(
        split("train", sizes.images),
        split("test", sizes.tests),
        image_shape,
        class_names=tuple(map(str, range(sizes.classes))),
        class_order=np.arange(sizes.classes),
        groups=tuple(range(*pair) for pair in zip(edges, edges[1:], strict=False)),
    )


def make(
    method: str,
    prior: str,
    dtype: str,
    sizes: Sizes,
    updates_per_call: int = 0,
    kind: str = "default",
) -> Problem:
    """Builds a problem on one device; compiles nothing but the initial network."""
    config = configuration(method, prior, dtype, sizes)
    config.updates_per_call = updates_per_call
    return place(config, dataset(config, sizes), kind=kind)


def place(
    config: ConfigDict,
    source: Dataset,
    devices: int = 1,
    mode: str = "jit",
    kind: str = "default",
) -> Problem:
    """Builds the problem of a configuration and data set on the first devices.

    Training programs are compiled with the `kind` of CUDA graphs.
    """
    chosen = parallel.create(mode, jax.devices()[:devices])
    programs = build(config, chosen, source.num_classes)
    programs = dataclasses.replace(
        programs,
        updates={name: Program(f, kind) for name, f in programs.updates.items()},
        meta_updates={
            name: Program(f, kind) for name, f in programs.meta_updates.items()
        },
        evaluate=Program(programs.evaluate),
        features=Program(programs.features),
    )
    run = setup.Run(
        config,
        epath.Path("not written"),
        source,
        configured(config),
        programs,
        feed.create(config, chosen, source.train, source.image_shape),
        feed.create(config, chosen, source.test, source.image_shape),
        results={},
        monitor=cast(Any, None),
    )
    trainings = [
        slow(loop.make_training(config, data))
        for data in planned(config, source)
        if data.step < 2
    ]
    progress = initial(run)
    progress.step = 1
    turned = jax.tree.map(np.flip, jax.device_get(progress.teacher))
    progress.teacher = parallel.replicate(chosen, turned)
    return Problem(run, trainings, progress)


def slow(training: loop.Training, epochs: int = 0) -> loop.Training:
    """The training with the benchmark's learning rate, and another length if given."""
    phase = training.data.phase
    epochs = epochs or phase.epochs
    phase = dataclasses.replace(phase, epochs=epochs, rates=(RATE,) * epochs)
    data = dataclasses.replace(training.data, phase=phase)
    return dataclasses.replace(training, data=data)


def compile_all(problem: Problem) -> None:
    """Calls every training program of a run once, and leaves the state as it was."""
    state = problem.progress.state
    for training in problem.trainings:
        first = [0]
        if training.alpha_every and problem.programs.updates_per_call == 1:
            first.append(1)  # the program without an update of alpha
        for update in first:
            problem.progress.state = jax.tree.map(jnp.copy, state)
            problem.train(update, 1, training)
    problem.progress.state = state


def images_of(training: loop.Training, first: int, count: int) -> int:
    """Images in updates first to first + count: the last of an epoch has fewer."""
    within = np.arange(first, first + count) % training.updates_per_epoch
    left = len(training.data.train) - within * training.batch_size
    return int(np.minimum(left, training.batch_size).sum())


def programs_of(programs: Programs) -> dict[str, Program]:
    """The programs compiled so far, by name."""
    found = {f"{name}_update": f for name, f in programs.updates.items()}
    found |= {f"{name}_meta_update": f for name, f in programs.meta_updates.items()}
    found |= {"evaluate": programs.evaluate, "features": programs.features}
    return {
        name: program
        for name, program in cast(dict[str, Program], found).items()
        if program.compiled is not None
    }


Contestant = Callable[[], tuple[float, float]]
"""Runs a round: seconds, and how much was done (images, classes)."""


def rival_spec(p: Problem, steps: int) -> dict[str, Any]:
    """All that PyTorch needs to know, in JSON's types; `steps` make a round."""
    config, model, data = p.run.config, p.programs.model, p.data
    seen, weights = data.num_seen, p.context.weights
    used = terms.of_phase(config.terms, config.phase[data.phase.name].terms)
    return {
        "blocks": list(model.blocks),
        "widths": list(model.widths),
        "relu": [
            [model._ends_with_relu(stage, block) for block in range(count)]
            for stage, count in enumerate(model.blocks)
        ],
        "shortcut": model.shortcut,
        "head": model.head,
        "proxies": model.proxies,
        "dtype": config.model.dtype,
        "old": data.num_old,
        "seen": seen,
        "terms": {
            name: {**term.to_dict(), "weight": float(weights[name])}
            for name, term in used.items()
        },
        "log_prior": np.asarray(p.context.log_prior)[:seen].tolist(),
        "freeze_old_rows": data.phase.rows == "new",
        "weight_decay": config.optim.weight_decay,
        "clip": config.optim.clip,
        "rate": RATE,
        "batch": config.optim.batch_size,
        "evaluation_batch": config.evaluation.batch_size,
        "padding": config.data.padding,
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "pixels": p.run.dataset.train.images.shape[1],
        "images": len(data.train),
        "per_class": int(p.run.dataset.images_per_class.max()),
        "tests": int(np.sum(p.run.dataset.test_labels < seen)),
        "exemplars": config.memory.per_class,
        "steps": steps,
        "cpu": jax.default_backend() == "cpu",
    }
