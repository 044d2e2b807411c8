#!/usr/bin/env bash
# A Cloud TPU pod from nothing to a finished run: create, install, run, watch, delete.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

usage() {
  cat <<'END'
Runs python -m bsce_jax.main on every worker of a Cloud TPU pod.

    launch/tpu_pod.sh COMMAND [flags] -- ARGUMENTS OF bsce_jax.main
    launch/tpu_pod.sh all --name pod --zone us-central2-b --type v4-16 --spot \
        --repo https://HOST/OWNER/REPOSITORY --data_bucket my-bucket --workdir gs://my-bucket/run \
        -- --config configs/imagenet.py:method=il_baseline

Commands, each for one pod (--name, --zone):
  create   requests the pod and waits until it is there
  install  installs the project on all workers
  run      mounts the data and starts the run on all workers, in the background; a run that
           is there ends first
  watch    waits for the end of the run. A pod that was taken away is requested anew, and a
           run that ended otherwise is started again: it goes on from its checkpoints. At the
           end, also where it gives up, it deletes the pod, unless --keep
  stop     saves and ends the run; whoever watches it ends too, and deletes the pod
  log      shows the last lines of every worker's log
  delete   deletes the pod
  all      create, install, run, watch

Exit status: 0 done; 1 given up, or the pod could not be deleted; 2 wrong arguments, of this
script or of the run; 143 stopped.

Tested with a stand-in for gcloud; it has met no real TPU yet.

  --name NAME          of the pod
  --zone ZONE          such as us-central2-b
  --project ID         (gcloud's)
  --type TYPE          v4-32, v5litepod-64, v5p-32, v6e-64, ...
  --runtime VERSION    of the workers' software (the usual one of the type)
  --spot               cheaper, and may be taken away at any time
  --create_flag FLAG   another flag of `gcloud compute tpus queued-resources create`, such as
                       --create_flag=--network=NAME; may be repeated
  --repo URL           git repository of the project; needs no password
  --ref NAME           its branch, tag or commit (main)
  --wheel FILE         instead: a wheel of the project; configs/ of this folder go with it
  --python VERSION     installed by uv (3.12)
  --workdir DIR        the run's folder: gs://BUCKET/PATH
  --data_bucket NAME   Cloud Storage bucket with the data sets, mounted at --data_dir
  --data_disk NAME     instead: a persistent disk of the zone, attached read-only
  --data_dir DIR       where the data sets are (/mnt/data with a bucket or disk)
  --poll_seconds N     between two looks at the pod (60)
  --patience N         looks without an answer until watching ends (10)
  --max_restarts N     of the pod, and attempts to get it (100)
  --max_crashes N      of the program, and failed installations, on a pod that is there (5)
  --grace_seconds N    time to save until a worker's program is killed (120)
  --lines N            of each log (20)
  --keep               all, watch: do not delete the pod
  --dry_run            print the commands, and as comments what they run on a new worker and
                       what may follow
END
}

define name ''
define zone ''
define project ''
define type ''
define runtime ''
define spot no switch
define create_flag '' list
define repo ''
define ref main
define wheel ''
define python 3.12
define workdir ''
define data_bucket ''
define data_disk ''
define data_dir ''
define poll_seconds 60
define patience 10
define max_restarts 100
define max_crashes 5
define grace_seconds 120
define lines 20
define keep no switch
define dry_run no switch
list_create_flag=()

check_flags() { # COMMAND
  need name zone
  check_name name 61
  check_pattern zone '^[a-z]+-[a-z]+[0-9]+-[a-z]$' "a zone such as us-central2-b"
  check_pattern type '^v[0-9]+[a-z]*-[0-9]+$' "a type such as v4-32 or v5litepod-64"
  check_pattern python '^3\.[0-9]+$' "a version such as 3.12"
  check_number poll_seconds 0 86400
  check_number patience 1 100000
  check_number max_restarts 0 100000
  check_number max_crashes 0 100000
  check_number grace_seconds 1 86400
  check_number lines 1 100000
  check_file wheel
  check_pattern wheel '\.whl$' "a file *.whl"
  check_pattern workdir '^gs://[^/]+/.' "gs://BUCKET/PATH, which all workers see"
  check_pattern data_bucket '^[a-z0-9][-_.a-z0-9]+$' "a bucket's name, without gs://"
  check_pattern data_dir '^/' "an absolute path"
  [[ -z ${flag[data_bucket]} || -z ${flag[data_disk]} ]] ||
    die "--data_disk='${flag[data_disk]}': expected none beside --data_bucket"
  [[ -z ${flag[repo]} || -z ${flag[wheel]} ]] ||
    die "--wheel='${flag[wheel]}': expected none beside --repo"
  if [[ -n ${flag[data_bucket]}${flag[data_disk]} && -z ${flag[data_dir]} ]]; then
    flag[data_dir]=/mnt/data
  fi
  if [[ " create watch all " == *" $1 "* ]]; then
    need type
    [[ -z ${flag[data_disk]} || ${flag[data_disk]} == */* ]] || need project
  fi
  if [[ " install watch all " == *" $1 "* && -z ${flag[repo]}${flag[wheel]} ]]; then
    die "--repo or --wheel is missing: see --help"
  fi
  if [[ " run watch all " == *" $1 "* ]]; then
    need workdir
    check_arguments
    run_arguments
  fi
}

common_flags() { # sets `where` and `deletion`
  where=("--zone=${flag[zone]}")
  [[ -z ${flag[project]} ]] || where+=("--project=${flag[project]}")
  deletion=(gcloud compute tpus queued-resources delete "${flag[name]}" "${where[@]}")
  deletion+=(--force --quiet)
}

runtime_of() { # TYPE: see "TPU software versions" in Google's documentation
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

request() {
  local flags=("--node-id=${flag[name]}" "--accelerator-type=${flag[type]}")
  flags+=("--runtime-version=${flag[runtime]:-$(runtime_of "${flag[type]}")}")
  [[ ${flag[spot]} == no ]] || flags+=(--spot)
  local disk=${flag[data_disk]}
  [[ $disk == */* ]] || disk=projects/${flag[project]}/zones/${flag[zone]}/disks/$disk
  [[ -z ${flag[data_disk]} ]] || flags+=("--data-disk=source=$disk,mode=read-only")
  call gcloud compute tpus queued-resources create "${flag[name]}" "${where[@]}" \
    "${flags[@]}" "${list_create_flag[@]}" --quiet
}

describe() { # KIND FIELD ANSWER: a state; NOT_FOUND; UNKNOWN without an answer
  local text
  if text=$(query "$3" gcloud compute tpus "$1" describe "${flag[name]}" "${where[@]}" \
    "--format=value($2)" 2>&1); then
    # Warnings may stand around it.
    [[ $'\n'$text$'\n' =~ $'\n'([A-Z_]+)$'\n' ]] || BASH_REMATCH=('' UNKNOWN)
    printf '%s\n' "${BASH_REMATCH[1]}"
  elif [[ $text == *NOT_FOUND* ]]; then
    echo NOT_FOUND
  else
    printf '%s\n' "$text" >&2
    echo UNKNOWN
  fi
}

pod_state() { # READY, or what else the request or the pod is
  local state
  state=$(describe queued-resources state.state ACTIVE)
  if [[ $state == ACTIVE ]]; then
    state=$(describe tpu-vm state READY)
    [[ $state != NOT_FOUND ]] || state=MISSING # and the request is still there
  fi
  printf '%s\n' "$state"
}

is_gone() { # STATE
  local states="NOT_FOUND MISSING PREEMPTED TERMINATED STOPPED SUSPENDING SUSPENDED FAILED"
  [[ " $states " == *" $1 "* ]]
}

pause() {
  call sleep "${flag[poll_seconds]}"
}

await_pod() { # waits until it is READY; status 1 if it will not be
  local state unknown=0
  while true; do
    state=$(pod_state)
    [[ $state != READY ]] || return 0
    note "the pod is $state"
    ! is_gone "$state" || return 1
    if [[ $state != UNKNOWN ]]; then
      unknown=0
    else
      ((++unknown < flag[patience])) || return 1
    fi
    pause
  done
}

ssh_command() { # WORD...: sets `ssh` to what runs a command on all workers at once
  ssh=(gcloud compute tpus tpu-vm ssh "${flag[name]}" "${where[@]}" --worker=all)
  ssh+=(--quiet "--command=$(quote "$@")")
}

on_workers() { # WORD...
  ssh_command "$@"
  call "${ssh[@]}"
}

worker() { # a command of tpu_worker.sh, on all workers
  on_workers bash bsce_jax_worker.sh "$@" || return
  [[ ${flag[dry_run]} == no ]] || foresee bash "$here/tpu_worker.sh" --dry_run "$@"
}

copy() { # FILE... TARGET: to all workers
  call gcloud compute tpus tpu-vm scp --recurse "${@:1:$#-1}" "${flag[name]}:${*: -1}" \
    "${where[@]}" --worker=all --quiet
}

install() { # each step says if it fails: `set -e` has no effect where || follows
  local source=${flag[repo]} ref=${flag[ref]}
  copy "$here/tpu_worker.sh" bsce_jax_worker.sh || return
  if [[ -n ${flag[wheel]} ]]; then
    source=${flag[wheel]##*/} ref=''
    on_workers mkdir -p bsce_jax/project || return
    copy "${flag[wheel]}" "$here/../configs" "$here/../constraints.txt" \
      bsce_jax/project/ || return
  fi
  worker install "${flag[python]}" "$source" "$ref"
}

start() { # a worker that was restarted has lost its mount
  if [[ -n ${flag[data_disk]} ]]; then
    worker mount disk '' "${flag[data_dir]}" || return
  elif [[ -n ${flag[data_bucket]} ]]; then
    worker mount bucket "${flag[data_bucket]}" "${flag[data_dir]}" || return
  fi
  worker start "${flag[grace_seconds]}" ../env/bin/python "${main[@]}"
}

delete() {
  call "${deletion[@]}"
}

recreate() { # STATE: status 1 if it fails: the next look at the pod says more
  [[ $1 == NOT_FOUND ]] || delete || return
  request
}

run_state() { # one word for all workers; UNKNOWN where none answers
  local lines states silent=no
  # A new worker has no script yet.
  # shellcheck disable=SC2016
  ssh_command bash -c 'if [[ -e $0 ]]; then bash $0 status; else echo "$1 $HOSTNAME none"; fi' \
    bsce_jax_worker.sh bsce_jax_status
  # Without a limit gcloud tries for some 20 minutes to reach a worker.
  lines=$(query 'bsce_jax_status worker 0' timeout 180 "${ssh[@]}") || silent=yes
  states=$(sed -n 's/^bsce_jax_status [^ ]* //p' <<<"$lines" | tr -d '\r' | sort -u)
  states=" ${states//$'\n'/ } "
  case $silent$states in
    *"  ") echo UNKNOWN ;;
    *" 2 "*) echo wrong ;;
    *" running "*) echo running ;;
    *" stopped "*) echo stopped ;;
    yes*) echo unreachable ;;
    *" none "*) echo none ;;
    *" lost "*) echo lost ;;
    "no 0 ") echo "done" ;;
    "no 143 " | "no 0 143 ") echo saved ;;
    *) echo "crashed:$states" ;;
  esac
}

