# shellcheck shell=bash
# What the launch scripts share: flags, their checks, and commands that a dry run prints.
#
# A script declares its flags with `define`, then calls `parse_flags "$@"`; the values are
# in the array `flag`, what stands after -- in `arguments`. It has a function `usage`.

declare -A flag=() kind=()
declare -a names=() arguments=()

die() { # MESSAGE: one line, and the exit status of a user error
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

define() { # NAME DEFAULT [switch|list]: a list's values go to the array list_NAME
  names+=("$1")
  flag[$1]=$2 kind[$1]=${3:-value}
}

known() { # NAME
  local name
  for name in "${names[@]}"; do
    [[ $name != "$1" ]] || return 0
  done
  return 1
}

parse_flags() { # ARGUMENTS...: --flag value, --flag=value, --switch, -- and the rest
  local name value
  while (($#)); do
    case $1 in
      --) arguments=("${@:2}") && return ;;
      -h | --help) usage && exit 0 ;;
      --*) name=${1#--} name=${name%%=*} ;;
      *) die "$1: expected a flag, or -- before the arguments of bsce_jax.main" ;;
    esac
    known "$name" || die "--$name: unknown flag, expected one of ${names[*]/#/--}"
    if [[ ${kind[$name]} == switch ]]; then
      [[ $1 != *=* ]] || die "--$name: expected no value, got '${1#*=}'"
      value=yes
    elif [[ $1 == *=* ]]; then
      value=${1#*=}
    else
      (($# > 1)) && [[ $2 != -- ]] || die "--$name: the value is missing"
      value=$2
      shift
    fi
    if [[ ${kind[$name]} == list ]]; then
      local -n values=list_$name
      values+=("$value")
    else
      flag[$name]=$value
    fi
    shift
  done
}

need() { # NAME...: flags that must have a value
  local name
  for name; do
    [[ -n ${flag[$name]} ]] || die "--$name is missing: see --help"
  done
}

check_number() { # NAME LOW HIGH
  local value=${flag[$1]}
  if [[ ! $value =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((value < $2 || value > $3)); then
    die "--$1='$value': expected a whole number from $2 to $3"
  fi
}

check_choice() { # NAME VALUE...
  local value=${flag[$1]} allowed
  for allowed in "${@:2}"; do
    [[ $value != "$allowed" ]] || return 0
  done
  die "--$1='$value': expected one of ${*:2}"
}

check_pattern() { # NAME PATTERN MEANING: an empty value passes
  local value=${flag[$1]}
  [[ -z $value || $value =~ $2 ]] || die "--$1='$value': expected $3"
}

check_name() { # NAME LENGTH: as Google Cloud and Kubernetes want them
  check_pattern "$1" "^[a-z]([-a-z0-9]{0,$(($2 - 2))}[a-z0-9])?\$" \
    "at most $2 lower-case letters, digits and '-', the first a letter"
}

check_file() { # NAME
  [[ -z ${flag[$1]} || -f ${flag[$1]} ]] || die "--$1='${flag[$1]}': no such file"
}

check_arguments() { # those of bsce_jax.main
  ((${#arguments[@]})) ||
    die "nothing after --: expected arguments of bsce_jax.main, such as --config FILE"
  local argument
  for argument in "${arguments[@]}"; do
    [[ $argument != --workdir && $argument != --workdir=* ]] ||
      die "$argument after --: give --workdir before it"
  done
}

run_arguments() { # sets `main` to the arguments of python; all hosts get the same
  main=(-m bsce_jax.main)
  [[ -z ${flag[workdir]} ]] || main+=("--workdir=${flag[workdir]}")
  [[ -z ${flag[data_dir]} ]] || main+=("--config.data.data_dir=${flag[data_dir]}")
  main+=("${arguments[@]}")
}

quote() { # WORD...: one line that the shell reads as these words
  local word line='' single="'\\''"
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      line+=" $word"
    elif [[ $word =~ [[:cntrl:]] ]]; then
      line+=" ${word@Q}"
    else
      line+=" '${word//\'/$single}'"
    fi
  done
  printf '%s' "${line# }"
}

call() { # COMMAND...: runs it, or in a dry run prints it
  if [[ ${flag[dry_run]} == yes ]]; then
    printf '%s\n' "$(quote "$@")" >&3
  else
    "$@" 3>&-
  fi
}

query() { # ANSWER COMMAND...: as call; a dry run goes on with this answer
  if [[ ${flag[dry_run]} == yes ]]; then
    call "${@:2}"
    printf '%s\n' "$1"
  else
    "${@:2}" 3>&-
  fi
}

note() { # TEXT...: a comment among a dry run's commands, else a log line
  if [[ ${flag[dry_run]} == yes ]]; then
    printf '# %s\n' "$*" >&3
  else
    printf '%(%H:%M:%S)T %s: %s\n' -1 "${0##*/}" "$*" >&2
  fi
}

foresee() { # COMMAND...: what another script's dry run prints, as comments
  local line
  "$@" | while IFS= read -r line; do note "  $line"; done
}

exec 3>&1 # the dry run's commands, also from within $(...)
