#!/usr/bin/env bash
# One run as several processes on this machine: to try what a pod does, or one GPU each.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'END'
Runs python -m bsce_jax.main as several processes on this machine.

    launch/local.sh [flags] -- ARGUMENTS OF bsce_jax.main
    launch/local.sh --processes 2 --devices 4 --workdir runs/two -- --config configs/digits.py

Each process sees --devices forced CPU devices or, with --gpus, one GPU. SIGTERM and Ctrl-C
go to all of them once, which save and end. When one fails the others are ended too, and its
exit status is this script's.

  --processes N      how many (2)
  --devices N        CPU devices of each (1)
  --gpus             a GPU each instead: process I gets GPU I
  --workdir DIR      the run's folder
  --data_dir DIR     where the data sets are
  --python FILE      interpreter (python)
  --port N           of the coordinator; 0 = one that is free (0)
  --grace_seconds N  time to save until the others are killed (120)
  --dry_run          print the commands
END
}

define processes 2
define devices 1
define gpus no switch
define workdir ''
define data_dir ''
define python python
define port 0
define grace_seconds 120
define dry_run no switch
parse_flags "$@"
check_number processes 1 1024
check_number devices 1 1024
check_number port 0 65535
check_number grace_seconds 0 86400
need python
check_arguments
run_arguments
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) ||
  die "bash $BASH_VERSION: expected 5.1 or later"

free_port() { # a port that nothing listens on
  local port
  while true; do
    port=$((20000 + RANDOM % 12000))
    (exec 4<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  printf '%s' "$port"
}

command_of() { # PROCESS: sets `command`
  command=(env)
  if [[ ${flag[gpus]} == yes ]]; then
    command+=("CUDA_VISIBLE_DEVICES=$1")
  else
    command+=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=${flag[devices]}")
  fi
  command+=("${flag[python]}" "${main[@]}")
  if ((flag[processes] > 1)); then
    command+=("--coordinator_address=127.0.0.1:$port")
    command+=("--num_processes=${flag[processes]}" "--process_id=$1")
  fi
}

ask_to_end() { # SIGNAL: asks every process that is left; kills it after the grace
  local pid
  for pid in "${!left[@]}"; do
    kill -s "$1" "$pid" 2>/dev/null || true
  done
  if [[ -z $timer ]]; then
    sleep "${flag[grace_seconds]}" &
    timer=$!
  fi
}

port=${flag[port]}
((port)) || port=$(free_port)
declare -A left=() # process id -> number of the process
status=0 timer=''
trap 'ask_to_end TERM' TERM
trap 'ask_to_end INT' INT
for ((number = 0; number < flag[processes]; number++)); do
  command_of "$number"
  if [[ ${flag[dry_run]} == yes ]]; then
    call "${command[@]}"
    continue
  fi
  # In a session of its own: the terminal's Ctrl-C must not reach it besides this
  # script's, because a second signal ends a run without saving.
  setsid "${command[@]}" 3>&- &
  left[$!]=$number
done

while ((${#left[@]})); do
  code=0
  wait -n -p ended "${!left[@]}" $timer || code=$?
  if [[ -z ${ended:-} ]]; then
    continue # a signal
  elif [[ $ended == "$timer" ]]; then
    note "killing what has not ended after ${flag[grace_seconds]} s"
    kill -s KILL "${!left[@]}" 2>/dev/null || true
    timer=''
    continue
  fi
  number=${left[$ended]}
  unset "left[$ended]"
  if ((code && !status)); then
    status=$code
    note "process $number ended with status $code"
    # Those that have been asked are ending: a second signal would keep them from saving.
    [[ -n $timer || ${#left[@]} == 0 ]] || ask_to_end TERM
  fi
done
[[ -z $timer ]] || kill "$timer" 2>/dev/null || true
exit "$status"
