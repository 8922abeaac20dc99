#!/usr/bin/env bash
# A run on a TPU slice of Google Kubernetes Engine, from the manifest gke.yaml.
#
#   launch/gke.sh [OPTIONS] image                   builds and pushes --image, with launch/Dockerfile
#   launch/gke.sh [OPTIONS] render CONFIG [FLAGS]   prints the manifest
#   launch/gke.sh [OPTIONS] apply CONFIG [FLAGS]    starts the run; it restarts by itself
#   launch/gke.sh [OPTIONS] logs                    follows the output of all hosts
#   launch/gke.sh [OPTIONS] status                  says how the run and its pods are
#   launch/gke.sh [OPTIONS] delete                  ends the run; it saves first
#
# Options, or environment variables of the same name in capitals:
#   --name=lm-1
#   --image=us-docker.pkg.dev/PROJECT/REPOSITORY/lm:1
#   --accelerator=tpu-v5p-slice     as the node pool's label cloud.google.com/gke-tpu-accelerator
#   --topology=4x4x4                as its label cloud.google.com/gke-tpu-topology
#   --chips=4                       in a host; 8 where a host has eight
#   --bucket=BUCKET                 seen by all hosts as /mnt/lm, where run directories and tokens
#                                   are; make it with a hierarchical namespace
#   --claim=NAME                    instead of a bucket: a ReadWriteMany volume claim
#   --service-account=default       Kubernetes' account, which may read and write the bucket
#   --namespace=default
#   --max-restarts=100
#   --spot                          on spot nodes
#   --dry-run                       prints every command instead of running it
#
# The cluster needs JobSet 0.6 or later and, for a bucket, the Cloud Storage FUSE driver.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
COMMANDS="image render apply logs status delete"

fail() {
    printf 'launch/gke.sh: %s\n' "$*" >&2
    exit 2
}

run() {
    if [[ $DRY_RUN == 1 ]]; then
        local argument line=()
        for argument in "$@"; do
            if [[ $argument =~ ^[A-Za-z0-9_./:=@%+,~-]+$ ]]; then
                line+=("$argument")
            else
                line+=("${argument@Q}")
            fi
        done
        printf '%s\n' "${line[*]}"
    else
        "$@"
    fi
}

allow() {
    [[ $2 =~ ^($3)$ ]] || fail "--$1='$2' must be $4"
}

