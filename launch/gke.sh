#!/usr/bin/env bash
# A run on GKE or another Kubernetes cluster: one pod a host, as a JobSet or an Indexed Job.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'END'
Runs python -m bsce_jax.main on the hosts of a Kubernetes cluster.

    launch/gke.sh COMMAND [flags] -- ARGUMENTS OF bsce_jax.main
    launch/gke.sh apply --name run --image IMAGE --hosts 2 --gpu_type nvidia-tesla-a100 \
        --gpus 4 --data_bucket my-bucket --workdir gs://my-bucket/run \
        -- --config configs/imagenet.py:method=il_baseline
    launch/gke.sh print --name run --image IMAGE --hosts 2 --tpu_type tpu-v5-lite-podslice \
        --topology 2x4 --workdir gs://my-bucket/run \
        -- --config configs/imagenet.py:method=il_baseline

Commands:
  print    writes the manifest to standard output
  apply    gives it to kubectl
  delete   deletes what apply made (--name, --kind, --namespace)

A host that is lost restarts all of them; they go on from the checkpoints. Hosts that are
taken away do not count against --max_restarts. Exit status 2, a wrong argument of the run,
is not tried again.

Tested with a stand-in for kubectl; it has met no real cluster yet.

  --name NAME          of the job
  --namespace NAME     (kubectl's)
  --kind KIND          jobset (needs the JobSet controller, 0.10.1 or later) or job (jobset)
  --image IMAGE        with the project installed and its folder as working directory
  --hosts N            pods (1)
  --gpu_type NAME      such as nvidia-h100-80gb
  --gpus N             of each host (8)
  --tpu_type NAME      instead: such as tpu-v5-lite-podslice, tpu-v4-podslice, tpu-v6e-slice
  --topology AxB[xC]   of the TPU slice, such as 2x4: all its chips, --hosts x --chips
  --chips N            TPU chips of each host (4)
  --spot               on Spot VMs, which end within some 25 seconds of notice
  --workdir DIR        the run's folder: gs://BUCKET/PATH, or on a volume of all hosts
  --data_bucket NAME   Cloud Storage bucket with the data sets, mounted at --data_dir
  --claim NAME         instead: a PersistentVolumeClaim, mounted read-only
  --data_dir DIR       where the data sets are (/data with a bucket or claim)
  --service_account N  of Kubernetes, with access to the bucket
  --memory SIZE        of each host, such as 400Gi
  --port N             of the coordinator, on GPUs (8476)
  --grace_seconds N    time to save (120)
  --max_restarts N     after crashes (5)
  --dry_run            print the commands
END
}

define name ''
define namespace ''
define kind jobset
define image ''
define hosts 1
define gpu_type ''
define gpus 8
define tpu_type ''
define topology ''
define chips 4
define spot no switch
define workdir ''
define data_bucket ''
define claim ''
define data_dir ''
define service_account ''
define memory ''
define port 8476
define grace_seconds 120
define max_restarts 5
define dry_run no switch

