"""The launch scripts: lint, arguments, dry runs and what they do, on stand-ins."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests import launch_stage
from tests.launch_stage import LAUNCH, NASTY, POD, RUN, WHOLE, commands_of

SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))
COMMANDS = ("tpu_pod.sh", "slurm.sh", "gke.sh", "local.sh")


@pytest.fixture
def stage(tmp_path):
    with launch_stage.make(tmp_path) as made:
        yield made


# -------------------------------------------------------------------------- all scripts


def test_shellcheck():
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert program, "shellcheck is missing: pip install '.[test]'"
    done = subprocess.run(
        [program, "--external-sources", *SCRIPTS],
        cwd=LAUNCH,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax_and_no_eval(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    text = (LAUNCH / script).read_text()
    assert not re.search(r"\beval\b", text)
    assert "set -euo pipefail" in text or script == "common.sh"
    assert os.access(LAUNCH / script, os.X_OK) == (script != "common.sh")


@pytest.mark.parametrize("script", COMMANDS)
def test_help_has_every_flag(stage, script):
    out, _ = stage.run(script, "--help")
    defined = re.findall(r"^define (\w+)", (LAUNCH / script).read_text(), re.M)
    documented = re.findall(r"^  --(\w+)", out, re.M)
    assert len(defined) > 8 and defined == documented
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("local.sh", "nothing after --: expected arguments of bsce_jax.main, such as"),
        ("local.sh --", "nothing after --: expected arguments of bsce_jax.main, such"),
        ("local.sh x -- a", "x: expected a flag, or -- before the arguments of"),
        ("local.sh --proc 2 -- a", "--proc: unknown flag, expected one of --processes"),
        (
            "local.sh '--$(touch bad)' -- a",
            "--$(touch bad): unknown flag, expected one",
        ),
        ("local.sh --processes", "--processes: the value is missing"),
        ("local.sh --processes -- a", "--processes: the value is missing"),
        ("local.sh --gpus=1 -- a", "--gpus: expected no value, got '1'"),
        (
            "local.sh --processes 0 -- a",
            "--processes='0': expected a whole number from",
        ),
        (
            "local.sh --devices=-1 -- a",
            "--devices='-1': expected a whole number from 1",
        ),
        (
            "local.sh --port a[0] -- a",
            "--port='a[0]': expected a whole number from 0 to",
        ),
        ("local.sh --python= -- a", "--python is missing: see --help"),
        ("local.sh -- --workdir=x", "--workdir=x after --: give --workdir before it"),
        ("tpu_pod.sh", "the command is missing: expected one of create install run"),
        (
            "tpu_pod.sh made",
            "made: unknown command, expected one of create install run",
        ),
        ("tpu_pod.sh stop", "--name is missing: see --help"),
        ("tpu_pod.sh stop --name A --zone z", "--name='A': expected at most 61 lower-"),
        (
            "tpu_pod.sh stop --name a --zone here",
            "--zone='here': expected a zone such as",
        ),
        ("tpu_pod.sh create {pod}", "--type is missing: see --help"),
        (
            "tpu_pod.sh create {pod} --type 8",
            "--type='8': expected a type such as v4-32",
        ),
        ("tpu_pod.sh install {pod}", "--repo or --wheel is missing: see --help"),
        ("tpu_pod.sh install {pod} --wheel no.whl", "--wheel='no.whl': no such file"),
        (
            "tpu_pod.sh install {pod} --wheel modules",
            "--wheel='modules': expected a file",
        ),
        (
            "tpu_pod.sh install {pod} --repo r --wheel x.whl",
            "--wheel='x.whl': expected no",
        ),
        ("tpu_pod.sh run {pod} -- a", "--workdir is missing: see --help"),
        (
            "tpu_pod.sh run {pod} --workdir /d -- a",
            "--workdir='/d': expected gs://BUCKET",
        ),
        (
            "tpu_pod.sh log {pod} --data_dir d",
            "--data_dir='d': expected an absolute path",
        ),
        (
            "tpu_pod.sh log {pod} --data_bucket gs://b",
            "--data_bucket='gs://b': expected a",
        ),
        (
            "tpu_pod.sh log {pod} --data_bucket bb --data_disk d",
            "--data_disk='d': expect",
        ),
        (
            "tpu_pod.sh create {pod} --type v4-8 --data_disk d",
            "--project is missing: see",
        ),
        (
            "tpu_pod.sh log {pod} --patience 0",
            "--patience='0': expected a whole number",
        ),
        ("tpu_pod.sh log {pod} --python 3", "--python='3': expected a version such as"),
        ("slurm.sh -- a", "--workdir is missing: see --help"),
        (
            "slurm.sh --workdir w --time soon -- a",
            "--time='soon': expected minutes, HOURS",
        ),
        (
            "slurm.sh --workdir w --gpus x -- a",
            "--gpus='x': expected a whole number from",
        ),
        ("slurm.sh --workdir w --setup none -- a", "--setup='none': no such file"),
        ("gke.sh", "the command is missing: expected one of print apply delete"),
        ("gke.sh print --name a_b", "--name='a_b': expected at most 40 lower-case"),
        (
            "gke.sh print --name a --kind pod",
            "--kind='pod': expected one of jobset job",
        ),
        ("gke.sh print --name a --workdir w", "--image is missing: see --help"),
        ("gke.sh print {run} -- a", "--gpu_type or --tpu_type is missing: see --help"),
        ("gke.sh print {run} --tpu_type t -- a", "--topology is missing: see --help"),
        (
            "gke.sh print {run} --gpu_type g --tpu_type t -- a",
            "--tpu_type='t': expected",
        ),
        (
            "gke.sh print {run} --tpu_type t --topology 4x4 --hosts 2 -- a",
            "--topology='4x4': expected one of --hosts x --chips = 8 chips",
        ),
        ("gke.sh print {run} --topology 4 -- a", "--topology='4': expected a topology"),
        ("gke.sh print {run} --memory 4 -- a", "--memory='4': expected a size such as"),
        (
            "gke.sh print {run} --gpu_type g --claim c --data_bucket bb -- a",
            "--claim='c': expected none beside --data_bucket",
        ),
    ],
)
def test_wrong_argument_is_one_line(stage, command, line):
    words = shlex.split(command.format(pod=" ".join(POD), run=" ".join(RUN)))
    out, err = stage.run(*words, status=2)
    assert out == "" and err.startswith(f"{words[0]}: {line}") and err.count("\n") == 1
    assert stage.records() == [] and not (stage.folder / "bad").exists()


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("tpu_pod.sh", ("create", *WHOLE, "--create_flag=--network=a b")),
        ("tpu_pod.sh", ("install", *WHOLE)),
        ("tpu_pod.sh", ("run", *WHOLE)),
        ("tpu_pod.sh", ("stop", *WHOLE)),
        ("tpu_pod.sh", ("log", *WHOLE)),
        ("tpu_pod.sh", ("delete", *WHOLE)),
        ("slurm.sh", ("--workdir", "/a b/it's", "--sbatch_flag", "--comment=a 'b'")),
        ("gke.sh", ("apply", *RUN, "--gpu_type", "h100")),
        ("gke.sh", ("delete", "--name", "run", "--kind", "job", "--namespace", "n")),
    ],
)
def test_dry_run_prints_what_would_be_run(stage, script, flags):
    """The printed lines, given to a shell, run the same commands as the script."""
    rest = ("--", *NASTY)
    out, err = stage.run(script, *flags, "--dry_run", *rest)
    assert stage.records() == [] and err == "" and not list(stage.fakes.glob("worker*"))
    stage.write(gcloud__sh="[[ $3 == tpu-vm ]] && echo READY || echo ACTIVE")
    stage.run(script, *flags, *rest)
    wanted = stage.records()
    (stage.fakes / "record").unlink()
    subprocess.run(["bash", "-c", out], env=stage.environment, check=True)
    assert stage.records() == wanted != []
    assert not (stage.folder / "bad").exists()


# -------------------------------------------------------------------------------- SLURM

SRUN = """trap 'sleep 0.3; touch "$FAKES/saved"; exit 143' TERM
echo $$ >"$FAKES/new" && mv "$FAKES/new" "$FAKES/pid"
for ((i = 0; i < 400; i++)); do sleep 0.05; done
"""
SBATCH = 'while [[ $1 == -* ]]; do shift; done; SLURM_JOB_ID=7 bash "$@"\n'


def test_slurm_submits_one_task_a_host(stage):
    flags = ("--nodes=4", "--cpus", "64", "--workdir", "/a b", "--partition=gpu")
    more = ("--time=2-00:00:00", "--grace_seconds=300", "--setup=modules", "--gpus=2")
    out, _ = stage.run("slurm.sh", *flags, *more, "--dry_run", "--", *NASTY)
    (words,) = commands_of(out)
    job = ["python", "-m", "bsce_jax.main", "--workdir=/a b", *NASTY]
    assert words == [
        "sbatch",
        *("--job-name=bsce_jax", "--nodes=4", "--ntasks-per-node=1"),
        *("--gpus-per-node=2", "--cpus-per-task=64", "--time=2-00:00:00"),
        *("--signal=TERM@300", "--requeue", "--open-mode=append"),
        *("--output=bsce_jax-%j.log", "--partition=gpu", f"{LAUNCH}/slurm_job.sh"),
        *("100", "5", "modules", *job),
    ]
    comments = [line[1:] for line in out.splitlines() if line[0] == "#"]
    source, srun, requeue = commands_of("\n".join(comments))
    assert source == ["source", "modules"]
    assert requeue == ["scontrol", "requeue", "JOB"]
    # The job runs what is shown.
    stage.write(sbatch__sh=SBATCH, srun__sh="exit 143", squeue__sh="echo RUNNING")
    flags = (*flags, *more, "--", *NASTY)
    stage.run("slurm.sh", *flags, status=143, SLURM_CPUS_PER_TASK="64")
    submitted, *ran = [w for w in stage.records() if w[0] != "squeue"]
    assert submitted == words and ran == [srun, ["scontrol", "requeue", "7"]]


@pytest.mark.parametrize(
    ("code", "state", "before", "crashes", "requeued"),
    [
        (0, "RUNNING", 0, 0, False),
        (1, "RUNNING", 0, 0, False),
        (2, "RUNNING", 0, 0, False),
        (3, "RUNNING", 0, 0, True),
        (134, "RUNNING", 0, 0, True),
        (137, "RUNNING", 4, 1, True),
        (137, "RUNNING", 5, 1, False),
        (3, "RUNNING", 2, 2, False),
        (137, "COMPLETING", 0, 0, False),
        (143, "RUNNING", 0, 0, True),
        (143, "RUNNING", 4, 2, True),
        (143, "RUNNING", 5, 0, False),
        (143, "COMPLETING", 0, 0, False),
        (143, "", 0, 0, False),
    ],
)
def test_slurm_requeues_what_goes_on(stage, code, state, before, crashes, requeued):
    stage.write(sbatch__sh=SBATCH, srun__sh=f'echo "$MODULE"; exit {code}')
    stage.write(squeue__sh=f"echo {state}")
    (stage.folder / "bsce_jax-7.crashes").write_text("3\n" * crashes)
    flags = ("--workdir=/w", "--setup=modules", "--max_requeues=5", "--max_crashes=2")
    more = {"SLURM_RESTART_COUNT": str(before), "SLURM_CPUS_PER_TASK": "64"}
    out, _ = stage.run("slurm.sh", *flags, "--", *NASTY, status=code, **more)
    assert out.startswith("loaded\n")
    _, srun, *rest = stage.records()
    program = ["python", "-m", "bsce_jax.main", "--workdir=/w", *NASTY]
    options = ["--kill-on-bad-exit=0", "--wait=300", "--cpus-per-task=64"]
    assert srun == ["srun", *options, *program]
    assert (["scontrol", "requeue", "7"] in rest) == requeued
    assert ("crashed more than 2 times" in out) == (crashes == 2 and code != 143)


def test_slurm_does_not_requeue_what_is_cancelled(stage):
    """`scancel` tells the batch script too; it waits for the tasks and lets it be."""
    stage.write(srun__sh=SRUN, squeue__sh="echo RUNNING")
    job = stage.popen("slurm_job.sh", "100", "5", "", "python", SLURM_JOB_ID="7")
    deadline = time.monotonic() + 20
    while not (stage.fakes / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    os.kill(int((stage.fakes / "pid").read_text()), signal.SIGTERM)
    assert job.wait(20) == 143 and (stage.fakes / "saved").exists()
    assert "status 143" in stage.end(job, status=143)[0]
    assert [words[0] for words in stage.records()] == ["srun"]


# --------------------------------------------------------------------------- Kubernetes


def manifest(stage, *flags, rest=("--config", "c")):
    out, _ = stage.run("gke.sh", "print", *RUN, *flags, "--", *rest)
    return list(yaml.safe_load_all(out))


def rules_of(job):
    """Actions of podFailurePolicy, and the exit statuses or conditions."""
    rules = job["podFailurePolicy"]["rules"]
    values = [rule.get("onExitCodes", {}).get("values") for rule in rules]
    return [
        (rule["action"], value or rule["onPodConditions"])
        for rule, value in zip(rules, values, strict=True)
    ]


def test_gke_jobset_on_gpus(stage):
    flags = ("--gpu_type=h100", "--hosts=4", "--gpus=2", "--max_restarts=9", "--spot")
    (found,) = manifest(stage, *flags, "--data_bucket=bucket", "--service_account=me")
    assert (found["apiVersion"], found["kind"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
    )
    assert found["metadata"] == {"name": "run"}
    reason = {"onJobFailureReasons": ["PodFailurePolicy"]}
    policy = found["spec"]["failurePolicy"]
    wrong, disrupted = policy["rules"]
    (pattern,) = wrong.pop("onJobFailureMessagePatterns")
    assert policy["maxRestarts"] == 9 and wrong == {"action": "FailJobSet", **reason}
    assert disrupted == {"action": "RestartJobSetAndIgnoreMaxRestarts", **reason}
    message = (
        "Container main for pod ns/p failed with exit code {} matching FailJob rule"
    )
    assert re.search(pattern, message.format(2))
    assert not re.search(pattern, message.format(143))
    (hosts,) = found["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    assert (hosts["name"], hosts["replicas"], job["backoffLimit"]) == ("host", 1, 3)
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] == 4
    assert rules_of(job) == [
        ("FailJob", [2]),
        ("FailJob", [{"type": "DisruptionTarget", "status": "True"}]),
        ("FailJob", [143]),
    ]
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["serviceAccountName"] == "me"
    assert pod["terminationGracePeriodSeconds"] == 120
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-accelerator": "h100",
        "cloud.google.com/gke-spot": "true",
    }
    assert len(pod["tolerations"]) == 3
    (main,) = pod["containers"]
    assert main["resources"] == {"limits": {"nvidia.com/gpu": 2}}
    assert main["command"] == [
        *("python", "-m", "bsce_jax.main", "--workdir=gs://b/r"),
        *("--config.data.data_dir=/data", "--config", "c"),
        "--coordinator_address=run-host-0-0.run:8476",
        *("--num_processes=4", "--process_id=$(JOB_COMPLETION_INDEX)"),
    ]
    places = {mount["name"]: mount["mountPath"] for mount in main["volumeMounts"]}
    assert places == {"shm": "/dev/shm", "data": "/data"}
    shared, data = pod["volumes"]
    assert shared["emptyDir"] == {"medium": "Memory"}
    assert data["csi"]["volumeAttributes"]["bucketName"] == "bucket"


def test_gke_indexed_job_on_tpus(stage):
    flags = (
        "--tpu_type=v5e",
        "--topology=4x4",
        "--hosts=4",
        "--kind=job",
        "--claim=pvc",
    )
    service, job = manifest(stage, *flags, "--namespace=ns")
    assert service["kind"] == "Service" and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": "run"}
    assert job["metadata"] == service["metadata"] == {"name": "run", "namespace": "ns"}
    assert job["kind"] == "Job" and job["spec"]["backoffLimit"] == 6 * 4 - 1
    assert rules_of(job["spec"]) == [
        ("FailJob", [2]),
        ("Ignore", [{"type": "DisruptionTarget", "status": "True"}]),
        ("Ignore", [143]),
    ]
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": 4}}
    assert pod["volumes"][1]["persistentVolumeClaim"]["claimName"] == "pvc"
    # GKE tells the processes of a TPU slice where they are.
    assert pod["containers"][0]["command"][-1] == "c"
    (jobset,) = manifest(stage, *flags[:3])
    (value,) = jobset["metadata"]["annotations"].values()
    assert value == "cloud.google.com/gke-nodepool"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 5
    (alone,) = manifest(stage, "--gpu_type=h100")
    assert "coordinator" not in str(alone)


def test_gke_arguments_survive_yaml_and_kubernetes(stage):
    nasty = [
        *NASTY,
        "$(JOB_COMPLETION_INDEX)",
        "$$",
        "a: #b",
        "\\",
        "é\n\t",
        "- x",
        "null",
    ]
    stage.write(kubectl__sh='cat >"$FAKES/applied"')
    stage.run("gke.sh", "apply", *RUN, "--gpu_type=h100", "--", *nasty)
    assert stage.records() == [["kubectl", "apply", "--filename=-"]]
    applied = yaml.safe_load((stage.fakes / "applied").read_text())
    pod = applied["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    command = pod["containers"][0]["command"][4:]
    # Kubernetes' rule: $$ stands for $, and a single $ before ( begins a variable.
    assert not any(re.search(r"(?<!\$)(\$\$)*\$\(", word) for word in command)
    assert [word.replace("$$", "$") for word in command] == nasty


# ------------------------------------------------------------------------- this machine


def test_local_gives_each_process_its_arguments(stage):
    flags = ("--processes=3", "--devices=4", "--workdir=/a b", "--python=./program")
    stage.run("local.sh", *flags, "--data_dir=d", "--", *NASTY)
    ports = set()
    for number, (arguments, environment) in enumerate(
        sorted(stage.programs(3), key=lambda found: found[0][-1])
    ):
        address, count, process = arguments[-3:]
        ports.add(address.removeprefix("--coordinator_address=127.0.0.1:"))
        assert (count, process) == ("--num_processes=3", f"--process_id={number}")
        assert arguments[:-3] == [
            *("-m", "bsce_jax.main", "--workdir=/a b"),
            *("--config.data.data_dir=d", *NASTY),
        ]
        assert {"JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=4"} <= set(environment)
    (port,) = ports
    assert 20000 <= int(port) < 32000


def test_local_dry_run_and_gpus(stage):
    flags = (
        "--processes=2",
        "--gpus",
        "--port=1234",
        "--dry_run",
        "--",
        "--config",
        "a b",
    )
    out, _ = stage.run("local.sh", *flags)
    for number, words in enumerate(commands_of(out)):
        assert words == [
            *("env", f"CUDA_VISIBLE_DEVICES={number}", "python", "-m", "bsce_jax.main"),
            *("--config", "a b", "--coordinator_address=127.0.0.1:1234"),
            *("--num_processes=2", f"--process_id={number}"),
        ]
    out, _ = stage.run("local.sh", "--processes=1", "--dry_run", "--", "a")
    assert "coordinator" not in out and stage.records() == []


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_local_forwards_a_signal_once(stage, number, status):
    """Each is told once, or it would end without saving, and may take its time.

    The terminal sends its signal to the script's whole group.
    """
    flags = ("--processes=3", "--python=./program", "--", "--wait_for_ever")
    script = stage.popen("local.sh", *flags)
    stage.programs(3)
    os.killpg(script.pid, number)
    stage.end(script, status)
    assert stage.told() == [["told"]] * 3


@pytest.mark.parametrize(
    ("others", "grace", "killed"),
    [("--wait_if_first", "60", False), ("--stay_if_first", "1", True)],
)
def test_local_ends_the_rest_when_one_dies(stage, others, grace, killed):
    stage.write(exit_now="7\n")
    started = time.monotonic()
    flags = ("--processes=2", "--python=./program", f"--grace_seconds={grace}")
    _, err = stage.run("local.sh", *flags, "--", others, status=7)
    assert "process 1 ended with status 7" in err and stage.told() == [["told"]]
    assert ("killing" in err) == killed and time.monotonic() - started < 15


# ------------------------------------------------------------------------------- manual


def test_commands_of_the_manual_are_right(stage):
    text = (LAUNCH.parent / "docs" / "launching.md").read_text()
    (image,) = re.findall(r"^```dockerfile\n(.*?)^```", text, re.M | re.S)
    assert "'.[cuda,gcs]'" in image and "'.[tpu,gcs]'" in text
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    for block in blocks:
        subprocess.run(["bash", "-n", "-c", block], check=True)
    joined = "\n".join(blocks).replace("\\\n", " ")
    commands = [c for c in joined.splitlines() if c.startswith("launch/")]
    assert {c.split("/")[1].split()[0] for c in commands} == set(COMMANDS)
    for command in commands:
        script, *words = shlex.split(command)
        place = words.index("--") if "--" in words else len(words)
        words[place:place] = ["--dry_run"]
        stage.run(script.removeprefix("launch/"), *words)
    assert stage.records() == []