# The arguments as a JSON list, which is YAML as well.
json_list() {
    local argument text=
    for argument in "$@"; do
        argument=${argument//\\/\\\\}
        argument=${argument//\"/\\\"}
        argument=${argument//$'\n'/\\n}
        text+="${text:+, }\"$argument\""
    done
    printf '[%s]' "$text"
}

# The manifest with every ${NAME} replaced by that variable, which must be set.
substitute() {
    local text result='' name
    text=$(<"$1")
    while [[ $text =~ \$\{([A-Z_]+)\} ]]; do
        name=${BASH_REMATCH[1]}
        [[ -v $name ]] || fail "$1 asks for $name, which is not set"
        result+=${text%%"\${$name}"*}${!name}
        text=${text#*"\${$name}"}
    done
    printf '%s\n' "$result$text"
}

read_options() {
    NAME=${NAME:-} IMAGE=${IMAGE:-} ACCELERATOR=${ACCELERATOR:-} TOPOLOGY=${TOPOLOGY:-}
    CHIPS=${CHIPS:-4} BUCKET=${BUCKET:-} CLAIM=${CLAIM:-} NAMESPACE=${NAMESPACE:-default}
    SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default} MAX_RESTARTS=${MAX_RESTARTS:-100}
    SPOT=${SPOT:-0} DRY_RUN=${DRY_RUN:-0}
    while [[ $# -gt 0 && $1 == --* ]]; do
        case $1 in
            --name=*) NAME=${1#*=} ;;
            --image=*) IMAGE=${1#*=} ;;
            --accelerator=*) ACCELERATOR=${1#*=} ;;
            --topology=*) TOPOLOGY=${1#*=} ;;
            --chips=*) CHIPS=${1#*=} ;;
            --bucket=*) BUCKET=${1#*=} ;;
            --claim=*) CLAIM=${1#*=} ;;
            --service-account=*) SERVICE_ACCOUNT=${1#*=} ;;
            --namespace=*) NAMESPACE=${1#*=} ;;
            --max-restarts=*) MAX_RESTARTS=${1#*=} ;;
            --spot) SPOT=1 ;;
            --dry-run) DRY_RUN=1 ;;
            --help)
                awk 'NR > 1 && /^#/ { sub(/^# ?/, ""); print; next } NR > 1 { exit }' "$0"
                exit 0
                ;;
            *) fail "'$1' is not one of --name= --image= --accelerator= --topology= --chips=" \
                "--bucket= --claim= --service-account= --namespace= --max-restarts= --spot" \
                "--dry-run --help, which come before the command" ;;
        esac
        shift
    done
    COMMAND=${1:-}
    [[ $# -eq 0 ]] || shift
    REST=("$@")
    [[ " $COMMANDS " == *" ${COMMAND:-?} "* ]] || fail "command '$COMMAND' is not one of $COMMANDS"
}

image_name() {
    allow image "$IMAGE" '[-a-z0-9_./]+(:[-A-Za-z0-9_.]+)?(@sha256:[0-9a-f]{64})?' \
        "the name of a container image, such as us-docker.pkg.dev/PROJECT/REPOSITORY/lm:1"
}

run_name() {
    allow name "$NAME" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' \
        "at most 40 lower-case letters, digits and dashes, such as lm-1"
    allow namespace "$NAMESPACE" '[a-z0-9]([-a-z0-9]*[a-z0-9])?' "a namespace of the cluster"
}

# Sets what gke.yaml asks for, from the options and `CONFIG [flag…]`.
read_run() {
    local config=${1:-} flag workdir='' chips=1 side spot=''
    run_name
    image_name
    allow accelerator "$ACCELERATOR" 'tpu[-a-z0-9]+' "a kind of TPU, such as tpu-v5p-slice"
    allow topology "$TOPOLOGY" '[0-9]+x[0-9]+(x[0-9]+)?' "a slice's shape, such as 4x4x4 or 2x4"
    allow chips "$CHIPS" '[1-8]' "1 to 8, the chips in a host"
    allow max-restarts "$MAX_RESTARTS" '[0-9]+' "a whole number"
    allow bucket "$BUCKET" '|[a-z0-9][-._a-z0-9]+' "a bucket's name, without gs://"
    allow claim "$CLAIM" '|[a-z0-9][-.a-z0-9]*' "a volume claim's name"
    allow service-account "$SERVICE_ACCOUNT" '[a-z0-9][-.a-z0-9]*' "a Kubernetes account's name"
    [[ -n $BUCKET || -n $CLAIM ]] || fail "--bucket='' or --claim='' must name storage that all hosts see"
    [[ -z $BUCKET || -z $CLAIM ]] || fail "--bucket='$BUCKET' and --claim='$CLAIM' exclude each other"
    [[ -n $config ]] || fail "$COMMAND needs a config, such as configs/quickstart.py"
    [[ -f $HERE/../$config ]] || fail "$COMMAND: config '$config' is not a file in the repository"
    shift
    for flag in "$@"; do
        [[ $flag == --* ]] || fail "$COMMAND: '$flag' is not a flag: write --config.FIELD=VALUE"
        [[ $flag != --workdir=* ]] || workdir=${flag#*=}
    done
    [[ -z $workdir || $workdir == /mnt/lm/* ]] ||
        fail "$COMMAND: --workdir='$workdir' must be in /mnt/lm, which all hosts see"
    for side in ${TOPOLOGY//x/ }; do
        chips=$((chips * side))
    done
    [[ $((chips % CHIPS)) == 0 ]] ||
        fail "--topology='$TOPOLOGY' has $chips chips, not a multiple of --chips='$CHIPS' in a host"
    [[ $SPOT == 0 ]] || spot=', "cloud.google.com/gke-spot": "true"'
    # shellcheck disable=SC2034 # substitute reads these
    {
        HOSTS=$((chips / CHIPS))
        NODES="{\"cloud.google.com/gke-tpu-accelerator\": \"$ACCELERATOR\""
        NODES+=", \"cloud.google.com/gke-tpu-topology\": \"$TOPOLOGY\"$spot}"
        [[ -n $workdir ]] || set -- "$@" --workdir=/mnt/lm/runs/"$NAME"
        ARGUMENTS=$(json_list python main.py --config="$config" "$@")
        BUCKET_MOUNTED=false
        SHARED=$'\n'"                  persistentVolumeClaim: {claimName: \"$CLAIM\"}"
        if [[ -n $BUCKET ]]; then
            BUCKET_MOUNTED=true
            SHARED=$'\n'"                  csi: {driver: gcsfuse.csi.storage.gke.io, volumeAttributes:"
            SHARED+=" {bucketName: \"$BUCKET\", mountOptions: \"implicit-dirs,rename-dir-limit=1000000\"}}"
        fi
    }
}

main() {
    local manifest
    read_options "$@"
    set -- ${REST[@]+"${REST[@]}"}
    case $COMMAND in
        render | apply) ;;
        *) [[ $# -eq 0 ]] || fail "$COMMAND takes no arguments, not '$1'" ;;
    esac
    case $COMMAND in
        image)
            image_name
            run docker build --file="$HERE/Dockerfile" --tag="$IMAGE" "$(dirname "$HERE")"
            run docker push "$IMAGE"
            ;;
        render)
            read_run "$@"
            substitute "$HERE/gke.yaml"
            ;;
        apply)
            read_run "$@"
            manifest=${TMPDIR:-/tmp}/$NAME.yaml
            substitute "$HERE/gke.yaml" >"$manifest"
            run kubectl apply --namespace="$NAMESPACE" --filename="$manifest"
            ;;
        logs)
            run_name
            run kubectl logs --namespace="$NAMESPACE" --follow --prefix --max-log-requests=10000 \
                --selector=jobset.sigs.k8s.io/jobset-name="$NAME" --container=lm
            ;;
        status)
            run_name
            run kubectl get jobset "$NAME" --namespace="$NAMESPACE"
            run kubectl get pods --namespace="$NAMESPACE" \
                --selector=jobset.sigs.k8s.io/jobset-name="$NAME" --output=wide
            ;;
        delete)
            run_name
            run kubectl delete jobset "$NAME" --namespace="$NAMESPACE"
            ;;
    esac
}

main "$@"
