"""Runs one experiment: python -m bsce_jax.main --config configs/digits.py."""

import logging
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from bsce_jax.errors import UserError

logger = logging.getLogger("bsce_jax")


def parse(argv: Sequence[str]) -> tuple[ConfigDict, str]:
    """Reads --config FILE[:ARGUMENTS], its overrides and --workdir.

    Raises:
      UserError: an unknown flag or field, or a value of a wrong type, in one line.
    """
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_file(
            "config", flag_values=values, sys_argv=list(argv)
        )
        flags.DEFINE_string("workdir", "", "Folder of the run.", flag_values=values)
        rest = values(list(argv))[1:]
        config, workdir = values.config, values.workdir
        if config is not None:
            config.keys()  # a file that failed to load raises only now
    except (flags.Error, AttributeError, KeyError, OSError, TypeError) as error:
        raise UserError(_one_line(error)) from None
    if config is None:
        raise UserError("--config is missing: try --config configs/digits.py")
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: expected --config.field=x")
    return config, workdir


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
    try:
        config, workdir = parse(argv)
        from bsce_jax import startup, training
        from bsce_jax.config import flatten, resolve

        config = resolve(config)
        folder = startup.open_workdir(config, workdir)
        startup.configure_jax(config, folder)
        from bsce_jax import dry_run, experiment  # after JAX is configured

        if config.print_plan:
            print(dry_run.describe(config, folder))
            return 0
        lines = [f"  {name} = {value!r}" for name, value in flatten(config).items()]
        logger.info("workdir %s, configuration:\n%s", folder, "\n".join(lines))
        with startup.StopSignal() as stop:
            try:
                experiment.run(config, folder, stop)
            except training.StopRequested as stopped:
                logger.info("%s", stopped)
                return 128 + stop.number
        return 0
    except UserError as error:
        print(f"bsce_jax: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    log_to_stderr()
    sys.exit(main(sys.argv))
