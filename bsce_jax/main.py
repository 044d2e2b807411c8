"""Runs one experiment: python -m bsce_jax.main --config configs/digits.py."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from bsce_jax.errors import UserError

logger = logging.getLogger("bsce_jax")

# In what JAX raises where a computation over several processes has failed.
_LOST_CONNECTION = re.compile("Gloo|NCCL|UNAVAILABLE|DEADLINE|onnection|ABORTED")


def parse(argv: Sequence[str]) -> Any:
    """Reads --config FILE[:ARGUMENTS], its overrides and the other flags.

    Returns:
      The flags' values as attributes.

    Raises:
      UserError: an unknown flag or field, or a value of a wrong type, in one line.
    """
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_file(
            "config", flag_values=values, sys_argv=list(argv)
        )
        _define_flags(values)
        rest = values(list(argv))[1:]
        if values.config is not None:
            values.config.keys()  # a file that failed to load raises only now
    except (flags.Error, AttributeError, KeyError, OSError, TypeError) as error:
        raise UserError(_one_line(error)) from None
    if values.config is None:
        raise UserError("--config is missing: try --config configs/digits.py")
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: expected --config.field=x")
    return values


def _define_flags(values: flags.FlagValues) -> None:
    def define(kind: str, name: str, default: Any, text: str) -> None:
        getattr(flags, f"DEFINE_{kind}")(name, default, text, flag_values=values)

    define("string", "workdir", "", "Folder of the run; all hosts must see it.")
    # For several processes that no SLURM, Open MPI or Cloud TPU pod has started:
    define("string", "coordinator_address", "", "host:port of process 0.")
    define("integer", "num_processes", 0, "Processes of the run.")
    define("integer", "process_id", -1, "Number of this process, from 0.")
    define("float", "peer_timeout", 60.0, "Seconds until a silent process is lost.")
    define("float", "join_timeout", 100.0, "Seconds to wait for all to start.")


def _one_line(error: Exception) -> str:
    """The line of a library's message that says what is wrong."""
    text = str(error.args[0]) if error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(error, AttributeError | KeyError):
        return "unknown config field " + " ".join(lines)
    if "Error whilst parsing config file" in text:
        return lines[-1].removeprefix("bsce_jax.errors.UserError: ")
    return " ".join(lines)


def log_to_stderr() -> None:
    """Shows the package's log lines, and no other library's."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.setLevel(logging.INFO)
    logger.handlers, logger.propagate = [handler], False


def main(argv: Sequence[str]) -> int:
    """Parses the command line, runs, and returns the exit status."""
    peers = None
    try:
        given = parse(argv)
        from bsce_jax.config.resolve import resolve
        from bsce_jax.hosts import jax_settings, join, workdir

        config = resolve(given.config)
        folder = workdir.workdir_path(config, given.workdir)
        jax_settings.configure_jax(config, folder)  # joining reads XLA's flags
        address = join.Address(
            given.coordinator_address, given.num_processes, given.process_id
        )
        peers = join.join(address, given.peer_timeout, given.join_timeout)
        status = _run(config, folder, peers)
    except BaseException as error:
        return _failed(error, peers)
    if peers is not None:
        peers.close()
    return status


def _run(config: Any, folder: Any, peers: Any) -> int:
    """Prints the plan or runs; returns the exit status."""
    from bsce_jax import experiment
    from bsce_jax.config.hashes import flatten
    from bsce_jax.hosts import workdir
    from bsce_jax.hosts.stop import StopSignal
    from bsce_jax.run import dry_run, loop

    follows = peers is not None and peers.index > 0
    if follows:
        logger.setLevel(logging.WARNING)  # the first process logs for all
    workdir.open_workdir(folder)
    if config.print_plan:
        plan = dry_run.describe(config, folder)
        if not follows:
            print(plan)
        return 0
    lines = [f"  {name} = {value!r}" for name, value in flatten(config).items()]
    logger.info("workdir %s, configuration:\n%s", folder, "\n".join(lines))
    lock = contextlib.nullcontext() if follows else workdir.lock(folder)
    with StopSignal() as stop, lock:
        try:
            experiment.run(config, folder, stop, peers)
        except loop.StopRequested as stopped:
            stop.ignore()  # another process may have been told before this one
            logger.info("%s", stopped)
            return 128 + stopped.number
    return 0


def _failed(error: BaseException, peers: Any) -> int:
    """Shows an error and returns the exit status; ends one of several processes."""
    if isinstance(error, UserError):
        status, line = 2, str(error)
    elif peers is None:
        raise error
    elif isinstance(error, KeyboardInterrupt):
        status, line = 130, "interrupted"
    else:
        logger.error("process %d failed", peers.index, exc_info=error)
        if _LOST_CONNECTION.search(str(error)):
            peers.lost(error)
        status, line = 1, repr(error)
    if peers is not None:
        peers.fail(line, status)  # or the others would wait for it for ever
    print(f"bsce_jax: {line}", file=sys.stderr)
    return status


if __name__ == "__main__":
    log_to_stderr()
    ended = main(sys.argv)
    if ended == 2:
        # Python would wait for threads, such as one whose file server does not answer.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended)
    sys.exit(ended)