give_up() { # MESSAGE
  note "$1"
  worker log "${flag[lines]}" || true
  return 1
}

declare -A tries=([restarts]=0 [crashes]=0)

again() { # restarts|crashes MESSAGE: counts; gives up if that was too often
  note "$2"
  tries[$1]=$((tries[$1] + 1))
  ((${tries[$1]} <= ${flag[max_$1]})) || give_up "that was too often"
}

look_after() { # whatever the pod and its run need, until that has ended for good
  local state silent=0
  while true; do
    state=$(pod_state)
    [[ $state != READY ]] || state=$(run_state)
    if [[ $state == UNKNOWN || $state == unreachable ]]; then
      ((++silent >= flag[patience])) || state=silent
    else
      silent=0
    fi
    case $state in
      "done") note "the run is done" && return ;;
      wrong) give_up "the run refused its arguments" || return 2 ;;
      stopped) note "the run was stopped" && return 143 ;;
      UNKNOWN) leave "no answer, $silent times" ;;
      none)
        { install && start; } || again crashes "the run was not started" || return
        ;;
      saved)
        note "the run has saved and ended"
        start || again crashes "the run was not started" || return
        ;;
      lost)
        again restarts "a worker was restarted" || return
        start || true
        ;;
      crashed*)
        again crashes "the run ended with status ${state#*:}" || return
        start || true
        ;;
      *)
        if [[ $state == unreachable ]] || is_gone "$state"; then
          again restarts "the pod is $state: requesting it anew" || return
          recreate "$state" || true
          silent=0
        elif [[ $state != running ]]; then
          note "the pod is $state"
        fi
        ;;
    esac
    pause
  done
}

