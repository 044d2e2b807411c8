"""What a run looks like in terminals of some width, in a dumb one, in a log file."""

import fcntl
import os
import pathlib
import pty
import struct
import subprocess
import termios

import pyte
import pytest

from tests import runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("terminal")
    return runs.config_file(folder, classes=6, base=4, steps=2, epochs=30)


def in_terminal(command: list[str], columns: int, **variables: str) -> list[str]:
    """Runs a command in a terminal; returns the lines that a person sees at the end."""
    terminal, inner = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 200, columns, 0, 0))
    process = subprocess.Popen(
        command,
        cwd=runs.ROOT,
        env={**runs.environment(), **variables},
        stdin=inner,
        stdout=inner,
        stderr=inner,
        start_new_session=True,
    )
    os.close(inner)
    screen = pyte.Screen(columns, 200)
    stream = pyte.ByteStream(screen)
    while True:
        try:
            found = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not found:
            break
        stream.feed(found)
    os.close(terminal)
    status = process.wait()
    lines = [line.rstrip() for line in screen.display]
    assert status == 0, "\n".join(lines)
    return lines


@pytest.mark.parametrize(
    ("columns", "term"), [(120, "xterm"), (80, "xterm"), (40, "xterm"), (80, "dumb")]
)
def test_a_run_in_a_terminal(config, tmp_path, columns, term):
    """Nothing overwrites a line; the table stands alone; the end says what is next."""
    command = runs.command(config, tmp_path, "--config.prior=balanced")
    lines = in_terminal(command, columns, TERM=term)
    shown = "".join(lines) if columns < 80 else "\n".join(lines)
    table = next(i for i, line in enumerate(lines) if line.startswith("step  classes"))
    assert lines[table + 1].startswith("----  -------")
    rows = [line.split()[:2] for line in lines[table + 2 : table + 5]]
    assert rows == [["0", "4"], ["1", "5"], ["2", "6"]]
    if columns >= 80:
        assert lines[table].split()[-2:] == ["memory", "seconds"]
    steps = [line for line in lines if "step 2/2: 6 classes, top-1" in line]
    assert len(steps) == 1 and len(steps[0]) <= columns
    assert columns == 40 or " old " in steps[0]
    bars = [i for i, line in enumerate(lines) if "%|" in line and " left" in line]
    if term == "dumb":
        assert not bars
    else:
        assert len(bars) == 1 and bars[0] == table - 1
        assert len(lines[bars[0]]) <= columns and "0:00 left" in lines[bars[0]]
    for name in ("results.json", "curves.png", "confusion.png"):
        assert f"{tmp_path}/{name}".replace("\n", "") in shown.replace("\n", "")
    assert shown.count("next:") == 1
    assert f"python -m bsce_jax.predict {tmp_path}" in shown.replace("\n", "")


def test_a_run_in_a_log_file(config, tmp_path):
    """No bar and no carriage return; a line a step and one at the end."""
    command = runs.command(config, tmp_path, "--config.prior=balanced")
    done = subprocess.run(
        command, cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr + done.stdout and "%|" not in done.stderr
    assert sum(": 5 classes, top-1" in line for line in done.stderr.splitlines()) == 1
    updates = [line for line in done.stderr.splitlines() if " updates, " in line]
    assert len(updates) == 1  # the last: the run took less than a minute
    assert all(len(line) < 100 for line in done.stdout.splitlines())


def test_all_of_the_configuration_is_shown_when_asked_for(config, tmp_path):
    shown = {}
    for flag in ("", "--show_config"):
        words = [flag] if flag else []
        done = subprocess.run(
            [*runs.command(config, tmp_path / f"run{flag}"), *words],
            cwd=runs.ROOT,
            env=runs.environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        lines = [line.partition("  ")[2].strip() for line in done.stderr.splitlines()]
        shown[flag] = {line for line in lines if " = " in line}
    assert shown[""] < shown["--show_config"]
    assert "memory.per_class = 3" in shown[""] and len(shown[""]) < 40
    assert not any(line.startswith("optim.momentum") for line in shown[""])
    assert "optim.momentum = 0.9" in shown["--show_config"]
