"""Joins the processes of a run on several hosts."""

import importlib.util
import os
import re
from typing import NamedTuple

import jax

from bsce_jax.errors import UserError
from bsce_jax.peers import Peers


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


def join(address: Address, patience: float) -> Peers | None:
    """Joins the run's processes, before anything else is done with JAX.

    Without an address they are found where a launcher has started several: SLURM's
    srun, Open MPI, Cloud TPU pods.

    Args:
      address: of the coordinator, given by hand.
      patience: seconds without a sign of life after which a process is lost.

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
    if all(given):
        _initialize(
            coordinator_address=address.coordinator,
            num_processes=address.processes,
            process_id=address.process,
            # Otherwise SLURM's number of the task would choose one device.
            cluster_detection_method="deactivate",
        )
    elif _launched():
        # JAX takes one device a task, unless it is told to take all.
        _initialize(local_device_ids=[] if _one_task_a_host() else None)
    elif _on_tpu():
        try:
            jax.distributed.initialize()
        except ValueError:  # no pod: one host, or none of Google's
            return None
    if jax.process_count() == 1:
        return None
    return Peers(patience)


def _initialize(**options: object) -> None:
    try:
        jax.distributed.initialize(**options)  # type: ignore[arg-type]
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot join the other processes: {reason}") from None


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
    chosen = os.environ.get("JAX_PLATFORMS", "")
    return importlib.util.find_spec("libtpu") is not None and chosen in ("", "tpu")