what_may_follow() {
  note "until the run has ended on all workers, after each of these looks:"
  pause
  note "where the pod was taken away, at most ${flag[max_restarts]} times:"
  recreate PREEMPTED
  note "then, once it is there:"
  install
  start
  note "where the run ended with another status than 0 and 2, at most" \
    "${flag[max_crashes]} times unless it had saved:"
  start
}

watch() {
  local status=0
  look_after || status=$?
  [[ ${flag[dry_run]} == no ]] || what_may_follow
  finish "$status"
}

finish() { # STATUS of the run: exits with it; the pod is billed while it is there
  local try
  if [[ ${flag[keep]} == yes ]]; then
    note "the pod is still there and billed. Delete it with: $(quote "${deletion[@]}")"
    exit "$1"
  fi
  for ((try = 0; try < 5; try++)); do
    note "deleting the pod"
    if delete || [[ $(pod_state) == NOT_FOUND ]]; then
      exit "$1"
    fi
    pause
  done
  leave "the pod could not be deleted" "$1"
}

leave() { # MESSAGE [STATUS]: ends, and the pod does not
  local status=${2:-1}
  note "$1: THE POD MAY STILL BE THERE AND BILLED"
  note "look at it with watch, or delete it with: $(quote "${deletion[@]}")"
  exit "$((status ? status : 1))"
}

all() {
  request || leave "the request failed"
  if ! await_pod; then
    note "the pod was not created"
    finish 1
  fi
  { install && start; } || note "the run was not started: trying again"
  watch
}

command=${1:-}
shift || true
case $command in
  create | install | run | watch | stop | log | delete | all) ;;
  -h | --help) usage && exit 0 ;;
  '') die "the command is missing: expected one of create install run watch stop log delete all" ;;
  *) die "$command: unknown command, expected one of create install run watch stop log delete all" ;;
esac
parse_flags "$@"
check_flags "$command"
common_flags
[[ " all watch " != *" $command "* ]] || trap 'leave "no longer watching" 130' INT
case $command in
  create) request && await_pod ;;
  run) start ;;
  stop) worker stop "${flag[grace_seconds]}" ;;
  log) worker log "${flag[lines]}" ;;
  *) "$command" ;;
esac
