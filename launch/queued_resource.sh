#!/usr/bin/env bash
# A run on a TPU that Google Cloud hands over when its turn comes: as tpu_vm.sh, through the queue.
#
#   launch/queued_resource.sh [OPTIONS] create               asks for the machine
#   launch/queued_resource.sh [OPTIONS] wait                 until it is there
#   launch/queued_resource.sh [OPTIONS] copy                 puts the repository on all workers
#   launch/queued_resource.sh [OPTIONS] setup                installs it there, mounts --mount
#   launch/queued_resource.sh [OPTIONS] run CONFIG [FLAGS]   starts main.py on all workers
#   launch/queued_resource.sh [OPTIONS] logs [WORKER]        follows the output of all, or of one
#   launch/queued_resource.sh [OPTIONS] status               says how request and run are
#   launch/queued_resource.sh [OPTIONS] stop                 lets the run save and end
#   launch/queued_resource.sh [OPTIONS] resume CONFIG [FLAGS]
#       all of it, until the run has ended: where the machine was preempted or the request is not
#       there, asks again, waits, copies, sets up and runs the same command, which goes on from the
#       last checkpoint
#   launch/queued_resource.sh [OPTIONS] delete               gives back the machine and the request
#
# Options, or environment variables of the same name in capitals: those of tpu_vm.sh,
#   --name= --zone= --project= --type= --version= --spot --reserved --mount= --dry-run
#
# An example:
#   launch/queued_resource.sh --name=lm-1 --zone=us-east5-a --type=v5p-128 --spot \
#       --mount=gs://my-bucket resume configs/quickstart.py --config.mesh.fsdp=-1
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"
# shellcheck disable=SC2034 # main reads it
COMMANDS="create wait copy setup run logs status stop resume delete"

# Request and machine have the same name, so that tpu-vm commands find the machine.
create_tpu() {
    run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${PLACE[@]}" \
        --accelerator-type="$TYPE" --runtime-version="$VERSION" ${TIER[@]+"${TIER[@]}"}
}

tpu_state() {
    local state
    state=$(look ask "$1" gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" \
        --format='value(state.state)')
    case $state in
        ACTIVE) echo ready ;;
        CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | SUSPENDING | DELETING)
            echo waiting
            ;;
        FAILED | SUSPENDED) echo dead ;;
        ready | dead | absent) echo "$state" ;;
        *) echo unknown ;;
    esac
}

# --force: with the machine that belongs to the request.
delete_tpu() {
    run gcloud compute tpus queued-resources delete "$NAME" "${PLACE[@]}" --force --quiet
}

wait() {
    local state
    while true; do
        state=$(tpu_state ready)
        say "request: $state"
        case $state in
            ready) return 0 ;;
            dead | absent) fail "the request '$NAME' is $state: delete and create it again" ;;
            *) nap "$POLL" ;;
        esac
    done
}

main "$@"
