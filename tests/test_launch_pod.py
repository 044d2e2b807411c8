"""launch/tpu_pod.sh on a pod of two stand-in workers: the story, and mishaps."""

import os
import shlex
import signal

import pytest

from tests import launch_stage
from tests.launch_stage import LAUNCH, NASTY, POD, WHOLE, commands_of


@pytest.fixture
def stage(tmp_path):
    with launch_stage.make(tmp_path) as made:
        yield made


def describe(*what):
    return ["gcloud", "compute", "tpus", *what, "pod", "--zone=us-central2-b"]


def remote(*words):
    """The ssh command that runs words on all workers."""
    return [
        *describe("tpu-vm", "ssh"),
        "--worker=all",
        "--quiet",
        "--command=" + shlex.join(["bash", "bsce_jax_worker.sh", *words]),
    ]


MOUNT = "--data_dir=/mnt/bsce_jax_test"
LOOK = [
    [*describe("queued-resources", "describe"), "--format=value(state.state)"],
    [*describe("tpu-vm", "describe"), "--format=value(state)"],
]
DELETE = [*describe("queued-resources", "delete"), "--force", "--quiet"]


def test_pod_dry_run_is_the_whole_story(stage):
    flags = (
        *WHOLE,
        "--spot",
        "--data_bucket",
        "bucket",
        "--ref",
        "v1",
        "--max_crashes=7",
    )
    out, _ = stage.run(
        "tpu_pod.sh", "all", *flags, "--dry_run", "--", "--config", "c d"
    )
    request = [*describe("queued-resources", "create"), "--node-id=pod"]
    request += ["--accelerator-type=v4-32", "--runtime-version=tpu-ubuntu2204-base"]
    request += ["--spot", "--quiet"]
    program = ["../env/bin/python", "-m", "bsce_jax.main", "--workdir=gs://b/r"]
    program += ["--config.data.data_dir=/mnt/data", "--config", "c d"]
    copy = ["gcloud", "compute", "tpus", "tpu-vm", "scp", "--recurse"]
    copy += [f"{LAUNCH}/tpu_worker.sh", "pod:bsce_jax_worker.sh"]
    install = [
        [*copy, "--zone=us-central2-b", "--worker=all", "--quiet"],
        remote("install", "3.12", "https://host/x", "v1"),
    ]
    start = [
        remote("mount", "bucket", "bucket", "/mnt/data"),
        remote("start", "120", *program),
    ]
    found = commands_of(out)
    (status,) = [words for words in found if words[0] == "timeout"]
    assert status[2:-1] == remote()[:-1] and "bsce_jax_status" in status[-1]
    first = [request, *LOOK, *install, *start, *LOOK, status]
    again = [DELETE, request, *install, *start]
    assert found == [*first, ["sleep", "60"], *again, *start, DELETE]
    comments = " ".join(line for line in out.splitlines() if line.startswith("#"))
    assert "taken away, at most 100 times" in comments and "at most 7 times" in comments


NEW_WORKER = {  # without what a worker has later
    "python3__sh": 'mv "$FAKES/uv" "${0%/*}"',
    "sudo__sh": '[[ "$*" != *"install -y gcsfuse" ]] || mv "$FAKES/gcsfuse" "${0%/*}"',
    "lsb_release__sh": "echo jammy",
    "lsblk__sh": "echo /dev/sdb ext4",
}


@pytest.mark.parametrize("data", ["bucket", "disk"])
@pytest.mark.parametrize("source", ["--repo=https://host/x", "--wheel=x.whl"])
def test_pod_dry_run_shows_what_workers_run(stage, data, source):
    """Its comments are the commands that a new worker records, in their order."""
    flags = [*POD, "--type=v4-8", "--project=p", source, f"--data_{data}=name"]
    flags += [MOUNT, "--workdir=gs://b/r", "--poll_seconds=0"]
    out, _ = stage.run(
        "tpu_pod.sh", "all", *flags, "--dry_run", "--", "--config", "c d"
    )
    shown = [line[4:] for line in out.splitlines() if line.startswith("#   ")]
    shown = [shlex.split(line) for line in shown]
    (first, *_) = [i for i, words in enumerate(shown) if "bsce_jax.main" in words]
    program, shown = shown[first], shown[:first]
    stage.write(**NEW_WORKER)
    for name in ("uv", "gcsfuse"):
        (stage.folder / "bin" / name).rename(stage.fakes / name)
    stage.run("tpu_pod.sh", "create", *flags)
    (stage.fakes / "worker1").rename(stage.fakes / "no_worker")
    stage.run("tpu_pod.sh", "install", *flags)
    stage.run("tpu_pod.sh", "run", *flags, "--", "--config", "c d")
    ran = [words for words in stage.records() if words[0] != "gcloud"]
    text = str(shown).replace("RELEASE", "jammy").replace("/dev/DISK", "/dev/sdb")
    assert str(ran) == text and [program[1:]] == [a for a, _ in stage.programs(1)]
    wanted = "./x.whl[tpu,gcs]" if "whl" in source else ".[tpu,gcs]"
    (install,) = [words for words in ran if words[:3] == ["uv", "pip", "install"]]
    assert install[-3:] == ["--constraint", "constraints.txt", wanted]


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-32", "v2-alpha-tpuv5"),
        ("v6e-64", "v2-alpha-tpuv6e"),
    ],
)
def test_pod_runtime_and_disk(stage, kind, runtime):
    flags = (*POD, "--type", kind, "--data_disk", "d", "--project", "p", "--dry_run")
    out, _ = stage.run("tpu_pod.sh", "create", *flags)
    create = commands_of(out)[0]
    assert f"--runtime-version={runtime}" in create and "--project=p" in create
    disk = "source=projects/p/zones/us-central2-b/disks/d,mode=read-only"
    assert f"--data-disk={disk}" in create and "--spot" not in create


