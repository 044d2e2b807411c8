#!/usr/bin/env bash
# A run on SLURM: one task a host, all of its GPUs, requeued where its time is over.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

usage() {
  cat <<'END'
Submits a batch job that runs python -m bsce_jax.main on every host.

    launch/slurm.sh [flags] -- ARGUMENTS OF bsce_jax.main
    launch/slurm.sh --nodes 2 --gpus 4 --cpus 64 --workdir /shared/run --data_dir /shared/data \
        --python /shared/env/bin/python -- --config configs/imagenet.py:method=il_baseline

Call it in the project's folder, on a file system of all hosts. --grace_seconds before the
time limit, and when it is preempted, the run saves and the job is requeued; it goes on from
its checkpoints. It is requeued too where a process was lost or killed (status 3, or 128 and
more). `scancel` ends it for good, `scancel --signal=TERM JOB` saves and requeues.

Tested with stand-ins for SLURM's commands; it has met no real SLURM yet.

  --nodes N            hosts (1)
  --gpus N             of each host; 0 = CPU (8)
  --cpus N             of each host, which also decode images; 0 = the partition's default (0)
  --time LIMIT         of one stretch, as sbatch takes it (24:00:00)
  --partition NAME
  --account NAME
  --name NAME          of the job (bsce_jax)
  --workdir DIR        the run's folder: on a file system of all hosts, or gs://BUCKET/PATH
  --data_dir DIR       where the data sets are
  --python FILE        interpreter on the hosts (python)
  --setup FILE         sourced before, such as one with `module load`
  --log FILE           (bsce_jax-%j.log, %j is the job's number)
  --grace_seconds N    time to save (120)
  --max_requeues N     of any cause (100)
  --max_crashes N      requeues where a process was lost or killed (5)
  --sbatch_flag FLAG   another flag of sbatch, such as --sbatch_flag=--exclusive; may be
                       repeated
  --dry_run            print the command, and as comments those of the job
END
}

define nodes 1
define gpus 8
define cpus 0
define time 24:00:00
define partition ''
define account ''
define name bsce_jax
define workdir ''
define data_dir ''
define python python
define setup ''
define log bsce_jax-%j.log
define grace_seconds 120
define max_requeues 100
define max_crashes 5
define sbatch_flag '' list
define dry_run no switch
list_sbatch_flag=()

parse_flags "$@"
need workdir python name log
check_number nodes 1 100000
check_number gpus 0 64
check_number cpus 0 4096
check_pattern time '^([0-9]+|([0-9]+-)?[0-9]+:[0-9]+(:[0-9]+)?|[0-9]+-[0-9]+)$' \
  "minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS"
check_number grace_seconds 1 65535
check_number max_requeues 0 100000
check_number max_crashes 0 100000
check_file setup
check_arguments
run_arguments

options=("--job-name=${flag[name]}" "--nodes=${flag[nodes]}" --ntasks-per-node=1)
((flag[gpus] == 0)) || options+=("--gpus-per-node=${flag[gpus]}")
((flag[cpus] == 0)) || options+=("--cpus-per-task=${flag[cpus]}")
# Without "B:" the signal goes to the tasks, not to the batch script.
options+=("--time=${flag[time]}" "--signal=TERM@${flag[grace_seconds]}")
options+=(--requeue --open-mode=append "--output=${flag[log]}")
[[ -z ${flag[partition]} ]] || options+=("--partition=${flag[partition]}")
[[ -z ${flag[account]} ]] || options+=("--account=${flag[account]}")
job=("${flag[max_requeues]}" "${flag[max_crashes]}" "${flag[setup]}")
job+=("${flag[python]}" "${main[@]}")
call sbatch "${options[@]}" "${list_sbatch_flag[@]}" "$here/slurm_job.sh" "${job[@]}"
if [[ ${flag[dry_run]} == yes ]]; then
  SLURM_JOB_ID=JOB SLURM_CPUS_PER_TASK=${flag[cpus]#0} \
    foresee bash "$here/slurm_job.sh" --dry_run "${job[@]}"
fi
