"""The command line: --config FILE[:ARGUMENTS], its overrides and a few flags."""

import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from bsce_jax.config import choices, declare, page, terms
from bsce_jax.config.files import (
    ARGUMENT_FIELDS,
    READ_BY,
    ChoicesRequested,
    load,
)
from bsce_jax.config.hashes import flatten
from bsce_jax.errors import UserError, field_error

# Kind, name, default and meaning. Those after the first two are for several
# processes that no SLURM, Open MPI or Cloud TPU pod has started.
FLAGS: tuple[tuple[str, str, Any, str], ...] = (
    ("string", "workdir", "", "Folder of the run; all hosts must see it."),
    ("boolean", "show_config", False, "Show every field at the start of the run."),
    ("string", "coordinator_address", "", "host:port of process 0."),
    ("integer", "num_processes", 0, "Processes of the run."),
    ("integer", "process_id", -1, "Number of this process, from 0."),
    ("float", "peer_timeout", 60.0, "Seconds until a silent process is lost."),
    ("float", "join_timeout", 100.0, "Seconds to wait for all to start."),
)
_HELP = ("-h", "-help", "--help", "-helpfull", "--helpfull")
_PREFIX = "config."
_USAGE = """\
usage: python -m bsce_jax.main --config FILE[:NAME=VALUE,...] [--FLAG=VALUE ...]
                               [--config.FIELD=VALUE ...]

For example: python -m bsce_jax.main --config configs/digits.py:prior=meta \\
                 --config.phase.incremental.epochs=10 --workdir runs/digits

The arguments NAME=VALUE of a configuration file are explained in it; those of configs/
are method, prior, steps, memory, seed, alpha, epsilon and what a file has besides;
method=? (or prior=?, head=? ...) lists what can be given.
Fields are described below and in docs/configuration.md.
"""


class HelpRequested(Exception):
    """The command line asks for help, which is the exception's text."""


