"""The command line: --config FILE[:ARGUMENTS], its overrides and a few flags."""

from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from bsce_jax.config import page
from bsce_jax.errors import UserError

# Kind, name, default and meaning. Those after the first are for several processes that
# no SLURM, Open MPI or Cloud TPU pod has started.
FLAGS: tuple[tuple[str, str, Any, str], ...] = (
    ("string", "workdir", "", "Folder of the run; all hosts must see it."),
    ("string", "coordinator_address", "", "host:port of process 0."),
    ("integer", "num_processes", 0, "Processes of the run."),
    ("integer", "process_id", -1, "Number of this process, from 0."),
    ("float", "peer_timeout", 60.0, "Seconds until a silent process is lost."),
    ("float", "join_timeout", 100.0, "Seconds to wait for all to start."),
)
_HELP = ("-h", "-help", "--help", "-helpfull", "--helpfull")
_USAGE = """\
usage: python -m bsce_jax.main --config FILE[:NAME=VALUE,...] [--FLAG=VALUE ...]
                               [--config.FIELD=VALUE ...]

For example: python -m bsce_jax.main --config configs/digits.py:prior=meta \\
                 --config.phase.incremental.epochs=10 --workdir runs/digits
The arguments NAME=VALUE of a configuration file are explained in it.
"""


class HelpRequested(Exception):
    """The command line asks for help, which is the exception's text."""


def parse(argv: Sequence[str]) -> Any:
    """Reads --config FILE[:ARGUMENTS], its overrides and the other flags.

    Returns:
      The flags' values as attributes.

    Raises:
      HelpRequested: --help, --helpfull or -h is among them.
      UserError: an unknown flag or field, or a value of a wrong type, in one line.
    """
    if any(argument in _HELP for argument in argv[1:]):
        raise HelpRequested(help_text())
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_file(
            "config", flag_values=values, sys_argv=list(argv)
        )
        for kind, name, default, text in FLAGS:
            define = getattr(flags, f"DEFINE_{kind}")
            define(name, default, text, flag_values=values)
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


def _one_line(error: Exception) -> str:
    """The line of a library's message that says what is wrong."""
    text = str(error.args[0]) if error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(error, AttributeError | KeyError):
        return "unknown config field " + " ".join(lines)
    if "Error whilst parsing config file" in text:
        return lines[-1].removeprefix("bsce_jax.errors.UserError: ")
    return " ".join(lines)


def help_text() -> str:
    """Usage, the flags, and every field of the configuration."""
    known = [page.entry(f"--{name}", default, text) for _, name, default, text in FLAGS]
    return "\n".join([_USAGE, "Flags:", *known, "", page.field_list()])
