"""Runs one experiment: python -m bsce_jax.main --config configs/digits.py."""

import contextlib
import logging
import sys
from collections.abc import Sequence
from typing import Any

from bsce_jax import terminal

if __name__ == "__main__":
    terminal.start()  # before what takes seconds

from bsce_jax.config import flags, hashes, resolve

logger = logging.getLogger("bsce_jax")


def main(argv: Sequence[str]) -> int:
    """Parses the command line, runs, and returns the exit status."""
    from bsce_jax.hosts import ending, jax_settings, join, workdir  # JAX takes a second

    peers = None
    try:
        given = flags.parse(argv)
        config = resolve.resolve(given.config)
        folder = workdir.workdir_path(config, given.workdir)
        jax_settings.configure_jax(config, folder)  # joining reads XLA's flags
        address = join.Address(
            given.coordinator_address, given.num_processes, given.process_id
        )
        peers = join.join(address, given.peer_timeout, given.join_timeout)
        jax_settings.keep_compiled(config, alone=peers is None)
        jax_settings.require_devices()
        status = _run(config, folder, peers, given.show_config)
    except flags.HelpRequested as asked:
        print(asked)
        return 0
    except BaseException as error:
        return ending.failed(error, peers)
    if peers is not None:
        peers.close()
    return status


def _run(config: Any, folder: Any, peers: Any, show_config: bool) -> int:
    """Prints the plan or runs; returns the exit status."""
    from bsce_jax import experiment
    from bsce_jax.hosts import stop, workdir
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
    logger.info("workdir %s", folder)
    what = "all of it" if show_config else "what is not the default"
    logger.info("configuration, %s (whole: --show_config, results.json):", what)
    for line in hashes.listing(config, everything=show_config):
        logger.info("  %s", line)
    lock = contextlib.nullcontext() if follows else workdir.lock(folder)
    with stop.StopSignal(waits=False) as signal, lock:
        try:
            experiment.run(config, folder, signal, peers)
        except loop.StopRequested as stopped:
            signal.ignore()  # another process may have been told before this one
            logger.info("%s", stopped)
            return 128 + stopped.number
    return 0


if __name__ == "__main__":
    terminal.log_to_stderr()
    terminal.run(lambda: main(sys.argv))
