#!/usr/bin/env bash
# The batch script of slurm.sh; SLURM keeps a copy of it, so that it sources nothing here.
#
#   slurm_job.sh MAX_REQUEUES SETUP COMMAND...
set -euo pipefail

most=$1 setup=$2
shift 2
if [[ -n $setup ]]; then
  # shellcheck source=/dev/null
  source "$setup"
fi

# A task that has saved must not have the others killed while they do.
flags=(--kill-on-bad-exit=0 --wait=300)
# srun does not take it over from sbatch.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || flags+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")

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
echo "slurm_job.sh: the run ended with status $status"

if ((status == 143)) && [[ $told == no ]]; then
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || true)
  if [[ $state != RUNNING ]]; then
    echo "slurm_job.sh: not requeued: the job is ${state:-gone}"
  elif ((${SLURM_RESTART_COUNT:-0} >= most)); then
    echo "slurm_job.sh: not requeued: that was done $most times"
  else
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$status"
