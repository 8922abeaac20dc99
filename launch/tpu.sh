# shellcheck shell=bash
# What tpu_vm.sh and queued_resource.sh share. Each of them defines
#
#   create_tpu          asks for the machine
#   tpu_state ANSWER    prints ready, waiting, dead, absent or unknown; in a dry run, ANSWER
#   delete_tpu          gives it back
#
# and COMMANDS, the words main knows. The repository goes to ~/lm of every worker; worker.sh does
# there what must be done there.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# shellcheck disable=SC2034 # read_options reads them
OPTIONS=(name zone type version project mount)
# shellcheck disable=SC2034
SWITCHES=(spot reserved dry-run)
POLL=${POLL:-60} # seconds between looks at a machine or a run

nap() {
    run sleep "$1"
}

check_options() {
    allow name "$NAME" '[a-z]([-a-z0-9]{0,61}[a-z0-9])?' \
        "lower-case letters, digits and dashes, such as lm-1"
    allow zone "$ZONE" '[a-z]+-[a-z]+[0-9]+-[a-z]' "a Google Cloud zone, such as us-east5-a"
    allow project "$PROJECT" '([a-z][-a-z0-9:.]*)?' "a Google Cloud project, or empty for gcloud's own"
    allow mount "$MOUNT" '|gs://[a-z0-9][-._a-z0-9]+|[^/:]+:/.*' "gs://BUCKET, HOST:/PATH (NFS), or empty"
    [[ $SPOT$RESERVED != 11 ]] || fail "--spot and --reserved exclude each other"
    PLACE=(--zone="$ZONE")
    [[ -z $PROJECT ]] || PLACE+=(--project="$PROJECT")
    case $COMMAND in
        create | resume)
            allow type "$TYPE" 'v[0-9]+[a-z]*-[0-9]+' \
                "an accelerator type, such as v5p-128, v6e-16 or v5litepod-8"
            VERSION=${VERSION:-$(default_version)}
            ;;
    esac
    TIER=()
    [[ $SPOT == 0 ]] || TIER+=(--spot)
    [[ $RESERVED == 0 ]] || TIER+=(--reserved)
}

# The software a kind of TPU starts with.
default_version() {
    case $TYPE in
        v5p-*) echo v2-alpha-tpuv5 ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
        *) fail "--version='' must name the software of --type='$TYPE', such as v2-alpha-tpuv6e" ;;
    esac
}

# `on_workers WORKERS command…`: the command on all workers, or on that of a number.
on_workers() {
    local workers=$1
    shift
    run gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" --worker="$workers" \
        --command="$(quoted "$@")"
}

copy() {
    local archive=${TMPDIR:-/tmp}/$NAME.tar.gz
    run tar --create --gzip --file="$archive" --directory="$REPOSITORY" \
        --anchored --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=./data \
        --no-anchored --exclude=__pycache__ --exclude='*.egg-info' . &&
    run gcloud compute tpus tpu-vm scp "$archive" "$NAME:lm.tar.gz" "${PLACE[@]}" --worker=all &&
    run gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" --worker=all \
        --command='rm -rf lm && mkdir lm && tar -xzf lm.tar.gz -C lm'
}

setup() {
    on_workers all bash lm/launch/worker.sh setup "$MOUNT"
}

