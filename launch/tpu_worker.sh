#!/usr/bin/env bash
# What tpu_pod.sh does on a worker of the pod: it copies this file there and calls it.
#
#   tpu_worker.sh install PYTHON SOURCE REF       environment and project, in ~/bsce_jax
#   tpu_worker.sh mount disk|bucket BUCKET DIR    the data sets, read-only
#   tpu_worker.sh start GRACE COMMAND...          in the project, in the background
#   tpu_worker.sh status | stop GRACE | log LINES
#   tpu_worker.sh --dry_run install|mount|start ...    prints what a new worker would run
set -euo pipefail

call() { # COMMAND...
  "$@"
}

query() { # ANSWER COMMAND...: the answer is for a dry run
  "${@:2}"
}

dry=no
if [[ ${1:-} == --dry_run ]]; then # beside tpu_pod.sh: these two print the command
  # shellcheck source-path=SCRIPTDIR source=common.sh
  source "$(dirname "$0")/common.sh"
  dry=yes flag[dry_run]=yes
  shift
fi
script=$(cd "$(dirname "$0")" && pwd)/${0##*/}
project=$HOME/bsce_jax/project run=$HOME/bsce_jax/run
PATH=$HOME/.local/bin:$PATH # where pip puts uv
if [[ $dry == no ]]; then
  mkdir -p "$project" "$run"
  cd "$project"
fi

has() { # COMMAND: a new worker has not
  [[ $dry == no ]] && command -v "$1" >/dev/null
}

install() { # PYTHON SOURCE REF: SOURCE is a git URL, or a wheel's name in the project
  local python=$1 source=$2 ref=$3 wanted='.[tpu,gcs]'
  # The images' own Python is too old.
  has uv || call python3 -m pip install --quiet --user uv
  if [[ $source == *.whl ]]; then
    wanted="./${source}[tpu,gcs]"
  else
    call git init --quiet
    call git fetch --quiet --depth=1 "$source" "$ref"
    call git checkout --quiet --force FETCH_HEAD
  fi
  call uv venv --quiet --allow-existing --python "$python" ../env
  call uv pip install --quiet --python ../env/bin/python \
    --constraint constraints.txt "$wanted"
}

mount_data() { # disk|bucket BUCKET DIR
  local how=$1 bucket=$2 folder=$3 device
  [[ $dry == yes ]] || ! mountpoint --quiet "$folder" || return 0
  call sudo mkdir -p "$folder"
  if [[ $how == disk ]]; then
    # Its name differs between machine types: it is the ext4 that nothing has mounted.
    device=$(query '/dev/DISK ext4' lsblk --noheadings --raw --paths \
      --output NAME,FSTYPE,MOUNTPOINT |
      awk '$2 == "ext4" && $3 == "" && !found++ { print $1 }')
    [[ -n $device ]] || { echo "no disk with an ext4 file system to mount" >&2 && exit 1; }
    call sudo mount -o ro,noload "$device" "$folder"
  else
    has gcsfuse || install_gcsfuse
    call sudo chmod a+w "$folder" # else a user may not mount there
    call gcsfuse --implicit-dirs -o ro "$bucket" "$folder"
  fi
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc url=https://packages.cloud.google.com/apt
  local apt=(sudo apt-get -qq -o DPkg::Lock::Timeout=300) release # a new VM upgrades itself
  release=$(query RELEASE lsb_release -cs)
  call sudo curl --fail --silent --show-error --output "$key" "$url/doc/apt-key.gpg"
  call sudo sh -c "echo 'deb [signed-by=$key] $url gcsfuse-$release main' \
>/etc/apt/sources.list.d/gcsfuse.list"
  call "${apt[@]}" update
  call "${apt[@]}" install -y gcsfuse
}

running() { # a program that was started, and has not ended, holds the lock
  [[ -e $run/lock ]] && ! flock --nonblock "$run/lock" true
}

start() { # GRACE COMMAND...
  if [[ $dry == yes ]]; then
    call "${@:2}"
    return
  fi
  end_program "$1"
  rm -f "$run/status" "$run/stopped"
  touch "$run/started"
  setsid "$BASH" "$script" supervise "${@:2}" >>"$run/log" 2>&1 </dev/null &
  disown
  local look
  for ((look = 0; look < 100; look++)); do # else `status` could say "lost"
    running || [[ -e $run/status ]] && break
    sleep 0.1
  done
}

supervise() { # COMMAND...: keeps the exit status; the program itself must not inherit 9
  exec 9>"$run/lock"
  flock --timeout 10 9
  local status=0
  "$@" 9>&- &
  echo "$!" >"$run/pid"
  wait "$!" || status=$?
  printf '%s\n' "$status" >"$run/status.new"
  mv "$run/status.new" "$run/status"
}

end_program() { # GRACE: SIGTERM, which saves; SIGKILL to it and its children after GRACE
  local pid second
  running || return 0
  pid=$(<"$run/pid")
  kill -s TERM "$pid" 2>/dev/null || true
  for ((second = 0; second < $1; second++)); do
    running || return 0
    sleep 1
  done
  kill -s KILL -- "-$(ps -o pgid= -p "$pid" | tr -d ' ')" 2>/dev/null || true
  echo 137 >"$run/status"
}

status() { # one line: running, an exit status, stopped, lost (the machine restarted), none
  local state=none
  if running; then
    state=running
  elif [[ -e $run/stopped ]]; then
    state=stopped
  elif [[ -e $run/status ]]; then
    state=$(<"$run/status")
  elif [[ -e $run/started ]]; then
    state=lost
  fi
  printf 'bsce_jax_status %s %s\n' "$(hostname)" "$state"
}

stop() { # GRACE
  touch "$run/stopped"
  end_program "$1"
}

log() { # LINES
  printf '== %s\n' "$(hostname)"
  [[ ! -e $run/log ]] || tail -n "$1" "$run/log"
}

case ${1:-} in
  install | start) "$@" ;;
  mount) mount_data "${@:2}" ;;
  supervise | status | stop | log) [[ $dry == yes ]] || "$@" ;;
  *) sed -n '2,/^set/s/^# \{0,1\}//p' "$script" && exit 2 ;;
esac
