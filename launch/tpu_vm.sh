#!/usr/bin/env bash
# A run on a TPU VM, of one host or of a whole pod slice.
#
#   launch/tpu_vm.sh [OPTIONS] create               makes the machine
#   launch/tpu_vm.sh [OPTIONS] copy                 puts the repository on all workers
#   launch/tpu_vm.sh [OPTIONS] setup                installs it there, and mounts --mount
#   launch/tpu_vm.sh [OPTIONS] run CONFIG [FLAGS]   starts main.py on all workers, and returns
#   launch/tpu_vm.sh [OPTIONS] logs [WORKER]        follows the output of all workers, or of one
#   launch/tpu_vm.sh [OPTIONS] status               says how machine and run are
#   launch/tpu_vm.sh [OPTIONS] stop                 lets the run save and end
#   launch/tpu_vm.sh [OPTIONS] resume CONFIG [FLAGS]
#       all of it, until the run has ended: where the machine was preempted or is not there, makes
#       it again, copies, sets up and runs the same command, which goes on from the last checkpoint
#   launch/tpu_vm.sh [OPTIONS] delete               gives the machine back
#
# Options, or environment variables of the same name in capitals:
#   --name=lm-1 --zone=us-east5-a   which machine
#   --project=P                     by default gcloud's own
#   --type=v5p-128                  for create and resume
#   --version=…                     its software; by default what --type needs
#   --spot, --reserved              how it is paid for
#   --mount=gs://BUCKET             or HOST:/PATH (NFS): seen by all workers as /mnt/lm, where
#                                   run directories and tokens then are. Several hosts need one.
#                                   Make the bucket with a hierarchical namespace: it renames
#                                   checkpoints in one step.
#   --dry-run                       prints every command instead of running it
#
# An example:
#   launch/tpu_vm.sh --name=lm-1 --zone=us-east5-a --type=v5p-128 --spot --mount=gs://my-bucket \
#       resume configs/quickstart.py --config.mesh.fsdp=-1
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/tpu.sh"
# shellcheck disable=SC2034 # main reads it
COMMANDS="create copy setup run logs status stop resume delete"

create_tpu() {
    run gcloud compute tpus tpu-vm create "$NAME" "${PLACE[@]}" \
        --accelerator-type="$TYPE" --version="$VERSION" ${TIER[@]+"${TIER[@]}"}
}

tpu_state() {
    local state
    state=$(look ask "$1" gcloud compute tpus tpu-vm describe "$NAME" "${PLACE[@]}" \
        --format='value(state)')
    case $state in
        READY) echo ready ;;
        CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING | STOPPING | DELETING | HIDING | \
            UNHIDING) echo waiting ;;
        PREEMPTED | TERMINATED | STOPPED | SUSPENDED | HIDDEN) echo dead ;;
        ready | dead | absent) echo "$state" ;;
        *) echo unknown ;;
    esac
}

delete_tpu() {
    run gcloud compute tpus tpu-vm delete "$NAME" "${PLACE[@]}" --quiet
}

main "$@"
