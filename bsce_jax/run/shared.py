"""What the runs of one process have in common: data, its place on devices, programs.

Each is made when the first run asks for it. A compiled program is kept by all that it
depends on, so that runs of one method with several priors have the same ones.
"""

import concurrent.futures
import logging
import threading
from collections.abc import Callable, Hashable
from typing import Any

from ml_collections import ConfigDict

from bsce_jax.compute import graphs, parallel
from bsce_jax.compute.state import PyTree
from bsce_jax.config.hashes import digest, flatten
from bsce_jax.run import ahead, dataset, feed, programs
from bsce_jax.run.identity import identity
from bsce_jax.run.setup import Parts

logger = logging.getLogger("bsce_jax")


class Program:
    """A compiled function. A call waits for a compile of it that is under way."""

    def __init__(self, function: Callable) -> None:
        """Compiles nothing yet."""
        self._function: Any = function
        self._lock = threading.Lock()
        self._compiled: set[Hashable] = set()

    def __call__(self, *arguments: PyTree) -> Any:
        """Calls the function."""
        with self._lock:
            return self._function(*arguments)

    def lower(self, *arguments: PyTree) -> Any:
        """The function, traced for such arguments."""
        return self._function.lower(*arguments)

    def compile(self, shapes: tuple[PyTree, ...]) -> bool:
        """Compiles the function for arguments of such shapes, which it then keeps.

        Returns:
          True: it is there, see `graphs.Update.compile`.
        """
        key = graphs.shapes_of(shapes)
        with self._lock:
            if key not in self._compiled:
                self._function.lower(*shapes).compile()
                self._compiled.add(key)
        return True


class Shared:
    """The data sets, feeds and programs of the runs of this process.

    Use as a context manager: at its end no more is compiled in the background.

    Attributes:
      parts: what a run takes from here.
    """

    def __init__(self, processes: int = 1) -> None:
        """Nothing is there yet; `processes` decode, see `resident.load`."""
        self._processes = processes
        self.parts = Parts(self.load, self._build, self._create)
        self._datasets: dict[str, dataset.Dataset] = {}
        self._feeds: dict[Hashable, tuple[dataset.Split, feed.Feed]] = {}
        self._programs: dict[Hashable, Program] = {}
        self._graphs: dict[Hashable, graphs.Graphs] = {}
        self._lock = threading.Lock()
        self._background = concurrent.futures.ThreadPoolExecutor(1, "compile")

    def __enter__(self) -> "Shared":
        """Itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Does not wait for the compile that is under way."""
        self._background.shutdown(wait=False, cancel_futures=True)

    def load(self, config: ConfigDict) -> dataset.Dataset:
        """The data set of a configuration, read once for all that agree on it.

        Raises:
          UserError: it cannot be read, or the scenario or the memory does not fit it.
        """
        names = ("data.", "scenario.class_order", "scenario.subset")
        fields = {k: v for k, v in flatten(config).items() if k.startswith(names)}
        if config.data.validation_fraction > 0:
            fields["seed"] = config.seed
        key = digest(fields)
        with self._lock:
            if key in self._datasets:
                return dataset.regrouped(config, self._datasets[key])
            return self._datasets.setdefault(key, dataset.load(config, self._processes))

    def _create(
        self,
        config: ConfigDict,
        devices: parallel.Parallel,
        split: dataset.Split,
        shape: tuple[int, int, int],
    ) -> feed.Feed:
        """The feed of a split of `load`, whose images are placed once."""
        with self._lock:
            key = id(split), devices
            if key not in self._feeds:
                self._feeds[key] = split, feed.create(config, devices, split, shape)
            return self._feeds[key][1]

    def _build(
        self, config: ConfigDict, devices: parallel.Parallel, num_classes: int
    ) -> programs.Programs:
        with self._lock:
            kind = config.gpu_graphs
            of_updates = self._graphs.setdefault(
                (kind, devices), graphs.Graphs(kind, devices)
            )
            return programs.build(
                config, devices, num_classes, self._compile_step, of_updates
            )

    def _compile_step(
        self, devices: parallel.Parallel, function: Callable, **settings: Any
    ) -> Program:
        key = devices, identity(function), identity(settings)
        if key not in self._programs:
            made = parallel.compile_step(devices, function, **settings)
            self._programs[key] = Program(made)
        return self._programs[key]

    def compile_ahead(
        self, config: ConfigDict, base: bool
    ) -> concurrent.futures.Future[bool]:
        """Compiles what a run will call in the background, after what is asked already.

        An error is a log line: the run itself will meet it again.

        Args:
          config: of the run.
          base: whether it trains its base step.

        Returns:
          When it has ended: whether all of the run's programs are compiled.
        """
        return self._background.submit(self._compile_all, config, base)

    def _compile_all(self, config: ConfigDict, base: bool) -> bool:
        try:
            devices = parallel.create(config.parallel)
            data = self.load(config)
            feeds = [
                self._create(config, devices, split, data.image_shape)
                for split in (data.train, data.test)
            ]
            made = self._build(config, devices, data.num_classes)
            plan = ahead.Plan(config, data, made, *feeds)
            calls = ahead.calls(plan, base)
            compiled = [program.compile(shapes) for program, shapes in calls]
            return ahead.are_known(plan) and all(compiled)
        except Exception as error:
            logger.warning("nothing is compiled ahead: %s", error)
            return False