def test_pod_wheel_takes_the_configurations_along(stage):
    flags = (*POD, "--wheel", "x.whl", "--dry_run")
    commands = commands_of(stage.run("tpu_pod.sh", "install", *flags)[0])
    (copy,) = [words for words in commands if "x.whl" in words]
    sources = [(LAUNCH / path).resolve() for path in copy[7:9]]
    assert [path.name for path in sources] == ["configs", "constraints.txt"]
    assert all(path.exists() for path in sources) and copy[9] == "pod:bsce_jax/project/"
    assert commands[-1] == remote("install", "3.12", "x.whl", "")


@pytest.mark.parametrize(
    ("files", "status", "creates", "starts", "deleted"),
    [
        ({}, 0, 1, 1, True),
        ({"request": "WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n"}, 0, 1, 1, True),
        ({"node": "READY\nPREEMPTED\nCREATING\nREADY\n"}, 0, 2, 2, True),
        ({"request": "ACTIVE\nSUSPENDED\nFAILED\nSUSPENDED\nACTIVE\n"}, 0, 4, 2, True),
        ({"request": "ACTIVE\nFAILED\n"}, 1, 4, 1, True),
        ({"request": "FAILED\n"}, 1, 1, 0, True),
        # Somebody has deleted it: the pod with its request, or alone.
        ({"request": "ACTIVE\nNOT_FOUND\nACTIVE\n"}, 0, 2, 2, True),
        ({"node": "READY\nNOT_FOUND\nREADY\n"}, 0, 2, 2, True),
        # Not everything succeeds at once when it is requested anew.
        (
            {"node": "READY\nPREEMPTED\nREADY\n", "create": "0\n1\n1\n0\n"},
            0,
            4,
            2,
            True,
        ),
        ({"node": "READY\nPREEMPTED\nREADY\n", "create": "0\n1\n"}, 1, 4, 1, True),
        ({"node": "READY\nPREEMPTED\nREADY\n", "scp": "0\n1\n0\n"}, 0, 2, 2, True),
        (
            {"node": "READY\nPREEMPTED\nREADY\n", "uv": "0\n0\n1\n0\n1\n0\n"},
            *(0, 2, 2, True),
        ),
        ({"uv": "1\n0\n1\n0\n"}, 0, 1, 1, True),
        ({"uv": "1\n"}, 1, 1, 0, True),
        ({"request": 2 * "ACTIVE\n\n\n" + "ACTIVE\n", "exit": "1\n0\n"}, 0, 1, 2, True),
        ({"request": "ACTIVE\n\n"}, 1, 1, 1, False),
        ({"exit": "2\n"}, 2, 1, 1, True),
        ({"exit": "1\n"}, 1, 1, 4, True),
        ({"exit": "3\n0\n"}, 0, 1, 2, True),
        ({"exit": "3 gone\n0\n"}, 0, 2, 2, True),
        ({"exit": "143\n" * 4 + "0\n"}, 0, 1, 5, True),
        ({"delete": "1\n1\n0\n"}, 0, 1, 1, True),
        ({"delete": "1\n"}, 1, 1, 1, False),
    ],
)
def test_pod_is_watched(stage, files, status, creates, starts, deleted):
    """What the pod says, one line a look, and its two workers decides what is done."""
    stage.write(**files)
    flags = ("--poll_seconds=0", "--patience=3", "--max_restarts=3", "--max_crashes=3")
    _, err = stage.run("tpu_pod.sh", "all", *WHOLE, *flags, "--", *NASTY, status=status)
    records = [words for words in stage.records() if words[0] == "gcloud"]
    count = lambda text: sum(text in " ".join(words) for words in records)  # noqa: E731
    assert count("queued-resources create") == creates, err
    assert count("worker.sh start") == starts, err
    ran = [arguments for arguments, _ in stage.programs(2 * starts)]
    wanted = ["-m", "bsce_jax.main", "--workdir=gs://b/r", *NASTY]
    assert ran == [wanted] * (2 * starts)
    assert not list(stage.fakes.glob("worker*")) == deleted
    assert (
        "BILLED\n" in err and f"delete it with: {shlex.join(DELETE)}" in err
    ) != deleted


