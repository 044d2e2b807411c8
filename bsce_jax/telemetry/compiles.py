"""Counts the programs that XLA compiles, by name."""

import re
import threading
import weakref
from collections import Counter

import jax

# JAX records this event for each executable it makes for a jitted function, after
# tracing and lowering: also when the persistent compilation cache supplies it, but not
# when the function's own cache does, nor for a jitted function inside another one.
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounts(Counter[str]):
    """Number of compiles by function name; a live one keeps counting."""


def compile_counter() -> CompileCounts:
    """Counts from now on the programs made in this process, by function name.

    A program read from the persistent compilation cache counts: it was traced again.
    Eager operations count under their own names, and all functions under `jax.pmap`,
    which JAX does not tell apart, as "_fun".

    Returns:
      name -> count, live, for as long as it is referenced.
    """
    counts = CompileCounts()
    target = weakref.ref(counts)
    lock = threading.Lock()

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        counts = target()
        if event != COMPILE_EVENT or counts is None:
            return
        name = str(kwargs.get("fun_name", "unknown"))
        wrapped = re.fullmatch(r"\w+\((.*)\)", name)  # "jit(train_step)"
        with lock:
            counts[wrapped[1] if wrapped else name] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    return counts
