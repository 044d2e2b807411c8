"""How the processes of a run find one another, and what happens where they do not."""

import importlib.util
import os
import subprocess
import sys

import jax
import pytest

from bsce_jax.errors import UserError
from bsce_jax.hosts import join, peers
from tests import runs
from tests.test_processes import free_address


@pytest.fixture
def initialized(monkeypatch):
    """What jax.distributed.initialize would be called with."""
    calls = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda **options: calls.append(options)
    )
    return calls


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (("localhost:1", 0, 0), "expected all three or none, got 'localhost:1', 0 and"),
        (("", 2, -1), "expected all three or none, got '', 2 and -1"),
        (("localhost:1", 2, 2), "--process_id=2: expected less than --num_processes=2"),
    ],
)
def test_an_incomplete_address_is_refused(address, message):
    with pytest.raises(UserError, match=message):
        join.join(join.Address(*address))


@pytest.mark.parametrize(
    ("given", "bound"),
    [
        ("localhost:8476", "localhost:8476"),
        ("127.0.0.1:8476", "127.0.0.1:8476"),
        ("192.0.2.1:8476", None),  # for documentation: of no host
        ("a-service.of-others:8476", None),
    ],
)
def test_the_coordinator_listens_where_it_was_told(initialized, given, bound):
    assert join.join(join.Address(given, 2, 0)) is None  # nobody else came
    (options,) = initialized
    assert options["coordinator_address"] == given
    assert options["coordinator_bind_address"] == bound


def test_one_process_joins_nobody(monkeypatch, initialized):
    monkeypatch.setenv("SLURM_NTASKS", "4")  # in a batch script, outside of srun
    assert join.join(join.Address()) is None
    assert not initialized


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, []),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
    ],
)
def test_launchers_are_found_and_a_lone_task_takes_all_devices(
    monkeypatch, initialized, variables, expected
):
    slurm = {"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_LOCALID": "0"}
    given = variables | (slurm if "SLURM_NTASKS" in variables else {})
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert join.join(join.Address()) is None  # one process after all
    (options,) = initialized
    assert options["local_device_ids"] == expected


@pytest.fixture
def on_tpu(monkeypatch):
    """As on a host with libtpu."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *others: name if name == "libtpu" else found(name, *others),
    )


@pytest.mark.parametrize(
    ("platforms", "joins"),
    [("", True), ("tpu", True), ("tpu,cpu", True), ("cpu", False), ("cuda", False)],
)
def test_a_tpu_pod_is_found(monkeypatch, on_tpu, initialized, platforms, joins):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert join.join(join.Address()) is None  # one process after all
    assert [list(options) for options in initialized] == joins * [
        ["initialization_timeout", "heartbeat_timeout_seconds"]
    ]


def test_a_tpu_without_a_pod_is_one_process(monkeypatch, on_tpu):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    for name in ("TPU_WORKER_HOSTNAMES", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: asked.append(1))
    monkeypatch.setattr(
        jax.distributed,
        "initialize",
        lambda **options: _raise(ValueError("coordinator_address should be defined.")),
    )
    assert join.join(join.Address()) is None
    assert not asked


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_a_pod_that_is_set_up_wrongly_is_one_line(monkeypatch, on_tpu, kind):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    error = kind("unsupported worker-network-endpoints\nformat: x")
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: _raise(error))
    message = "cannot join the other processes: unsupported worker-network-endpoints f"
    with pytest.raises(UserError, match=message):
        join.join(join.Address())


JOIN = """
import sys
from bsce_jax.hosts import join
join.join(join.Address(sys.argv[1], 2, int(sys.argv[2])), timeout=3.0)
"""
DIES = """
import os, sys, jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
os._exit(9)
"""


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_waiting_for_a_process_that_never_comes_ends(index):
    address = free_address()
    done = _join(JOIN, address, index).communicate(timeout=60)
    assert done == (
        "",
        f"bsce_jax: process {index} of 2 has waited 3 s (--join_timeout) for the other "
        "1: check that every host has started the same command and reaches "
        f"{address}\n",
    )


def test_waiting_for_a_process_that_dies_before_it_is_watched_ends():
    address = free_address()
    with _join(JOIN, address, 0) as waiting, _join(DIES, address, 1) as dying:
        _, error = waiting.communicate(timeout=60)
        dying.communicate(timeout=60)
    assert (waiting.returncode, dying.returncode) == (peers.LOST, 9), error
    (line,) = [line for line in error.splitlines() if line.startswith("bsce_jax: ")]
    assert line.startswith("bsce_jax: process 0 of 2 has waited 3 s")


def _join(program: str, address: str, index: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program, address, str(index)],
        cwd=runs.ROOT,
        env={**os.environ, **runs.environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
