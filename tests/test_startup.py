"""What a run does before it trains: XLA's flags, a workdir that cannot be written."""

import errno
import fcntl
import logging
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
import pytest
from etils import epath

from bsce_jax.config.fields import default_config
from bsce_jax.errors import UserError
from bsce_jax.hosts import jax_settings
from bsce_jax.hosts.stop import StopSignal
from bsce_jax.hosts.workdir import in_use, lock, open_workdir
from tests import runs

PATCHED = """
import os, sys
from bsce_jax import main, terminal
from bsce_jax.hosts import jax_settings, workdir
{patch}
terminal.log_to_stderr()
sys.exit(main.main(sys.argv))
"""


def patched(patch: str, config, workdir, *overrides) -> subprocess.CompletedProcess:
    """A run to its end, after lines of Python."""
    _, _, _, *arguments = runs.command(config, workdir, *overrides)
    return subprocess.run(
        [sys.executable, "-c", PATCHED.format(patch=patch), *arguments],
        cwd=runs.ROOT,
        env=runs.environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("startup")
    return runs.config_file(folder, classes=4, base=2, steps=2)


@pytest.fixture
def folder() -> Iterator[pathlib.Path]:
    """Outside tmp_path, whose parents nobody but its owner may enter."""
    with tempfile.TemporaryDirectory() as name:
        pathlib.Path(name).chmod(0o755)
        yield pathlib.Path(name)


def test_a_deterministic_run_sets_its_flags_before_xla_reads_them(config, tmp_path):
    """An unknown flag ends a process where XLA reads it, and only there."""
    patch = "jax_settings.DETERMINISTIC_FLAGS = ('--xla_no_such_flag=1',)"
    overrides = ("--config.deterministic=true", "--config.print_plan=true")
    done = patched(patch, config, tmp_path / "run", *overrides)
    assert done.returncode != 0
    assert "Unknown flag in XLA_FLAGS: --xla_no_such_flag=1" in done.stderr


def test_flags_that_come_too_late_are_an_error(tmp_path):
    jax.devices()
    config = default_config()
    config.deterministic = True
    with pytest.raises(RuntimeError, match="XLA's flags are set too late"):
        jax_settings.configure_jax(config, epath.Path(tmp_path))


@pytest.fixture
def settings(monkeypatch) -> dict[str, object]:
    """What JAX is told, and not told here."""
    told: dict[str, object] = {}
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    return told


FOLDER = "jax_compilation_cache_dir"


def test_compiled_programs_are_the_users_own(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    jax_settings.keep_compiled(default_config(), alone=True)
    own = tmp_path / "caches" / "bsce_jax"
    assert settings[FOLDER] == str(own) and own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o777)
    jax_settings.keep_compiled(default_config(), alone=True)
    assert own.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")  # means nothing, says its standard
    monkeypatch.setenv("HOME", str(tmp_path))
    jax_settings.keep_compiled(default_config(), alone=True)
    assert settings[FOLDER] == str(tmp_path / ".cache" / "bsce_jax")


def test_the_choice_of_kernels_stays_with_a_deterministic_run(
    settings, tmp_path, monkeypatch
):
    """And not in the cache, whose folder XLA would be told instead."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config, caches = default_config(), "jax_persistent_cache_enable_xla_caches"
    jax_settings.keep_compiled(config, alone=True)
    assert caches not in settings
    config.deterministic = True
    jax_settings.keep_compiled(config, alone=True)
    assert settings[caches] == ""


def test_a_folder_that_is_named_stays_and_several_processes_need_one(
    settings, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax_settings.keep_compiled(default_config(), alone=False)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/compiled")
    jax_settings.keep_compiled(default_config(), alone=True)
    assert FOLDER not in settings and not list(tmp_path.iterdir())


def test_a_cache_of_somebody_else_is_not_used(settings, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("bsce_jax"), "propagate", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    jax_settings.keep_compiled(default_config(), alone=True)
    assert "bsce_jax belongs to another user" in caplog.text
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    jax_settings.keep_compiled(default_config(), alone=True)
    assert caplog.text.count("compiled programs are not kept") == 2
    assert FOLDER not in settings


@pytest.mark.slow
def test_a_run_keeps_its_programs_outside_of_its_workdir(config, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("XLA_FLAGS")  # or nothing is long to compile
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    runs.run(config, tmp_path / "run", "--config.compile_cache=true", small=False)
    assert list((tmp_path / "caches" / "bsce_jax").glob("*update*"))
    assert not list((tmp_path / "run").rglob("*update*-cache"))


# Root may write anywhere, and nobody may not read this installation.
AS_NOBODY = """
def open_as_nobody(path, open_workdir=workdir.open_workdir):
    if os.geteuid() == 0:
        os.seteuid(65534)
    open_workdir(path)
workdir.open_workdir = open_as_nobody
"""


@pytest.mark.parametrize(
    "existing", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_a_read_only_workdir_is_one_line(config, folder, existing):
    workdir = folder / "run"
    if existing:
        runs.here(config, workdir)
    workdir.mkdir(exist_ok=True)
    workdir.chmod(0o555)
    try:
        done = patched(AS_NOBODY, config, workdir)
    finally:
        workdir.chmod(0o755)
    assert done.returncode == 2, done.stderr
    line = f"bsce_jax: --workdir='{workdir}' cannot be written: Permission denied\n"
    assert done.stderr == line
    assert (workdir / "results.json").exists() == existing


def test_a_workdir_that_is_a_file_is_an_error(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(UserError, match="file' cannot be written: File exists$"):
        open_workdir(epath.Path(path))


@pytest.mark.parametrize("free", [0, pytest.param(100, marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line(config, tmp_path, free, capsys):
    """From the start on, and once the first checkpoint is to be written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root and the permission to mount")
    try:
        (disk / "other").write_bytes(bytes(1024 * (200 - free)))
        overrides = ("--config.compile_cache=false",)
        runs.here(config, disk / "run", *overrides, status=2)
        shown = capsys.readouterr().err
        *_, last = shown.splitlines()
        assert last.startswith("bsce_jax: ") and "No space left on device" in last
        assert "Traceback" not in shown
    finally:
        subprocess.run(["umount", str(disk)], check=True)


HANGING = """
import concurrent.futures, runpy, sys, time
from bsce_jax import experiment
from bsce_jax.errors import UserError

def run(*arguments):
    concurrent.futures.ThreadPoolExecutor(1).submit(time.sleep, 600)
    raise UserError("an image has not come within 60 s")

experiment.run = run
runpy.run_module("bsce_jax.main", run_name="__main__")
"""


def test_a_thread_that_hangs_does_not_keep_a_run_that_has_failed(config, tmp_path):
    _, _, _, *arguments = runs.command(config, tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", HANGING, *arguments],
        cwd=runs.ROOT,
        env=runs.environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith("bsce_jax: an image has not come within 60 s\n")


def test_signals_after_a_stop_do_not_change_its_status():
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.number == signal.SIGTERM
            stop.ignore()
        os.kill(os.getpid(), signal.SIGTERM)  # would end the tests
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    with StopSignal():
        pass
    assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]


def test_only_a_second_interrupt_ends_a_run_at_once():
    """A scheduler may tell every process of a job, and a parent its child again."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopSignal() as stop:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
            assert stop.number == signal.SIGTERM
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, before)


HOLDING = """
import sys, time
from etils import epath
from bsce_jax.hosts.workdir import lock
with lock(epath.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(100)
"""


def test_a_workdir_is_locked_until_its_process_ends_however_it_ends(tmp_path):
    assert not in_use(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path)],
        cwd=runs.ROOT,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        assert in_use(tmp_path)
        message = f"in use by another run \\(process {holder.pid} on "
        with (
            pytest.raises(UserError, match=message),
            lock(epath.Path(tmp_path)),
        ):
            pass
        holder.kill()
    assert not in_use(tmp_path)
    for _ in range(2):
        with lock(epath.Path(tmp_path)):
            assert in_use(tmp_path)
    assert not in_use(tmp_path)


def test_object_stores_have_no_lock():
    with lock(epath.Path("gs://bucket/run")):
        assert not in_use("gs://bucket/run")


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, caplog):
    def refuse(*_) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(logging.getLogger("bsce_jax"), "propagate", True)
    with lock(epath.Path(tmp_path)):
        assert "cannot be locked" in caplog.text
    assert not in_use(tmp_path)


def test_a_second_run_in_a_workdir_is_refused_in_one_line(config, tmp_path, capsys):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with lock(epath.Path(workdir)):
        runs.here(config, workdir, status=2)
    assert f"--workdir={str(workdir)!r} is in use" in capsys.readouterr().err
    assert not (workdir / "checkpoints").exists()