# The flags of main.py for `CONFIG [flag…]`, into FLAGS.
read_run() {
    local config=${1:-} flag workdir=
    [[ -n $config ]] || fail "$COMMAND needs a config, such as configs/quickstart.py"
    [[ -f $REPOSITORY/$config ]] || fail "$COMMAND: config '$config' is not a file in $REPOSITORY"
    shift
    for flag in "$@"; do
        [[ $flag == --* ]] || fail "$COMMAND: '$flag' is not a flag: write --config.FIELD=VALUE"
        [[ $flag != --workdir=* ]] || workdir=${flag#*=}
    done
    [[ $workdir != *://* ]] || fail "$COMMAND: --workdir='$workdir' must be a directory that all" \
        "workers see: give --mount=gs://BUCKET and --workdir=$MOUNTED/NAME"
    FLAGS=(--config="$config" "$@")
    if [[ -z $workdir && -n $MOUNT ]]; then
        FLAGS+=(--workdir="$MOUNTED/runs/$(basename "$config" .py)")
    fi
}

start() {
    on_workers all bash lm/launch/worker.sh "${1:-start}" "${FLAGS[@]}"
}

# `progress ANSWER`: done, running, stopped, none, "failed CODE" or unknown, of all workers
# together; partly, where some of them run and others do not.
progress() {
    local answers
    answers=$(ask "lm-run: $1" gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" \
        --worker=all --command='bash lm/launch/worker.sh status || echo lm-run: none') ||
        answers=
    if grep -qx 'lm-run: none' <<<"$answers" && grep -qx 'lm-run: running' <<<"$answers"; then
        echo partly
        return
    fi
    local word
    for word in 'failed [0-9]*' stopped running none 'done'; do
        if grep -qx "lm-run: $word" <<<"$answers"; then
            grep -x "lm-run: $word" <<<"$answers" | head -n 1 | cut -d ' ' -f 2-
            return
        fi
    done
    echo unknown
}

status() {
    local state
    state=$(tpu_state ready)
    printf 'machine: %s\n' "$state"
    [[ $state != ready ]] || printf 'run: %s\n' "$(progress running)"
}

# Until the run ends: looks at the machine and the run, and brings back what is lost.
resume() {
    local state lost=dead word=none delay=$POLL
    while true; do
        state=$(tpu_state "$lost")
        say "machine: $state"
        case $state in
            ready)
                word=$(progress "$word")
                say "run: $word"
                case $word in
                    'done') return 0 ;;
                    failed*) fail "the run failed with code ${word#failed }; see: $SCRIPT logs" ;;
                    stopped) fail "the run was stopped; start it again: $SCRIPT run" ;;
                    # A worker was started anew: its files are there, its mounts and programs not.
                    partly)
                        if setup; then
                            start ensure || true
                        fi
                        ;;
                    none)
                        if copy && setup && start; then
                            delay=$POLL
                        fi
                        ;;
                esac
                nap "$delay"
                [[ $DRY_RUN == 0 ]] || word='done'
                ;;
            dead | absent)
                [[ $state == absent ]] || delete_tpu || say "the old machine is not deleted yet"
                if ! create_tpu; then
                    say "no machine yet; next try in $delay s"
                    nap "$delay"
                    delay=$((delay * 2 < 900 ? delay * 2 : 900))
                fi
                lost=ready
                ;;
            *) nap "$POLL" ;;
        esac
    done
}

# `look describe-command…`: a field of the machine, `absent` where there is none, or `unknown`.
look() {
    local answer error
    error=$(mktemp)
    if answer=$("$@" 2>"$error"); then
        printf '%s\n' "${answer:-unknown}"
    elif grep -qiE 'NOT_FOUND|not found' "$error"; then
        echo absent
    else
        cat "$error" >&2
        echo unknown
    fi
    rm -f "$error"
}

main() {
    read_options "$@"
    check_options
    set -- ${REST[@]+"${REST[@]}"}
    case $COMMAND in
        run | resume) read_run "$@" ;;
        logs) allow worker "${1:-all}" 'all|[0-9]+' "a worker's number, or all" ;;
        *) [[ $# -eq 0 ]] || fail "$COMMAND takes no arguments, not '$1'" ;;
    esac
    case $COMMAND in
        create) create_tpu ;;
        copy) copy ;;
        setup) setup ;;
        run) start ;;
        logs) on_workers "${1:-all}" bash lm/launch/worker.sh log ;;
        status) status ;;
        stop) on_workers all bash lm/launch/worker.sh stop ;;
        resume) resume ;;
        delete) delete_tpu ;;
        *) "$COMMAND" ;;
    esac
}
