#!/usr/bin/env bash
# The batch script of slurm.sh; SLURM keeps a copy of it, so that it sources nothing here.
#
#   slurm_job.sh [--dry_run] MAX_REQUEUES MAX_CRASHES SETUP COMMAND...
set -euo pipefail

note() { # TEXT
  echo "slurm_job.sh: $1"
}

dry=no
if [[ $1 == --dry_run ]]; then # beside slurm.sh
  # shellcheck source-path=SCRIPTDIR source=common.sh
  source "$(dirname "$0")/common.sh"
  dry=yes flag[dry_run]=yes
  shift
fi
max_requeues=$1 max_crashes=$2 setup=$3
shift 3

if [[ -n $setup && $dry == yes ]]; then
  call source "$setup"
elif [[ -n $setup ]]; then
  set +eu # scripts of conda, for one, read unset variables
  # shellcheck source=/dev/null
  source "$setup"
  set -eu
fi

# A task that has saved must not have the others killed while they do.
flags=(--kill-on-bad-exit=0 --wait=300)
# srun does not take it over from sbatch.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || flags+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")

if [[ $dry == yes ]]; then
  call srun "${flags[@]}" "$@"
  note "where it has saved (status 143), or a process was lost or killed (3, 128 and more):"
  call scontrol requeue "$SLURM_JOB_ID"
  exit
fi

# SLURM tells this script only that the job is cancelled, or requeued by SLURM itself;
# the tasks get their own signal.
told=no interrupted=no
trap 'told=yes interrupted=yes' TERM
srun "${flags[@]}" "$@" &
while true; do
  status=0
  wait "$!" || status=$?
  [[ $interrupted == yes ]] || break
  interrupted=no
done
note "the run ended with status $status"

crashed_too_often() { # SLURM counts all requeues alike
  local file=bsce_jax-$SLURM_JOB_ID.crashes
  echo "$status" >>"$file"
  (($(wc -l <"$file") > max_crashes))
}

if [[ $told == no ]] && ((status == 3 || status >= 128)); then
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || true)
  if [[ $state != RUNNING ]]; then
    note "not requeued: the job is ${state:-gone}"
  elif ((${SLURM_RESTART_COUNT:-0} >= max_requeues)); then
    note "not requeued: that was done $max_requeues times"
  elif ((status != 143)) && crashed_too_often; then
    note "not requeued: it has crashed more than $max_crashes times"
  else
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$status"