def parse(argv: Sequence[str]) -> Any:
    """Reads --config FILE[:ARGUMENTS], its overrides and the other flags.

    Returns:
      The flags' values as attributes.

    Raises:
      HelpRequested: --help, --helpfull or -h is among them, or "?" as an argument.
      UserError: an unknown flag or field, or a value of a wrong type, in one line.
    """
    if any(argument in _HELP for argument in argv[1:]):
        raise HelpRequested(help_text())
    given, others = _config_of(argv[1:])
    if not given:
        raise UserError("--config is missing: try --config configs/digits.py")
    try:
        config = load(given)
    except ChoicesRequested as asked:
        name, allowed = asked.args
        text = choices.describe(name, allowed, ARGUMENT_FIELDS)
        raise HelpRequested(text) from None
    method = config.get("method")
    for argument in others:
        if argument.startswith(f"--{_PREFIX}"):
            _add_term_option(config, argument)
            _check_override(config, argument)
    values = flags.FlagValues()
    try:
        arguments = [argv[0], *others]
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=arguments
        )
        for kind, name, default, text in FLAGS:
            define = getattr(flags, f"DEFINE_{kind}")
            define(name, default, text, flag_values=values)
        rest = values(arguments)[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        text = _one_line(error)
        raise _value_error(config, text) or UserError(text) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: expected --config.field=x")
    _check(values)
    if values.config.get("method") != method:
        raise field_error(
            "method",
            values.config.method,
            f"{method}, whose losses and phases {given} has; another in the file's "
            f"arguments, --config {given.partition(':')[0]}:method=NAME",
        )
    for field, prior in READ_BY.items():
        overridden = any(a.startswith(f"--{_PREFIX}{field}=") for a in others)
        if overridden and values.config.get("prior") != prior:
            allowed = f"prior={prior} with it, which alone reads it"
            raise field_error(field, values.config[field], allowed)
    return values


def _config_of(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The value of --config, the last one given, and all other arguments."""
    value, others, left = "", [], list(arguments)
    while left:
        argument = left.pop(0)
        name, equals, text = argument.partition("=")
        if name not in ("--config", "-config"):
            others.append(argument)
        elif equals:
            value = text
        elif left and not left[0].startswith("--"):
            value = left.pop(0)
        else:
            raise UserError("--config has no value: try --config configs/digits.py")
    return value, others


def _add_term_option(config: ConfigDict, argument: str) -> None:
    """Makes room for an option of a loss term that the file leaves at its default."""
    name = argument.removeprefix("--").partition("=")[0]
    section, _, rest = name.removeprefix(_PREFIX).partition(".")
    term, _, option = rest.partition(".")
    used = config.get(section) if section == "terms" else None
    if not isinstance(used, ConfigDict) or not isinstance(used.get(term), ConfigDict):
        return
    if term not in terms.names():
        return  # which is said when the configuration is checked
    known = {"factor": 1.0, **terms.known_options(term)}
    if option in known and option not in used[term]:
        with config.unlocked():
            used[term][option] = known[option]


def _check_override(config: ConfigDict, argument: str) -> None:
    """Refuses an override of a field that does not exist, or of a whole section.

    Raises:
      UserError: names the section, what it has, and what is nearest.
    """
    name, equals, _ = argument.removeprefix("--").partition("=")
    if "[" in name:
        whole = name.partition("[")[0]
        raise UserError(f"{name}: expected the whole tuple, --{whole}=(..., ...)")
    *parents, last = name.removeprefix(_PREFIX).split(".")
    section: Any = config
    where = "config"
    for part in (*parents, last):
        if not isinstance(section, ConfigDict):
            raise UserError(f"{name} is unknown: {where} is a field, not a section")
        if part not in section:
            # A section of free names, such as that of a method without settings.
            known = ", ".join(section) or "no fields"
            near = _nearest(config, where, part)
            raise UserError(
                f"{name} is an unknown config field: {where} has {known}{near}"
            )
        section, where = section[part], f"{where}.{part}"
    if isinstance(section, ConfigDict):
        known = ", ".join(f"{where}.{field}" for field in section) or "no fields"
        raise UserError(f"{name} is a section: expected one of {known}")
    if not equals and not isinstance(section, bool):
        raise UserError(f"{name} has no value: expected --{name}=VALUE")


def _nearest(config: ConfigDict, where: str, name: str) -> str:
    """A field that may be meant, of the section or of any other; "" where none is."""
    known = [f"config.{field}" for field in flatten(config)]
    known.sort(key=lambda field: not field.startswith("config.phase."))
    here = [field for field in known if field.startswith(f"{where}.")]
    for fields in (here, known):
        last = {field.rpartition(".")[2]: field for field in reversed(fields)}
        initials = {"".join(word[0] for word in n.split("_")): n for n in last}
        close = difflib.get_close_matches(name, last, 1, 0.6)
        meant = close[0] if close else initials.get(name)
        if meant:
            return f"; nearest: {last[meant]}"
    return ""


def _check(values: Any) -> None:
    """Refuses flags that mean nothing.

    Raises:
      UserError: names the flag, its value and what is allowed.
    """
    host, colon, port = values.coordinator_address.rpartition(":")
    good = host and colon and port.isdecimal() and 0 < int(port) < 2**16
    expected = {
        "coordinator_address": (
            good or not values.coordinator_address,
            "host:port, with a port from 1 to 65535",
        ),
        "num_processes": (values.num_processes >= 0, "at least 1, or 0 for not given"),
        "process_id": (values.process_id >= -1, "at least 0, or -1 for not given"),
    }
    for name in ("peer_timeout", "join_timeout"):
        seconds = getattr(values, name)
        fits = math.isfinite(seconds) and 0 < seconds <= 1e6
        expected[name] = (fits, "seconds above 0, up to 1e6")
    for name, (holds, allowed) in expected.items():
        if not holds:
            raise UserError(f"--{name}={getattr(values, name)}: expected {allowed}")


def _value_error(config: ConfigDict, text: str) -> UserError | None:
    """What is expected in the place of a value that the flags' library refuses."""
    match = re.match(r"flag --([\w.]+)=(.*?): ", text)
    if match is None:
        return None
    name, value = match.groups()
    if not name.startswith(_PREFIX):
        kinds = [kind for kind, flag, _, _ in FLAGS if flag == name]
        return UserError(f"--{name}={value}: expected {kinds[0]}") if kinds else None
    default: Any = config
    for part in name.removeprefix(_PREFIX).split("."):
        default = default[part]
    return UserError(f"{name}={value}: expected {declare.kind(default)}")


def _one_line(error: Exception) -> str:
    """What a library's message says, in one line."""
    text = str(error.args[0]) if error.args else str(error)
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def help_text() -> str:
    """Usage, the flags, and every field of the configuration."""
    known = [page.entry(f"--{name}", default, text) for _, name, default, text in FLAGS]
    return "\n".join([_USAGE, "Flags:", *known, "", page.field_list()])
