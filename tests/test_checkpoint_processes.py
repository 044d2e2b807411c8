"""Checkpoints under full disks, limits, kills and several processes: all children."""

import logging
import os
import pathlib
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time

import numpy as np
import pytest

from bsce_jax.checkpoints import store

log = logging.getLogger(__name__)

CHILD = """
import os, pathlib, resource, sys
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
from bsce_jax.checkpoints import store, writer as writers

folder, size = sys.argv[1], int(sys.argv[2])
writer = writers.Writer()
background = False

def tree(number):
    return {"w": np.full(size, number, np.float32), "n": np.full(300, number)}

def save(number, **options):
    saving = writer if background else store
    try:
        saving.save(folder, number, tree(number), {"number": number}, **options)
        writer.wait()
        return True
    except store.CheckpointError as error:
        print("ERROR", error)
        return False
"""


def run_child(
    body: str, folder: pathlib.Path, size: int, background: bool = False
) -> tuple[str, str]:
    """Runs CHILD and body; returns what it printed."""
    program = f"{CHILD}\nbackground = {background}\n{textwrap.dedent(body)}"
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(size)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.strip()


def child_tree(number: int, size: int) -> dict[str, np.ndarray]:
    return {"w": np.full(size, number, np.float32), "n": np.full(300, number)}


def check(restored: store.Restored | None, number: int) -> None:
    """It is the whole of this number."""
    assert restored is not None
    assert restored.number == restored.meta["number"] == number
    for leaf in restored.arrays.values():
        assert (leaf == number).all()


def assert_only(folder: pathlib.Path, numbers: list[int], size: int) -> None:
    """The folder holds these checkpoints, intact, and nothing else."""
    assert {path.name for path in folder.iterdir()} == set(map(str, numbers))
    for number in numbers:
        check(store.restore(folder, number, child_tree(0, size)), number)


slow = pytest.mark.slow
where = pytest.mark.parametrize("background", [pytest.param(False, marks=slow), True])


@where
@pytest.mark.parametrize(
    "limit", [0, pytest.param(1000, marks=slow), pytest.param(100_000, marks=slow)]
)
def test_file_size_limit(tmp_path: pathlib.Path, limit: int, background: bool) -> None:
    size = 100_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert hard == resource.RLIM_INFINITY, "this test sets a limit itself"
    out, err = run_child(
        f"""
        assert save(0)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, unlimited[1]))
        assert not save(1)
        assert not save(1)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert save(1)
        """,
        tmp_path,
        size,
        background,
    )
    line = f"ERROR cannot save checkpoint {tmp_path / '1'}: File too large"
    assert out.splitlines() == [line, line]
    assert err == ""
    assert_only(tmp_path, [0, 1], size)


@where
def test_full_disk(tmp_path: pathlib.Path, background: bool) -> None:
    disk, size = tmp_path / "disk", 500_000  # 2 MB a checkpoint on 5 MB
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root and the permission to mount")
    try:
        folder = disk / "checkpoints"
        folder.mkdir()
        out, err = run_child(
            """
            assert save(0) and save(1)
            assert not save(2)
            assert not save(3)
            """,
            folder,
            size,
            background,
        )
        assert out.splitlines() == [
            f"ERROR cannot save checkpoint {folder / n}: No space left on device"
            for n in ("2", "3")
        ]
        assert err == ""
        assert_only(folder, [0, 1], size)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@where
def test_read_only_folder(background: bool) -> None:
    # Outside tmp_path, whose parents nobody but its owner may enter.
    with tempfile.TemporaryDirectory() as name:
        folder, size = pathlib.Path(name) / "checkpoints", 1000
        pathlib.Path(name).chmod(0o755)
        folder.mkdir()
        out, err = run_child(
            """
            assert save(0)
            os.chmod(folder, 0o555)
            if os.geteuid() == 0:
                os.seteuid(65534)  # root may write anywhere
            assert not save(1)
            os.seteuid(os.getuid())
            """,
            folder,
            size,
            background,
        )
        line = f"ERROR cannot save checkpoint {folder / '1'}: Permission denied"
        assert out == line
        assert err == ""
        assert_only(folder, [0], size)
        folder.chmod(0o755)


