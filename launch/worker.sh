#!/usr/bin/env bash
# What tpu_vm.sh and queued_resource.sh do on a worker; the repository is in ~/lm.
#
#   bash lm/launch/worker.sh setup [MOUNT]   installs lm, mounts gs://BUCKET or HOST:/PATH
#   bash lm/launch/worker.sh start FLAGS     starts main.py, which outlives the connection
#   bash lm/launch/worker.sh ensure FLAGS    the same, unless it is running
#   bash lm/launch/worker.sh status          prints "lm-run: none|running|done|stopped|failed CODE"
#   bash lm/launch/worker.sh log             follows its output
#   bash lm/launch/worker.sh stop            lets it save and end
set -euo pipefail

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ENVIRONMENT=$HOME/lm-env
RUN=$HOME/lm-run # pid, log, exit code
MOUNTED=${MOUNTED:-/mnt/lm}
TRY_AGAIN=75 # main.py's exit code when another worker was lost, or it was told to stop

setup() {
    local uv=$HOME/.local/bin/uv
    # The images' own Python is older than lm needs; uv brings one.
    [[ -x $uv ]] || curl -LsSf https://astral.sh/uv/install.sh | sh
    "$uv" venv --quiet --allow-existing --python 3.12 "$ENVIRONMENT"
    "$uv" pip install --quiet --python "$ENVIRONMENT/bin/python" -e "${REPOSITORY}[tpu,data]"
    [[ -z ${1:-} ]] || mount_shared "$1"
}

mount_shared() {
    if mountpoint -q "$MOUNTED"; then
        return
    fi
    sudo mkdir -p "$MOUNTED"
    case $1 in
        gs://*)
            if ! command -v gcsfuse >/dev/null; then
                local site=https://packages.cloud.google.com/apt key=/usr/share/keyrings/gcsfuse.asc
                curl -fsS "$site/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
                echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -c -s) main" |
                    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
                sudo apt-get update --quiet
                sudo apt-get install --quiet --yes gcsfuse
            fi
            sudo chown "$(id -u):$(id -g)" "$MOUNTED"
            # Checkpoints are directories that get their name when they are whole.
            gcsfuse --implicit-dirs --rename-dir-limit=1000000 "${1#gs://}" "$MOUNTED"
            ;;
        *)
            command -v mount.nfs >/dev/null || sudo apt-get install --quiet --yes nfs-common
            sudo mount -t nfs "$1" "$MOUNTED"
            ;;
    esac
}

status() {
    if [[ -e $RUN/exit ]]; then
        local code
        code=$(<"$RUN/exit")
        case $code in
            0) echo "lm-run: done" ;;
            "$TRY_AGAIN") echo "lm-run: stopped" ;;
            *) echo "lm-run: failed $code" ;;
        esac
    elif [[ -e $RUN/pid ]] && kill -0 "$(<"$RUN/pid")" 2>/dev/null; then
        echo "lm-run: running"
    else
        echo "lm-run: none"
    fi
}

start() {
    [[ $(status) != "lm-run: running" ]] || {
        echo "worker.sh: a run is under way here; stop it first" >&2
        exit 2
    }
    mkdir -p "$RUN"
    rm -f "$RUN/exit" "$RUN/stop"
    # A session of its own: the end of this connection does not reach it.
    setsid nohup bash "${BASH_SOURCE[0]}" attempts "$@" >>"$RUN/log" 2>&1 </dev/null &
    echo $! >"$RUN/pid"
}

ensure() {
    [[ $(status) == "lm-run: running" ]] || start "$@"
}

# Runs main.py again for as long as that is what it asks for, and leaves its last exit code.
attempts() {
    local code child seen signals=0 delay=${DELAY:-5}
    cd "$REPOSITORY"
    if [[ -z ${LM_CACHE_DIR:-} ]] && mountpoint -q "$MOUNTED"; then
        export LM_CACHE_DIR=$MOUNTED/tokens
    fi
    while true; do
        "$ENVIRONMENT/bin/python" main.py "$@" &
        child=$!
        trap 'signals=$((signals + 1)); kill -TERM "$child" 2>/dev/null || true' TERM
        # A signal ends `wait` before the child has ended: wait until none came in between.
        seen=-1
        while [[ $seen != "$signals" ]]; do
            seen=$signals
            code=0
            wait "$child" || code=$?
        done
        [[ $code == "$TRY_AGAIN" && ! -e $RUN/stop ]] || break
        echo "worker.sh: starting again in $delay s"
        sleep "$delay"
        delay=$((delay * 2 < 60 ? delay * 2 : 60))
    done
    echo "$code" >"$RUN/exit"
}

stop() {
    if [[ $(status) == "lm-run: running" ]]; then
        touch "$RUN/stop"
        kill -TERM "$(<"$RUN/pid")"
    fi
}

log() {
    tail -n 200 -F "$RUN/log" | sed -u "s/^/$(hostname): /"
}

case ${1:-} in
    setup | start | ensure | status | stop | log | attempts) "$@" ;;
    *)
        echo "worker.sh: command '${1:-}' is not one of setup start ensure status stop log" >&2
        exit 2
        ;;
esac
