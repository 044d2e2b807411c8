"""How a process ends whose run has failed: one line, an exit status, no silence."""

import logging
import re
import sys

from bsce_jax.errors import UserError
from bsce_jax.hosts.peers import Peers

logger = logging.getLogger("bsce_jax")

# In what JAX raises where a computation over several processes has failed.
_LOST_CONNECTION = re.compile("Gloo|NCCL|UNAVAILABLE|DEADLINE|onnection|ABORTED")


def failed(error: BaseException, peers: Peers | None) -> int:
    """Shows an error and returns the exit status; ends one of several processes.

    Args:
      error: that ended the run; raised again where it is a fault of the program and
        there is one process.
      peers: the watch of one of several processes.
    """
    if isinstance(error, UserError):
        status, line = 2, str(error)
    elif peers is None:
        raise error
    elif isinstance(error, KeyboardInterrupt):
        status, line = 130, "interrupted"
    else:
        logger.error("process %d failed", peers.index, exc_info=error)
        if isinstance(error, Exception) and _LOST_CONNECTION.search(str(error)):
            peers.lost(error)
        status, line = 1, repr(error)
    if peers is not None:
        peers.fail(line, status)  # or the others would wait for it for ever
    print(f"bsce_jax: {line}", file=sys.stderr)
    return status