@slow
def test_killed_while_saving(tmp_path: pathlib.Path) -> None:
    """SIGKILL at random moments leaves whole checkpoints; the next save cleans up."""
    seed = random.randrange(2**32)
    log.warning("seed %d", seed)  # shown when the test fails
    rng = random.Random(seed)
    size, number = 500_000, 0
    body = """
    number = (store.numbers(folder) or [-1])[-1] + 1
    while save(number):
        print(number, flush=True)
        number += 1
    """
    for _ in range(5):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD + textwrap.dedent(body)]
            + [str(tmp_path), str(size)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        done = int(child.stdout.readline())
        time.sleep(rng.uniform(0, 0.3))
        child.send_signal(signal.SIGKILL)
        done = max([done, *map(int, child.stdout.read().split())])
        child.wait()
        child.stdout.close()
        assert done >= number, "each child saves at least once"
        restored = store.latest(tmp_path, child_tree(0, size))
        # The last that was reported, or one that was renamed just before the kill.
        assert restored is not None and restored.number in (done, done + 1)
        check(restored, restored.number)
        number = restored.number + 1
    tree = child_tree(number, size)
    store.save(tmp_path, number, tree, {"number": number})
    assert_only(tmp_path, [number - 1, number], size)


TRAINING = """
import jax, numpy as np
from bsce_jax.checkpoints import store, writer as writers

update = jax.jit(lambda w: w + 1, donate_argnums=0)
w, number = jax.device_put(np.zeros(500_000, np.float32)), 0
with writers.Writer() as writer:
    while True:
        meta = {"number": number}
        writer.save(
            sys.argv[1], number, {"w": w}, meta,
            then=lambda meta: print(meta["number"], flush=True),
        )
        number += 1
        for _ in range(rounds):
            w = update(w)
        w = w * 0 + number
"""


@pytest.mark.parametrize("trials", [1, pytest.param(6, marks=slow)])
def test_killed_while_saving_in_the_background(
    tmp_path: pathlib.Path, trials: int
) -> None:
    """SIGKILL at random moments of a training that saves all the time."""
    seed = random.randrange(2**32)
    log.warning("seed %d", seed)  # shown when the test fails
    rng = random.Random(seed)
    target = {"w": np.zeros(500_000, np.float32)}
    for trial in range(trials):
        folder = tmp_path / str(trial)
        folder.mkdir()
        program = f"import sys\nrounds = {rng.randrange(1, 50)}\n{TRAINING}"
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(folder)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(rng.uniform(0, 0.3))
        child.send_signal(signal.SIGKILL)
        done = max([0, *map(int, child.stdout.read().split())])
        child.wait()
        child.stdout.close()
        restored = store.latest(folder, target)
        assert restored is not None and restored.number in (done, done + 1)
        check(restored, restored.number)


@pytest.mark.parametrize("managed", [True, pytest.param(False, marks=slow)])
def test_exit_during_a_background_save(tmp_path: pathlib.Path, managed: bool) -> None:
    """A managed writer completes its save; else the one before remains."""
    size = 5_000_000
    out, err = run_child(
        f"""
        store.save(folder, 0, tree(0), {{"number": 0}})
        if {managed}:
            with writer:
                writer.save(folder, 1, tree(1), {{"number": 1}})
                sys.exit()
        writer.save(folder, 1, tree(1), {{"number": 1}})
        """,
        tmp_path,
        size,
    )
    assert (out, err) == ("", "")
    restored = store.latest(tmp_path, child_tree(0, size))
    assert restored is not None
    check(restored, restored.number)
    assert restored.number == 1 or not managed


TWO_PROCESSES = """
import pathlib, sys
import jax, numpy as np
port, process, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
from jax.experimental import multihost_utils
from bsce_jax.checkpoints import store, writer as writers

mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

def tree(number):
    rows = np.full(5000, number, np.float32)
    return {"x": jax.make_array_from_process_local_data(everywhere, rows)}

def check(number):
    restored = store.latest(folder, tree(0))
    assert restored.number == restored.meta["number"] == number
    assert (restored.arrays["x"] == number).all()

wait = multihost_utils.sync_global_devices
for number in range(4):
    store.save(folder, number, tree(number), {"number": number})
wait("saved")
check(3)
wait("read")
if process == 0:  # damage the newest: both fall back, and go on from there
    files = (folder / "3/arrays").rglob("*")
    max(files, key=lambda path: path.stat().st_size).write_bytes(b"")
wait("damaged")
check(2)
for number in (3, 4):
    store.save(folder, number, tree(number), {"number": number})
wait("saved again")
check(4)

# In the background, while both go on with updates that need each other.
update = jax.jit(lambda x: x + 0 * x.sum(), in_shardings=rows, out_shardings=rows)
x = jax.make_array_from_process_local_data(rows, np.ones(2000, np.float32))
during = []
with writers.Writer() as writer:
    for number in range(5, 10):
        writer.save(
            folder, number, tree(number), {"number": number},
            then=lambda meta: during.append(updates),
        )
        for updates in range(40 * number, 40 * number + 40):
            x = update(x)
            x.block_until_ready()
assert np.asarray(x.addressable_data(0)).max() == 1
wait("saved in the background")
check(9)
if process == 0:
    print("ended during updates", during)

# A folder that is not the same one.
try:
    store.latest(folder if process == 0 else folder / "local", tree(0))
except store.CheckpointError as error:
    print(error)
print("done", store.numbers(folder))
"""


@slow
def test_two_processes(tmp_path: pathlib.Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", TWO_PROCESSES, port]
    children = [
        subprocess.Popen(
            [*command, str(process), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        for child in children:
            out, err = child.communicate(timeout=90)
            assert "done [8, 9]" in out, err
            assert "read other checkpoints in" in out and "9, none" in out
    finally:
        for child in children:
            child.kill()
            child.communicate()