@pytest.mark.parametrize("keep", [(), ("--keep",)])
def test_pod_watch_alone_deletes_it_too(stage, keep):
    flags = (*WHOLE, "--poll_seconds=0", *keep, "--", "a")
    stage.run("tpu_pod.sh", "create", *WHOLE)
    _, err = stage.run("tpu_pod.sh", "watch", *flags)  # which installs and starts
    assert len(stage.programs(2)) == 2
    assert (DELETE in stage.records()) == (keep == ())
    assert (f"still there and billed. Delete it with: {shlex.join(DELETE)}" in err) == (
        keep != ()
    )


def test_pod_restarted_worker_is_mounted_again(stage):
    flags = (*WHOLE, "--data_bucket=bucket", MOUNT, "--poll_seconds=0")
    stage.run("tpu_pod.sh", "create", *WHOLE)
    stage.run("tpu_pod.sh", "install", *flags)
    stage.run("tpu_pod.sh", "run", *flags, "--", "--wait_for_ever")
    stage.programs(2)
    for path in stage.fakes.glob("worker*/bsce_jax/run/pid"):
        os.killpg(os.getpgid(int(path.read_text())), signal.SIGKILL)
    (stage.fakes / "record").unlink()
    _, err = stage.run("tpu_pod.sh", "watch", *flags, "--", "a")
    assert "a worker was restarted" in err
    found = [" ".join(words) for words in stage.records()]
    (start,) = [i for i, words in enumerate(found) if "worker.sh start" in words]
    assert sum(words.startswith("gcsfuse") for words in found[:start]) == 2
    assert len(stage.programs(4)) == 4 and "uv" not in found


def test_pod_stop_ends_the_run_and_who_watches_it(stage):
    flags = (*WHOLE, "--poll_seconds=0", "--keep")
    watching = stage.popen("tpu_pod.sh", "all", *flags, "--", "--wait_for_ever")
    stage.programs(2)
    stage.run("tpu_pod.sh", "stop", *POD)
    _, err = stage.end(watching, status=143)
    assert "the run was stopped" in err
    assert stage.told() == [["told"], ["told"]]
    assert "still there and billed" in err
    out, _ = stage.run("tpu_pod.sh", "log", *POD)
    assert out.count("==") == 2


def test_pod_is_left_alone_by_an_interrupt(stage):
    watching = stage.popen("tpu_pod.sh", "all", *WHOLE, "--", "--wait_for_ever")
    stage.programs(2)
    os.killpg(watching.pid, signal.SIGINT)
    _, err = stage.end(watching, status=130)
    assert f"delete it with: {shlex.join(DELETE)}" in err
    assert DELETE not in stage.records() and stage.told() == []
    stage.run("tpu_pod.sh", "stop", *POD)


def test_pod_run_ends_the_run_before_it(stage):
    stage.run("tpu_pod.sh", "create", *WHOLE)
    stage.run("tpu_pod.sh", "install", *WHOLE)
    stage.run("tpu_pod.sh", "run", *WHOLE, "--", "--wait_for_ever")
    stage.programs(2)
    stage.run("tpu_pod.sh", "run", *WHOLE, "--", "--other")
    assert stage.told() == [["told"], ["told"]]
    stage.run("tpu_pod.sh", "watch", *WHOLE, "--poll_seconds=0", "--", "--other")
    assert len(stage.programs(4)) == 4


LSBLK = """echo '/dev/sda1 ext4 /'
echo '/dev/sda15 vfat /boot/efi'
echo '/dev/sdb ext4 '
"""


def test_pod_mounts_a_bucket(stage):
    flags = (*WHOLE, "--data_bucket=bucket", MOUNT, "--poll_seconds=0", "--", "a")
    stage.write(gcsfuse__sh="exit 1")
    stage.run("tpu_pod.sh", "all", *flags, "--max_crashes=0", status=1)
    assert not list(stage.fakes.glob("*.environ"))
    stage.write(gcsfuse__sh="exit 0")
    (stage.fakes / "record").unlink()
    stage.run("tpu_pod.sh", "all", *flags)
    mount = ["gcsfuse", "--implicit-dirs", "-o", "ro", "bucket", MOUNT.split("=")[1]]
    assert stage.records().count(mount) == 2
    (first, *_), _ = stage.programs(2)
    assert first[2:] == ["--workdir=gs://b/r", f"--config.data.{MOUNT[2:]}", "a"]


def test_pod_mounts_the_disk_that_is_not_mounted(stage):
    stage.run("tpu_pod.sh", "create", *WHOLE)
    flags = (*WHOLE, "--data_disk=disk", "--project=p", MOUNT)
    stage.write(lsblk__sh=LSBLK)
    stage.run("tpu_pod.sh", "install", *flags)
    stage.run("tpu_pod.sh", "run", *flags, "--", "a")
    mount = ["sudo", "mount", "-o", "ro,noload", "/dev/sdb", MOUNT.split("=")[1]]
    assert mount in stage.records()
    stage.write(lsblk__sh=LSBLK.replace("sdb ext4 ", "sdb ext4 /other"))
    _, err = stage.run("tpu_pod.sh", "run", *flags, "--", "a", status=1)
    assert "no disk with an ext4 file system" in err