check_flags() { # COMMAND
  need name
  check_name name 40 # the names of pods have more parts
  check_name namespace 63
  check_choice kind jobset job
  [[ $1 != delete ]] || return 0
  need image workdir
  check_number hosts 1 10000
  check_number gpus 1 64
  check_number chips 1 64
  check_number port 1024 65535
  check_number grace_seconds 1 86400
  check_number max_restarts 0 100000
  check_pattern data_bucket '^[a-z0-9][-_.a-z0-9]+$' "a bucket's name, without gs://"
  check_pattern memory '^[0-9]+(Mi|Gi|Ti)$' "a size such as 400Gi"
  check_pattern topology '^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}$' \
    "a topology such as 4x4 or 2x2x4"
  check_pattern data_dir '^/' "an absolute path"
  [[ -n ${flag[gpu_type]} || -n ${flag[tpu_type]} ]] ||
    die "--gpu_type or --tpu_type is missing: see --help"
  [[ -z ${flag[gpu_type]} || -z ${flag[tpu_type]} ]] ||
    die "--tpu_type='${flag[tpu_type]}': expected none beside --gpu_type"
  if [[ -n ${flag[tpu_type]} ]]; then
    need topology
    local chips=$((flag[hosts] * flag[chips]))
    ((${flag[topology]//x/*} == chips)) ||
      die "--topology='${flag[topology]}': expected one of --hosts x --chips = $chips chips"
  fi
  [[ -z ${flag[data_bucket]} || -z ${flag[claim]} ]] ||
    die "--claim='${flag[claim]}': expected none beside --data_bucket"
  if [[ -n ${flag[data_bucket]}${flag[claim]} && -z ${flag[data_dir]} ]]; then
    flag[data_dir]=/data
  fi
  check_arguments
}

text() { # VALUE: a string of YAML, which has those of JSON
  local value=$1 result='' i char code
  for ((i = 0; i < ${#value}; i++)); do
    char=${value:i:1}
    case $char in
      '"' | \\) result+="\\$char" ;;
      [[:cntrl:]])
        printf -v code '\\u%04x' "'$char"
        result+=$code
        ;;
      *) result+=$char ;;
    esac
  done
  printf '"%s"' "$result"
}

literal() { # VALUE: Kubernetes replaces $(NAME) in arguments, and $$ by $
  text "${1//\$/\$\$}"
}

container_command() { # a line an argument
  local word
  run_arguments
  for word in python "${main[@]}"; do
    printf -- '- %s\n' "$(literal "$word")"
  done
  # On TPUs GKE tells each process where the others are.
  if [[ -n ${flag[gpu_type]} ]] && ((flag[hosts] > 1)); then
    printf -- '- "--coordinator_address=%s:%s"\n' "$coordinator" "${flag[port]}"
    printf -- '- "--num_processes=%s"\n' "${flag[hosts]}"
    # shellcheck disable=SC2016  # Kubernetes puts the value in
    printf -- '- "--process_id=$(JOB_COMPLETION_INDEX)"\n'
  fi
}

limits() {
  if [[ -n ${flag[gpu_type]} ]]; then
    printf 'nvidia.com/gpu: %s\n' "${flag[gpus]}"
  else
    printf 'google.com/tpu: %s\n' "${flag[chips]}"
  fi
  [[ -z ${flag[memory]} ]] || printf 'memory: %s\n' "${flag[memory]}"
}

node_selector() {
  if [[ -n ${flag[gpu_type]} ]]; then
    printf 'cloud.google.com/gke-accelerator: %s\n' "$(text "${flag[gpu_type]}")"
  else
    printf 'cloud.google.com/gke-tpu-accelerator: %s\n' "$(text "${flag[tpu_type]}")"
    printf 'cloud.google.com/gke-tpu-topology: %s\n' "$(text "${flag[topology]}")"
  fi
  [[ ${flag[spot]} == no ]] || printf 'cloud.google.com/gke-spot: "true"\n'
}

tolerations() {
  local key
  for key in nvidia.com/gpu google.com/tpu; do
    printf -- '- key: %s\n  operator: Exists\n  effect: NoSchedule\n' "$key"
  done
  [[ ${flag[spot]} == no ]] || cat <<'END'
- key: cloud.google.com/gke-spot
  operator: Equal
  value: "true"
  effect: NoSchedule
END
}

mounts() {
  printf -- '- name: shm\n  mountPath: /dev/shm\n'
  [[ -z ${flag[data_bucket]}${flag[claim]} ]] ||
    printf -- '- name: data\n  mountPath: %s\n  readOnly: true\n' "$(text "${flag[data_dir]}")"
}

volumes() { # decoding processes and NCCL need more shared memory than a pod has
  printf -- '- name: shm\n  emptyDir:\n    medium: Memory\n'
  if [[ -n ${flag[data_bucket]} ]]; then
    cat <<END
- name: data
  csi:
    driver: gcsfuse.csi.storage.gke.io
    readOnly: true
    volumeAttributes:
      bucketName: $(text "${flag[data_bucket]}")
      mountOptions: implicit-dirs
END
  elif [[ -n ${flag[claim]} ]]; then
    cat <<END
- name: data
  persistentVolumeClaim:
    claimName: $(text "${flag[claim]}")
    readOnly: true
END
  fi
}

pod() {
  [[ -z ${flag[data_bucket]} ]] ||
    printf 'metadata:\n  annotations:\n    gke-gcsfuse/volumes: "true"\n'
  printf 'spec:\n'
  [[ ${flag[kind]} != job ]] || printf '  subdomain: %s\n' "${flag[name]}"
  [[ -z ${flag[service_account]} ]] ||
    printf '  serviceAccountName: %s\n' "$(text "${flag[service_account]}")"
  cat <<END
  restartPolicy: Never
  terminationGracePeriodSeconds: ${flag[grace_seconds]}
  nodeSelector:
$(node_selector | indent 4)
  tolerations:
$(tolerations | indent 2)
  containers:
  - name: main
    image: $(text "${flag[image]}")
    command:
$(container_command | indent 4)
    resources:
      limits:
$(limits | indent 8)
    volumeMounts:
$(mounts | indent 4)
  volumes:
$(volumes | indent 2)
END
}

rule() { # ACTION STATUS: of podFailurePolicy
  cat <<END
- action: $1
  onExitCodes:
    containerName: main
    operator: In
    values: [$2]
END
}

job_spec() {
  # Where one host is lost the others end with status 3, and Kubernetes may see them first.
  # So a crash is as many failures as hosts; with fewer the cause is still to come.
  local restarts=0 action=FailJob
  if [[ ${flag[kind]} == job ]]; then # it makes each pod anew, also after a disruption
    restarts=${flag[max_restarts]} action=Ignore
  fi
  cat <<END
completionMode: Indexed
completions: ${flag[hosts]}
parallelism: ${flag[hosts]}
backoffLimit: $(((restarts + 1) * flag[hosts] - 1))
podFailurePolicy:
  rules:
$(rule FailJob 2 | indent 2)
  - action: $action
    onPodConditions:
    - type: DisruptionTarget
      status: "True"
$(rule $action 143 | indent 2)
template:
$(pod | indent 2)
END
}

metadata() {
  printf 'metadata:\n  name: %s\n' "${flag[name]}"
  [[ -z ${flag[namespace]} ]] || printf '  namespace: %s\n' "${flag[namespace]}"
}

manifest() {
  if [[ ${flag[kind]} == job ]]; then
    coordinator=${flag[name]}-0.${flag[name]}
    cat <<END
apiVersion: v1
kind: Service
$(metadata)
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    job-name: ${flag[name]}
---
apiVersion: batch/v1
kind: Job
$(metadata)
spec:
$(job_spec | indent 2)
END
    return
  fi
  coordinator=${flag[name]}-host-0-0.${flag[name]}
  printf 'apiVersion: jobset.x-k8s.io/v1alpha2\nkind: JobSet\n%s\n' "$(metadata)"
  [[ -z ${flag[tpu_type]} ]] || cat <<'END'
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
END
  cat <<END
spec:
  failurePolicy:
    maxRestarts: ${flag[max_restarts]}
    rules:
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
      onJobFailureMessagePatterns: ["exit code 2 matching"]
    - action: RestartJobSetAndIgnoreMaxRestarts # disrupted, or saved
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: host
    replicas: 1
    template:
      spec:
$(job_spec | indent 8)
END
}

indent() { # COLUMNS
  local spaces
  printf -v spaces '%*s' "$1" ''
  sed "s/^/$spaces/"
}

apply() {
  if [[ ${flag[dry_run]} == yes ]]; then
    printf '%s | kubectl apply --filename=-\n' "$(quote "$0" print "${given[@]}")"
  else
    manifest | kubectl apply --filename=-
  fi
}

delete() {
  local space=() kinds=jobset
  [[ -z ${flag[namespace]} ]] || space=("--namespace=${flag[namespace]}")
  [[ ${flag[kind]} != job ]] || kinds=job,service
  call kubectl delete "$kinds" "${flag[name]}" "${space[@]}"
}

command=${1:-}
shift || true
case $command in
  print | apply | delete) ;;
  -h | --help) usage && exit 0 ;;
  '') die "the command is missing: expected one of print apply delete" ;;
  *) die "$command: unknown command, expected one of print apply delete" ;;
esac
parse_flags "$@"
check_flags "$command"
given=() past=no # without --dry_run, for a dry run's line
for word; do
  [[ $word != -- ]] || past=yes
  [[ $word == --dry_run && $past == no ]] || given+=("$word")
done
if [[ $command == print ]]; then
  manifest
else
  "$command"
fi
