"""launch/tpu_pod.sh on a pod of two stand-in workers: the story, and mishaps."""

import shlex

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
    delete = [*describe("queued-resources", "delete"), "--force", "--quiet"]
    look = [
        [*describe("queued-resources", "describe"), "--format=value(state.state)"],
        [*describe("tpu-vm", "describe"), "--format=value(state)"],
    ]
    program = ["../env/bin/python", "-m", "bsce_jax.main", "--workdir=gs://b/r"]
    program += ["--config.data.data_dir=/mnt/data", "--config", "c d"]
    copy = ["gcloud", "compute", "tpus", "tpu-vm", "scp", "--recurse"]
    copy += [f"{LAUNCH}/tpu_worker.sh", "pod:bsce_jax_worker.sh"]
    install = [
        [*copy, "--zone=us-central2-b", "--worker=all", "--quiet"],
        remote("mount", "bucket", "bucket", "/mnt/data"),
        remote("install", "3.12", "https://host/x", "v1"),
    ]
    start = remote("start", "120", *program)
    first = [request, *look, *install, start, *look, remote("status")]
    again = [delete, request, *look, *install, start]
    assert commands_of(out) == [*first, ["sleep", "60"], *again, start, delete]
    comments = " ".join(line for line in out.splitlines() if line.startswith("#"))
    assert "taken away, at most 100 times" in comments and "at most 7 times" in comments


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
        ({"request": "ACTIVE\nSUSPENDED\nFAILED\nSUSPENDED\nACTIVE\n"}, 0, 3, 2, True),
        ({"request": "ACTIVE\nFAILED\n"}, 1, 4, 1, False),
        ({"request": "FAILED\n"}, 1, 1, 0, False),
        ({"request": 2 * "ACTIVE\n\n\n" + "ACTIVE\n", "exit": "1\n0\n"}, 0, 1, 2, True),
        ({"request": "ACTIVE\n\n"}, 1, 1, 1, False),
        ({"exit": "2\n"}, 2, 1, 1, True),
        ({"exit": "1\n"}, 1, 1, 4, True),
        ({"exit": "3\n0\n"}, 0, 1, 2, True),
        ({"exit": "143\n" * 4 + "0\n"}, 0, 1, 5, True),
        ({"uv_fails": ""}, 1, 1, 0, False),
    ],
)
def test_pod_is_watched(stage, files, status, creates, starts, deleted):
    """What the pod says, one line a look, and its two workers decides what is done."""
    stage.write(**files)
    flags = ("--poll_seconds=0", "--patience=3", "--max_restarts=3", "--max_crashes=3")
    _, err = stage.run("tpu_pod.sh", "all", *WHOLE, *flags, "--", *NASTY, status=status)
    records = [" ".join(words) for words in stage.records() if words[0] == "gcloud"]
    count = lambda text: sum(text in record for record in records)  # noqa: E731
    assert count("queued-resources create") == creates, err
    assert count("worker.sh start") == starts, err
    ran = [arguments for arguments, _ in stage.programs(2 * starts)]
    wanted = ["-m", "bsce_jax.main", "--workdir=gs://b/r", *NASTY]
    assert ran == [wanted] * (2 * starts)
    assert ("queued-resources delete" in records[-1]) == deleted
    assert deleted or "or delete it" in err


def test_pod_stop_ends_the_run_and_who_watches_it(stage):
    flags = (*WHOLE, "--poll_seconds=0", "--keep")
    watching = stage.popen("tpu_pod.sh", "all", *flags, "--", "--wait_for_ever")
    stage.programs(2)
    stage.run("tpu_pod.sh", "stop", *POD)
    _, err = stage.end(watching, status=143)
    assert "the run was stopped" in err
    assert stage.told() == [["told"], ["told"]]
    assert "still there: delete it with" in err
    out, _ = stage.run("tpu_pod.sh", "log", *POD)
    assert out.count("==") == 2


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


MOUNT = "--data_dir=/mnt/bsce_jax_test"


def test_pod_mounts_a_bucket(stage):
    flags = (*WHOLE, "--data_bucket=bucket", MOUNT, "--poll_seconds=0", "--", "a")
    stage.write(gcsfuse__sh="exit 1")
    stage.run("tpu_pod.sh", "all", *flags, status=1)
    assert "uv" not in [words[0] for words in stage.records()]
    stage.write(gcsfuse__sh="exit 0")
    stage.run("tpu_pod.sh", "all", *flags)
    mount = ["gcsfuse", "--implicit-dirs", "-o", "ro", "bucket", MOUNT.split("=")[1]]
    assert stage.records().count(mount) == 3  # one failed, two workers
    (first, *_), _ = stage.programs(2)
    assert first[2:] == ["--workdir=gs://b/r", f"--config.data.{MOUNT[2:]}", "a"]


def test_pod_mounts_the_disk_that_is_not_mounted(stage):
    stage.run("tpu_pod.sh", "create", *WHOLE)
    flags = (*WHOLE, "--data_disk=disk", "--project=p", MOUNT)
    stage.write(lsblk__sh=LSBLK)
    stage.run("tpu_pod.sh", "install", *flags)
    mount = ["sudo", "mount", "-o", "ro,noload", "/dev/sdb", MOUNT.split("=")[1]]
    assert mount in stage.records()
    stage.write(lsblk__sh=LSBLK.replace("sdb ext4 ", "sdb ext4 /other"))
    _, err = stage.run("tpu_pod.sh", "install", *flags, status=1)
    assert "no disk with an ext4 file system" in err
