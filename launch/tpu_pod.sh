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
    launch/tpu_pod.sh all --name pod --zone us-central2-b --type v4-32 --spot \
        --repo https://HOST/OWNER/REPOSITORY --data_bucket my-bucket --workdir gs://my-bucket/run \
        -- --config configs/imagenet.py:method=podnet

Commands, each for one pod (--name, --zone):
  create   requests the pod and waits until it is there
  install  mounts the data, installs the project on all workers
  run      starts the run on all workers, in the background; a run that is there ends first
  watch    waits for the end of the run. A pod that was taken away is requested anew, and a
           run that ended otherwise is started again: it goes on from its checkpoints
  stop     saves and ends the run; whoever watches it ends too
  log      shows the last lines of every worker's log
  delete   deletes the pod
  all      create, install, run, watch; then delete, unless --keep

Exit status: 0 done; 1 given up; 2 wrong arguments, of this script or of the run; 143 stopped.

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
  --max_restarts N     of the pod (100)
  --max_crashes N      of the program, on a pod that is there (5)
  --grace_seconds N    time to save until a worker's program is killed (120)
  --lines N            of each log (20)
  --keep               all: does not delete the pod
  --dry_run            print the commands, each as it would be run, and what may follow
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

common_flags() { # sets `where`
  where=("--zone=${flag[zone]}")
  [[ -z ${flag[project]} ]] || where+=("--project=${flag[project]}")
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

pod_state() { # READY, or what else the request or the pod is; UNKNOWN without an answer
  local found
  found=$(query ACTIVE gcloud compute tpus queued-resources describe "${flag[name]}" \
    "${where[@]}" '--format=value(state.state)') || found=UNKNOWN
  if [[ $found == ACTIVE ]]; then
    found=$(query READY gcloud compute tpus tpu-vm describe "${flag[name]}" \
      "${where[@]}" '--format=value(state)') || found=UNKNOWN
  fi
  printf '%s\n' "${found:-UNKNOWN}"
}

is_gone() { # STATE
  [[ " PREEMPTED TERMINATED STOPPED SUSPENDING SUSPENDED FAILED " == *" $1 "* ]]
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

worker() { # WORD...: a command of tpu_worker.sh
  on_workers bash bsce_jax_worker.sh "$@"
}

copy() { # FILE... TARGET: to all workers
  call gcloud compute tpus tpu-vm scp --recurse "${@:1:$#-1}" "${flag[name]}:${*: -1}" \
    "${where[@]}" --worker=all --quiet
}

install() { # each step says if it fails: `set -e` has no effect where || follows
  local source=${flag[repo]} ref=${flag[ref]}
  copy "$here/tpu_worker.sh" bsce_jax_worker.sh || return
  if [[ -n ${flag[data_disk]} ]]; then
    worker mount disk '' "${flag[data_dir]}" || return
  elif [[ -n ${flag[data_bucket]} ]]; then
    worker mount bucket "${flag[data_bucket]}" "${flag[data_dir]}" || return
  fi
  if [[ -n ${flag[wheel]} ]]; then
    source=${flag[wheel]##*/} ref=''
    on_workers mkdir -p bsce_jax/project || return
    copy "${flag[wheel]}" "$here/../configs" "$here/../constraints.txt" \
      bsce_jax/project/ || return
  fi
  worker install "${flag[python]}" "$source" "$ref"
}

start() {
  worker start "${flag[grace_seconds]}" ../env/bin/python "${main[@]}"
}

delete() {
  call gcloud compute tpus queued-resources delete "${flag[name]}" "${where[@]}" \
    --force --quiet
}

recreate() { # status 1 if any of it fails: the next look at the pod says more
  delete && request && await_pod && install && start
}

run_state() { # one word for all workers
  local lines states
  ssh_command bash bsce_jax_worker.sh status
  lines=$(query 'bsce_jax_status worker 0' "${ssh[@]}") || { echo UNKNOWN && return; }
  states=$(sed -n 's/^bsce_jax_status [^ ]* //p' <<<"$lines" | tr -d '\r' | sort -u)
  states=" ${states//$'\n'/ } "
  case $states in
    "  ") echo UNKNOWN ;;
    *" 2 "*) echo wrong ;;
    *" running "*) echo running ;;
    *" stopped "*) echo stopped ;;
    " 0 ") echo "done" ;;
    " 143 " | " 0 143 ") echo saved ;;
    *) echo "crashed:$states" ;;
  esac
}

give_up() { # MESSAGE
  note "$1"
  worker log "${flag[lines]}" || true
  return 1
}

watch() {
  local state unknown=0 restarts=0 crashes=0
  trap 'note "no longer watching: the run goes on"; exit 130' INT
  while true; do
    state=$(pod_state)
    [[ $state != READY ]] || state=$(run_state)
    [[ $state == UNKNOWN ]] || unknown=0
    case $state in
      "done") note "the run is done" && break ;;
      wrong) give_up "the run refused its arguments" || return 2 ;;
      stopped) note "the run was stopped" && return 143 ;;
      UNKNOWN)
        ((++unknown < flag[patience])) || die_of "no answer, $unknown times"
        ;;
      saved | crashed*)
        note "the run ended: $state"
        if [[ $state != saved ]]; then
          ((++crashes <= flag[max_crashes])) || give_up "that was too often" || return 1
        fi
        start || true
        ;;
      *)
        if is_gone "$state"; then
          note "the pod is $state"
          ((++restarts <= flag[max_restarts])) || die_of "that was too often"
          note "requesting it anew"
          recreate || true
        fi
        ;;
    esac
    pause
  done
  [[ ${flag[dry_run]} == no ]] || foresee
}

foresee() { # what `watch` does when not all goes well
  note "until the run has ended on all workers, after each of these looks:"
  pause
  note "where the pod was taken away, at most ${flag[max_restarts]} times:"
  recreate
  note "where the run ended with another status than 0 and 2, at most" \
    "${flag[max_crashes]} times unless it had saved:"
  start
}

all() {
  local status=0
  request
  await_pod || die_of "the pod was not created"
  install || die_of "the project was not installed"
  start || die_of "the run was not started"
  watch || status=$?
  if [[ ${flag[keep]} == yes ]]; then
    note "the pod is still there: delete it with '$0 delete' and the same flags"
  else
    note "deleting the pod"
    delete
  fi
  return "$status"
}

die_of() { # MESSAGE
  note "$1; the pod may be there: look at it with watch, or delete it"
  exit 1
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
case $command in
  create) request && await_pod ;;
  run) start ;;
  stop) worker stop "${flag[grace_seconds]}" ;;
  log) worker log "${flag[lines]}" ;;
  *) "$command" ;;
esac
