"""The incremental step that the benchmarks time, made from the package's own parts.

The first of 5 steps of CIFAR-100 B50 as configs/cifar100.py has it: network, losses,
batch size, memory and every field, with random images in the place of CIFAR-100's,
which need not be prepared.
"""

import dataclasses
import importlib.util
import pathlib
import time
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from bsce_jax.compute import parallel
from bsce_jax.compute.state import PyTree, StepContext
from bsce_jax.config.resolve import resolve
from bsce_jax.run import feed, loop, setup
from bsce_jax.run.context import make_context
from bsce_jax.run.dataset import Dataset, Split
from bsce_jax.run.phases import StepData, planned_phases
from bsce_jax.run.programs import Programs, build
from bsce_jax.run.progress import Progress, initial

ROOT = pathlib.Path(__file__).resolve().parent.parent
RATE = 1e-3  # learning rate: random labels must not end in NaN


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

    def __init__(self, jitted: Any) -> None:
        """Takes a jitted function; compiles nothing yet."""
        self._jitted, self.compiled, self.seconds = jitted, cast(Any, None), 0.0
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
        key = lowered.as_text(), jax.tree.structure(arguments)
        if key not in self._known:
            start = time.perf_counter()
            built = lowered.compile()
            self._known[key] = built, time.perf_counter() - start
        return self._known[key]

    def one_update(self) -> tuple[Any, Any]:
        """The same with one update a call and so no loop: lowered, and compiled.

        XLA's analysis counts the body of a loop once or not at all.
        """
        *whole, schedule, rows = self._arguments
        first = lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)  # noqa: E731
        short = jax.tree.map(first, (schedule, rows))
        arguments = (*whole, *short)
        lowered = self._jitted.lower(*arguments)
        return lowered, self._compile(lowered, arguments)[0]


@dataclasses.dataclass
class Problem:
    """One method and prior at the beginning of the first incremental step.

    Attributes:
      run: configuration, data on the devices and programs, each a `Program`.
      phases: the base step's main training, this step's and its fine-tuning, if any.
      progress: its state is moved on by whoever trains, and its buffers reused; its
        teacher is another network than the student.
      context: of the step's main training.
      plan: of the step's main training, many epochs.
    """

    run: setup.Run
    phases: list[StepData]
    progress: Progress
    context: StepContext
    plan: loop.Plan

    @property
    def programs(self) -> Programs:
        """The compiled functions."""
        return self.run.programs

    @property
    def data(self) -> StepData:
        """Of the step's main training."""
        return self.phases[1]


def configuration(method: str, prior: str, dtype: str, sizes: Sizes) -> ConfigDict:
    """configs/cifar100.py for a method and prior, cut to the sizes."""
    spec = importlib.util.spec_from_file_location(
        "cifar100", ROOT / "configs" / "cifar100.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(f"method={method},prior={prior}")
    config.model.dtype = dtype
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
    method: str, prior: str, dtype: str, sizes: Sizes, updates_per_call: int = 0
) -> Problem:
    """Builds a problem on one device; compiles nothing but the initial network."""
    config = configuration(method, prior, dtype, sizes)
    config.updates_per_call = updates_per_call
    return place(config, dataset(config, sizes))


def place(
    config: ConfigDict, source: Dataset, devices: int = 1, mode: str = "jit"
) -> Problem:
    """Builds the problem of a configuration and data set on the first devices."""
    chosen = parallel.create(mode, jax.devices()[:devices])
    programs = build(config, chosen, source.num_classes)
    jitted = ("base_update", "incremental_update", "meta_update", "finetune_update")
    found = {
        name: getattr(programs, name) for name in (*jitted, "evaluate", "features")
    }
    wrapped = {name: value and Program(value) for name, value in found.items()}
    run = setup.Run(
        config,
        epath.Path("not written"),
        source,
        dataclasses.replace(programs, **wrapped),
        feed.create(config, chosen, source.train, source.image_shape),
        feed.create(config, chosen, source.test, source.image_shape),
        results={},
        monitor=cast(Any, None),
    )
    phases = [p for p in planned_phases(config, source) if p.step < 2]
    progress = initial(run)
    turned = jax.tree.map(np.flip, jax.device_get(progress.teacher))
    progress.teacher = parallel.replicate(chosen, turned)
    return Problem(
        run,
        phases,
        progress,
        make_context(run, progress, phases[1]),
        slow(loop.make_plan(config, phases[1])),
    )


def slow(plan: loop.Plan) -> loop.Plan:
    """The plan with the benchmark's learning rate."""
    return dataclasses.replace(plan, learning_rates=(RATE,) * plan.epochs)


def compile_all(problem: Problem) -> None:
    """Calls every program of a run once, on a copy of the state."""
    run = problem.run
    for phase in problem.phases:
        plan = slow(loop.make_plan(run.config, phase))
        first = [0]
        if plan.alpha_every and run.programs.updates_per_call == 1:
            first.append(1)  # the program without an update of alpha
        for update in first:
            loop.call(
                run.programs,
                jax.tree.map(jnp.copy, problem.progress.state),
                make_context(run, problem.progress, phase),
                run.train,
                plan,
                update,
                1,
            )


def images_of(plan: loop.Plan, first: int, count: int) -> int:
    """Images in updates first to first + count: the last of an epoch has fewer."""
    within = np.arange(first, first + count) % plan.updates_per_epoch
    left = len(plan.train) - within * plan.batch_size
    return int(np.minimum(left, plan.batch_size).sum())


def programs_of(programs: Programs) -> dict[str, Program]:
    """The programs compiled so far, by name."""
    found = {f.name: getattr(programs, f.name) for f in dataclasses.fields(programs)}
    return {
        name: program
        for name, program in found.items()
        if isinstance(program, Program) and program.compiled is not None
    }


Contestant = Callable[[], tuple[float, float]]
"""Runs a round: seconds, and how much was done (images, classes)."""


def rival_spec(p: Problem, steps: int) -> dict[str, Any]:
    """All that PyTorch needs to know, in JSON's types; `steps` make a round."""
    config, model, data = p.run.config, p.programs.model, p.data
    seen, weights = data.num_seen, p.context.weights
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
            for name, term in config.terms.items()
        },
        "log_prior": np.asarray(p.context.log_prior)[:seen].tolist(),
        "freeze_old_rows": config.optim.freeze_old_rows,
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
