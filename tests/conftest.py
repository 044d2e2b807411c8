"""Strict settings for every test: 8 CPU devices, no silent rank promotion."""

import atexit
import os
import pathlib
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping

# What takes longest is compiling: XLA's backend without its optimiser, here and in the
# processes that tests start. It is read when the first device is made.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# What one test has compiled serves all that follow, in all workers and processes.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
    atexit.register(
        shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True
    )
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

# A shell's background commands ignore Ctrl-C, and so would all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Read when gcsfs is imported, by whichever test: or it asks Google about buckets.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

SHARED = os.environ.get("BSCE_JAX_SHARED", "")
SHIPPED = pathlib.Path(__file__).parent / "parity"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of whole runs go first: with two workers they must not be the tail."""
    long = "processes method_runs resume experiment streaming_runs compiles checkpoint"
    order = {f"test_{name}": rank for rank, name in enumerate(long.split())}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """Folder with parity/ and data/, where the machine has one."""
    if not SHARED:
        pytest.skip("BSCE_JAX_SHARED is not set")
    return pathlib.Path(SHARED)


@pytest.fixture
def parity(
    request: pytest.FixtureRequest,
) -> Callable[[str], Mapping[str, np.ndarray]]:
    """Loads inputs and outputs of the original authors' code by file name.

    What is not in tests/parity may be in the folder of `shared`, or its test is
    skipped.
    """

    def load(name: str) -> Mapping[str, np.ndarray]:
        path = SHIPPED / f"{name}.npz"
        if not path.exists():
            path = request.getfixturevalue("shared") / "parity" / path.name
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    return load


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield
