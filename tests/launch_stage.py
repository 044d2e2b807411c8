"""Stand-ins for gcloud, kubectl, SLURM and Python, for the tests of the launch scripts.

No test can reach a real one: PATH is one folder, with stand-ins that record their
arguments and links to the few programs that the scripts need.
"""

import contextlib
import dataclasses
import pathlib
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

LAUNCH = pathlib.Path(__file__).resolve().parent.parent / "launch"
FAKES = """curl gcloud gcsfuse git kubectl lsb_release lsblk python python3 sbatch
    scontrol squeue srun sudo uv"""
PROGRAMS = """awk bash cat chmod cp dirname env flock head hostname mkdir mountpoint mv
    ps rm sed setsid sleep sort tail timeout touch tr true wc"""
NASTY = ["--config", "a b", 'say "no"', "it's", "$HOME", "`x`", "$(touch bad)", "*", ""]

FAKE = """#!/usr/bin/env bash
name=${0##*/}
{ printf '%s\\0' "$name" "$@" && printf '\\1\\0'; } >>"$FAKES/record"
pop() { # FILE: its first line, which goes unless it is the last
  head -n 1 "$FAKES/$1"
  [[ $(sed -n '$=' "$FAKES/$1") == 1 ]] || sed -i 1d "$FAKES/$1"
}
fail() { # FILE: as its first line says, a number
  [[ ! -e $FAKES/$1 ]] || { status=$(pop "$1") && ((!status)) || exit "$status"; }
}
[[ ! -e $FAKES/$name.sh ]] || . "$FAKES/$name.sh"
"""

# A pod of two workers, each a folder; `uv venv` makes their "python". A worker that is
# "gone" cannot be reached, as soon as it has started the program.
GCLOUD = r"""
say() { # STATE: as gcloud does
  echo "WARNING: a notice" >&2
  case $1 in
    NOT_FOUND) echo "ERROR: (gcloud.x) NOT_FOUND: it was not found" >&2 && exit 1 ;;
    "") echo "ERROR: (gcloud) no network" >&2 && exit 1 ;;
    *) echo "$1" ;;
  esac
}
vanish() {
  mkdir "$FAKES/deleted.$$" && mv "$FAKES"/worker* "$FAKES/deleted.$$"
}
case "$*" in
  *"queued-resources create"*)
    fail create
    mkdir "$FAKES"/worker{0,1} ;;
  *"queued-resources delete"*)
    fail delete
    vanish ;;
  *"queued-resources describe"*)
    state=NOT_FOUND
    [[ ! -e $FAKES/worker0 ]] || state=$(pop request)
    [[ $state != NOT_FOUND || ! -e $FAKES/worker0 ]] || vanish
    say "$state" ;;
  *"tpu-vm describe"*) say "$(pop node)" ;;
  *scp*)
    fail scp
    for worker in "$FAKES"/worker*; do
      [[ $6 != *.sh ]] || cp "$6" "$worker/${7#*:}"
    done ;;
  *ssh*)
    for word; do [[ $word != --command=* ]] || remote=${word#*=}; done
    gone=''
    if [[ $remote == *" start "* ]]; then
      read -r code gone <<<"$(pop exit)"
      echo "$code" >"$FAKES/exit_now"
    fi
    failed=0
    for worker in "$FAKES"/worker*; do
      [[ ! -e $worker/gone ]] || { failed=255 && continue; }
      (cd "$worker" && HOME=$worker bash -c "$remote") || failed=1
    done
    [[ -z $gone ]] || touch "$worker/gone"
    exit "$failed" ;;
esac
"""
UV = r"""
if [[ $1 == venv ]]; then
  mkdir -p "${!#}/bin" && cp "$FAKES/../program" "${!#}/bin/python"
else
  fail uv
fi
"""
# Stands for python: keeps its arguments, environment and how often it was told to end.
PROGRAM = (
    f"#!{sys.executable} -IS"
    + """
import os, signal, sys, time
def told(number, frame):
    with open(path + ".told", "a") as file:
        file.write("told ")
    if "--stay_if_first" not in sys.argv:
        time.sleep(0.3)
        sys.exit(128 + number)
path = os.environ["FAKES"] + f"/program.{os.getpid()}"
signal.signal(signal.SIGTERM, told)
signal.signal(signal.SIGINT, told)
environ = map("=".join, os.environ.items())
for name, lines in ("arguments", sys.argv[1:]), ("environ", environ):
    with open(path + ".new", "w") as file:
        file.write("".join(f"{line}\\0" for line in lines))
    os.rename(path + ".new", path + "." + name)
pair = "_if_first" in str(sys.argv)
while pair and len([f for f in os.listdir(os.environ["FAKES"]) if "environ" in f]) < 2:
    time.sleep(0.02)
first = sys.argv[-1] == "--process_id=0" and pair
deadline = time.monotonic() + 30
while (first or "--wait_for_ever" in sys.argv) and time.monotonic() < deadline:
    time.sleep(0.02)
sys.exit(int(open(os.environ["FAKES"] + "/exit_now").read()))
"""
)


@dataclasses.dataclass
class Stage:
    """A folder with the stand-ins, and what they recorded."""

    folder: pathlib.Path
    processes: list = dataclasses.field(default_factory=list)

    @property
    def fakes(self):
        return self.folder / "fakes"

    @property
    def environment(self):
        names = {"PATH": str(self.folder / "bin"), "FAKES": str(self.fakes)}
        return {**names, "HOME": str(self.folder), "LC_ALL": "C.UTF-8"}

    def write(self, **files):
        for name, text in files.items():
            (self.fakes / name.replace("__", ".")).write_text(text)

    def popen(self, script, *arguments, **more):
        process = subprocess.Popen(
            # Where the tests run in the background it is ignored, and bash keeps that.
            [shutil.which("env"), "--default-signal=INT", LAUNCH / script, *arguments],
            env=self.environment | more,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a group of its own, as in a terminal
        )
        self.processes.append(process)
        return process

    def end(self, process, status=0):
        """Waits for a script; returns what it wrote."""
        out, err = process.communicate(timeout=20)
        assert process.returncode == status, (out, err)
        return out, err

    def run(self, script, *arguments, status=0, **more):
        return self.end(self.popen(script, *arguments, **more), status)

    def records(self):
        """Commands so far, each a list of words."""
        path = self.fakes / "record"
        text = path.read_text() if path.exists() else ""
        return [part.split("\0")[:-1] for part in text.split("\1\0")[:-1]]

    def programs(self, count):
        """Arguments and environment of each program, once there are so many."""
        deadline = time.monotonic() + 20
        while len(found := sorted(self.fakes.glob("*.environ"))) < count:
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
        read = lambda path: path.read_text().split("\0")[:-1]  # noqa: E731
        return [(read(path.with_suffix(".arguments")), read(path)) for path in found]

    def told(self):
        return [path.read_text().split() for path in self.fakes.glob("*.told")]


@contextlib.contextmanager
def make(folder: pathlib.Path) -> Iterator[Stage]:
    stage = Stage(folder)
    for made in (stage.fakes, folder / "bin"):
        made.mkdir()
    for name in FAKES.split():
        (folder / "bin" / name).write_text(FAKE)
        (folder / "bin" / name).chmod(0o755)
    for name in PROGRAMS.split():
        found = shutil.which(name)
        assert found, f"these tests need {name}"
        (folder / "bin" / name).symlink_to(found)
    (folder / "program").write_text(PROGRAM)
    (folder / "program").chmod(0o755)
    (folder / "x.whl").touch()
    # As scripts of conda do, it reads what is unset, and goes on after a failure.
    (folder / "modules").write_text('x=$UNSET; false; export MODULE="loaded$x"\n')
    stage.write(gcloud__sh=GCLOUD, uv__sh=UV, exit="0\n", exit_now="0\n")
    stage.write(request="ACTIVE\n", node="READY\n", kubectl__sh="cat >/dev/null\n")
    yield stage
    for process in stage.processes:
        process.kill()
        process.communicate()


def commands_of(text):
    """The commands of a dry run, each a list of words; its comments are left out."""
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words for words in lines if words]


POD = ("--name", "pod", "--zone", "us-central2-b")
WHOLE = (*POD, "--type", "v4-32", "--repo", "https://host/x", "--workdir", "gs://b/r")
RUN = ("--name", "run", "--image", "i", "--workdir", "gs://b/r")
