"""Commands and their terminal: signals at any moment, closed and full streams."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests import runs

MODULES = ("main", "predict", "report", "reproduce", "data.prepare")
DIGITS = f"--config={runs.ROOT / 'configs' / 'digits.py'}"


def start(*words, stdout=subprocess.PIPE, **variables):
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=runs.ROOT,
        env={**runs.environment(), **variables},
        stdout=stdout,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def test_the_package_is_light_until_it_is_used():
    """Before JAX is loaded Ctrl-C has its handler."""
    code = (
        "import sys; from bsce_jax import terminal; assert 'jax' not in sys.modules; "
        "import bsce_jax; assert 'numpy' not in sys.modules; "
        "bsce_jax.metrics; bsce_jax.load; assert 'jax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, check=True)


def seconds_to_begin() -> float:
    """Within which Python has started here and the handlers are there."""
    began = time.monotonic()
    code = "from bsce_jax import terminal; terminal.start()"
    subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, check=True)
    return 2 * (time.monotonic() - began)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("seconds", [0.1, 0.4, 0.8, 1.3, 2.0])
def test_ctrl_c_before_there_is_anything_to_save(module, seconds, tmp_path):
    """While it imports, or finds out that it has been asked for nothing."""
    seconds += seconds_to_begin()
    words = {
        "main": [DIGITS, f"--workdir={tmp_path}", "--config.data.data_dir=/nothing"],
        "predict": [str(tmp_path), "x.png"],
        "report": [str(tmp_path)],
        "reproduce": ["--table", "1", "--dry_run"],
        "data.prepare": ["digits", "--data_dir", str(tmp_path)],
    }[module]
    process = start(f"bsce_jax.{module}", *words)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    if process.returncode == signal.SIGINT + 128:
        assert "interrupted" in errors.strip().splitlines()[-1]
    else:  # it had ended before, or Python itself had not begun
        assert process.returncode in (0, 2, -signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 7.0])
def test_ctrl_c_in_the_first_seconds_of_a_run(seconds, tmp_path):
    seconds += seconds_to_begin()
    process = start("bsce_jax.main", DIGITS, f"--workdir={tmp_path}")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    assert last == "bsce_jax: interrupted" or "; saved" in last


@pytest.mark.slow
def test_output_that_nobody_reads_ends_quietly(tmp_path):
    words = [DIGITS, f"--workdir={tmp_path}", "--config.print_plan"]
    read, write = os.pipe()
    process = start("bsce_jax.main", *words, stdout=write)
    os.close(write)
    os.close(read)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in errors
    assert "Broken" not in errors


@pytest.mark.slow
def test_output_that_cannot_be_written_is_one_line(tmp_path):
    words = [DIGITS, f"--workdir={tmp_path}", "--config.print_plan"]
    with open("/dev/full", "w") as full:
        process = start("bsce_jax.main", *words, stdout=full)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert (
        errors.strip()
        .splitlines()[-1]
        .startswith("bsce_jax: output cannot be written: No space left")
    )


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["2>&-", "<&- 2>&-", ">&- 2>&-"])
def test_closed_streams_do_not_keep_a_command_from_its_work(closed, tmp_path):
    command = f'"$0" -m bsce_jax.main "$1" --workdir "$2" --config.print_plan {closed}'
    words = ["sh", "-c", command, sys.executable, DIGITS, str(tmp_path)]
    done = subprocess.run(
        words, cwd=runs.ROOT, env=runs.environment(), capture_output=True, timeout=120
    )
    assert done.returncode == 0
    assert (b"updates of 32 images" in done.stdout) == (">&- 2" not in closed)


def test_what_a_terminal_cannot_show_is_escaped_and_closed_streams_are_opened():
    code = (
        "from bsce_jax import terminal; import sys, os; terminal.start(); "
        "print('caf\\u00e9 \\u540d'); print(os.fstat(2) is not None)"
    )
    for closed in ("", "2>&-"):
        done = subprocess.run(
            ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code],
            cwd=runs.ROOT,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            encoding="ascii",
        )
        assert done.stdout == "caf\\xe9 \\u540d\nTrue\n" and not done.returncode


@pytest.mark.slow
def test_a_platform_that_is_not_there_is_named(tmp_path):
    words = ["bsce_jax.main", DIGITS, f"--workdir={tmp_path / 'run'}"]
    process = start(*words, JAX_PLATFORMS="cuda")
    _, errors = process.communicate(timeout=120)
    (line,) = errors.strip().splitlines()
    assert line.startswith("bsce_jax: JAX_PLATFORMS='cuda': expected a platform")
    assert process.returncode == 2 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_notebook_s_backend_of_pictures_does_no_harm(tmp_path):
    words = ["bsce_jax.report", str(runs.ROOT / "results")]
    process = start(*words, MPLBACKEND="module://matplotlib_inline.nothing")
    _, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors and "MPLBACKEND" not in errors
