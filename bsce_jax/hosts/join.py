"""Joins the processes of a run on several hosts."""

import contextlib
import importlib.util
import ipaddress
import math
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

import jax

from bsce_jax.errors import UserError, one_line
from bsce_jax.hosts.peers import LOST, Peers


class Address(NamedTuple):
    """How a process finds the others; all fields empty where that is automatic.

    Attributes:
      coordinator: "host:port" of process 0.
      processes: how many there are; 0 = automatic.
      process: number of this one; -1 = automatic.
    """

    coordinator: str = ""
    processes: int = 0
    process: int = -1


def join(
    address: Address, patience: float = 60.0, timeout: float = 100.0
) -> Peers | None:
    """Joins the run's processes, before anything else is done with JAX.

    Without an address they are found where a launcher has started several: SLURM's
    srun, Open MPI, Cloud TPU pods. A process that waits in vain for the others says so
    and ends with status LOST.

    Args:
      address: of the coordinator, given by hand.
      patience: seconds without a sign of life after which a process is lost.
      timeout: seconds within which all must have come.

    Returns:
      A watch over the others, or None for a run of one process.

    Raises:
      UserError: an incomplete address, or no connection.
    """
    given = (bool(address.coordinator), address.processes > 0, address.process >= 0)
    if any(given) and not all(given):
        raise UserError(
            "--coordinator_address, --num_processes and --process_id: expected all "
            f"three or none, got {address.coordinator!r}, {address.processes} and "
            f"{address.process}"
        )
    if all(given) and address.process >= address.processes:
        raise UserError(
            f"--process_id={address.process}: expected less than --num_processes="
            f"{address.processes}"
        )
    with _deadline(address, timeout):
        if not _initialized(address, timeout):
            return None
        try:
            # Starts the devices, which takes all processes, as the watch does.
            return Peers(patience) if jax.process_count() > 1 else None
        except (OSError, RuntimeError) as error:
            reason = one_line(error)
            _give_up(f"{_who(address)} cannot reach the others: {reason}")


def _initialized(address: Address, timeout: float) -> bool:
    """Whether this is one of several processes, all of which have come."""
    if address.coordinator:
        return _initialize(
            timeout,
            coordinator_address=address.coordinator,
            coordinator_bind_address=_own_address(address),
            num_processes=address.processes,
            process_id=address.process,
            # Otherwise SLURM's number of the task would choose one device.
            cluster_detection_method="deactivate",
        )
    if _launched():
        # JAX takes one device a task, unless it is told to take all.
        return _initialize(timeout, local_device_ids=[] if _one_task_a_host() else None)
    return _on_tpu() and _initialize(timeout)


def _own_address(address: Address) -> str | None:
    """Where process 0 listens: at localhost or this host's number, where one was given.

    At all addresses, as JAX does, where a name was given, or the number of another:
    this host may know that name as 127.0.1.1, and a service may stand for it.
    """
    host = address.coordinator.rpartition(":")[0].strip("[]")
    try:
        if host != "localhost":
            ipaddress.ip_address(host)
        for family, kind, protocol, _, place in socket.getaddrinfo(
            host, 0, type=socket.SOCK_STREAM
        ):
            with socket.socket(family, kind, protocol) as trial:
                trial.bind(place)
    except (ValueError, OSError):
        return None
    return address.coordinator


def _initialize(timeout: float, **options: object) -> bool:
    """Waits for all processes; False if there is no pod, but one host.

    Raises:
      UserError: the launcher's variables or the address are wrong.
    """
    seconds = math.ceil(timeout)
    try:
        jax.distributed.initialize(
            # JAX's own time-outs abort with a stack trace: they come after ours.
            initialization_timeout=seconds + 30,
            heartbeat_timeout_seconds=max(100, seconds),
            **options,  # type: ignore[arg-type]
        )
    except (ValueError, RuntimeError) as error:
        reason = one_line(error)
        if not options and "coordinator_address should be defined" in reason:
            return False
        raise UserError(f"cannot join the other processes: {reason}") from None
    return True


@contextlib.contextmanager
def _deadline(address: Address, seconds: float) -> Iterator[None]:
    """Ends the process where the body takes longer, even inside a call of JAX."""
    others = f"the other {address.processes - 1}" if address.processes else "the others"
    reason = (
        f"{_who(address)} has waited {seconds:g} s (--join_timeout) for {others}: "
        "check that every host has started the same command"
        + (f" and reaches {address.coordinator}" if address.coordinator else "")
    )
    timer = threading.Timer(seconds, _give_up, [reason])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _who(address: Address) -> str:
    if address.processes:
        return f"process {address.process} of {address.processes}"
    return "this process"


def _give_up(reason: str) -> NoReturn:
    with contextlib.suppress(OSError):  # a pipe that nobody reads any more
        sys.stderr.write(f"bsce_jax: {reason}\n")
        sys.stderr.flush()
    os._exit(LOST)


def _launched() -> bool:
    """Whether SLURM or Open MPI has started several tasks."""
    slurm = int(os.environ.get("SLURM_NTASKS", 1)) if _in_slurm_step() else 1
    return slurm > 1 or int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1


def _in_slurm_step() -> bool:
    """Whether srun has started this process, and not the batch script itself."""
    return {"SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_LOCALID"} <= set(os.environ)


def _one_task_a_host() -> bool:
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as 1(x4) or 2,1
    each = [re.sub(r"\(x\d+\)", "", part) for part in tasks.split(",")]
    return set(each) == {"1"} or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


def _on_tpu() -> bool:
    """Whether JAX would use a TPU."""
    first, *_ = os.environ.get("JAX_PLATFORMS", "").split(",")  # such as tpu,cpu
    return importlib.util.find_spec("libtpu") is not None and first in ("", "tpu")
