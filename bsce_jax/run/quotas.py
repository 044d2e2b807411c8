"""How many images of each class memory keeps, and how many of them are held out."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from bsce_jax import memory
from bsce_jax.config import priors
from bsce_jax.errors import field_error, named_section


def holds_out(config: ConfigDict) -> bool:
    """Whether some of a step's images are kept for alpha, or for a phase."""
    return priors.learns_alpha(config) or any(
        phase.images == "held_out" and phase.epochs for phase in config.phase.values()
    )


def memory_per_class(config: ConfigDict, num_seen: int) -> int:
    """Images of each class that memory keeps once `num_seen` classes are learned."""
    m = config.memory
    return memory.quota(m.kind, m.per_class, m.budget, num_seen)


def held_out_per_class(config: ConfigDict, num_old: int) -> int:
    """Images of each class held out in a step that begins with `num_old` classes.

    Raises:
      UserError: too few exemplars for one of them to be held out.
    """
    size = memory_per_class(config, num_old)
    if not (size and holds_out(config)):
        return 0
    if size == 1:
        field = "per_class" if config.memory.kind == "growing" else "budget"
        raise field_error(
            f"memory.{field}",
            config.memory[field],
            f"2 exemplars or more of each of {num_old} classes, one of them held out",
        )
    with named_section("meta"):
        return memory.held_out_per_class(size, config.meta.fraction)


def exemplars_per_class(config: ConfigDict, num_seen: int) -> int:
    """Exemplars of each class that are chosen for a memory of `num_seen` classes.

    All that it keeps but those held out once and for all, which count as exemplars.
    """
    size = memory_per_class(config, num_seen)
    return size - held_out_per_class(config, num_seen) if held_once(config) else size


def held_once(config: ConfigDict) -> bool:
    """Whether images are held out once and for all, and not anew in every step."""
    return config.memory.held_out == "once" and holds_out(config)


def most_held_out(config: ConfigDict, groups: Sequence[range]) -> int:
    """The most images of a class that a step holds out.

    Raises:
      UserError: too few exemplars for one of them to be held out.
    """
    steps = [held_out_per_class(config, group.stop) for group in groups[:-1]]
    return max(steps, default=0)
