# shellcheck shell=bash
# What the scripts for Google Cloud share: how they read options, run commands and print them.

# shellcheck disable=SC2034 # for the scripts that source this one
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SCRIPT=launch/$(basename "$0")
# shellcheck disable=SC2034
MOUNTED=/mnt/lm # where the machines of a run see its storage
exec 3>&1 # commands of a dry run go here, also from inside $(…)

fail() {
    printf '%s: %s\n' "$SCRIPT" "$*" >&2
    exit 2
}

say() {
    printf '%s: %s\n' "$SCRIPT" "$*" >&2
}

# Prints the comment at the top of the script, which is its manual.
manual() {
    awk 'NR > 1 && /^#/ { sub(/^# ?/, ""); print; next } NR > 1 { exit }' "$0"
    exit 0
}

# The arguments as one line that a shell reads as the same arguments.
quoted() {
    local argument line=()
    for argument in "$@"; do
        if [[ $argument =~ ^[A-Za-z0-9_./:=@%+,~-]+$ ]]; then
            line+=("$argument")
        else
            line+=("${argument@Q}")
        fi
    done
    printf '%s\n' "${line[*]}"
}

# Runs a command, or prints it in a dry run.
run() {
    if [[ $DRY_RUN == 1 ]]; then
        quoted "$@" >&3
    else
        "$@"
    fi
}

# `ask ANSWER command…`: what the command prints; in a dry run, prints it and answers ANSWER.
ask() {
    local answer=$1
    shift
    if [[ $DRY_RUN == 1 ]]; then
        quoted "$@" >&3
        printf '%s\n' "$answer"
    else
        "$@"
    fi
}

# `allow FLAG VALUE PATTERN WHAT`
allow() {
    [[ $2 =~ ^($3)$ ]] || fail "--$1='$2' must be $4"
}

# `read_options argument…`: every option of OPTIONS (`--NAME=VALUE`; an entry may say its default,
# `NAME=DEFAULT`) and of SWITCHES (`--NAME`, for 1 instead of 0) into the variable of its name in
# capitals, which the environment may set as well; then COMMAND, one of COMMANDS, and the REST.
# shellcheck disable=SC2153 # the script that sources this one sets COMMANDS, OPTIONS and SWITCHES
read_options() {
    local entry into usage defaults=("${SWITCHES[@]/%/=0}")
    for entry in "${OPTIONS[@]}" "${defaults[@]}"; do
        into=$(variable "${entry%%=*}")
        [[ $entry == *=* ]] || entry+='='
        printf -v "$into" %s "${!into:-${entry#*=}}"
    done
    usage=$(printf -- '--%s= ' "${OPTIONS[@]%%=*}"; printf -- '--%s ' "${SWITCHES[@]}" help)
    while [[ $# -gt 0 && $1 == --* ]]; do
        [[ $1 != --help ]] || manual
        into=$(variable "${1%%=*}")
        if [[ " $usage" == *" ${1%%=*}= "* && $1 == *=* ]]; then
            printf -v "$into" %s "${1#*=}"
        elif [[ " $usage" == *" $1 "* && $1 != *' '* ]]; then
            printf -v "$into" 1
        else
            fail "'$1' is not one of ${usage% }, which come before the command"
        fi
        shift
    done
    COMMAND=${1:-}
    [[ $# -eq 0 ]] || shift
    REST=("$@")
    [[ " $COMMANDS " == *" ${COMMAND:-?} "* ]] || fail "command '$COMMAND' is not one of $COMMANDS"
}

# The variable of an option: MAX_RESTARTS of max-restarts, with its dashes before it or without.
variable() {
    local capitals=${1#--}
    capitals=${capitals^^}
    printf '%s' "${capitals//-/_}"
}
