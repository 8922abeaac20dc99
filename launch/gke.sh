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

# shellcheck disable=SC2153 # read_options assigns them
set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck disable=SC2034 # read_options reads these
{
    COMMANDS="image render apply logs status delete"
    OPTIONS=(
        name image accelerator topology chips=4 bucket claim service-account=default
        namespace=default max-restarts=100
    )
    SWITCHES=(spot dry-run)
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
    [[ -f $REPOSITORY/$config ]] || fail "$COMMAND: config '$config' is not a file in the repository"
    shift
    for flag in "$@"; do
        [[ $flag == --* ]] || fail "$COMMAND: '$flag' is not a flag: write --config.FIELD=VALUE"
        [[ $flag != --workdir=* ]] || workdir=${flag#*=}
    done
    [[ -z $workdir || $workdir == "$MOUNTED"/* ]] ||
        fail "$COMMAND: --workdir='$workdir' must be in $MOUNTED, which all hosts see"
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
        [[ -n $workdir ]] || set -- "$@" --workdir="$MOUNTED/runs/$NAME"
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
            run docker build --file="$REPOSITORY/launch/Dockerfile" --tag="$IMAGE" "$REPOSITORY"
            run docker push "$IMAGE"
            ;;
        render)
            read_run "$@"
            substitute "$REPOSITORY/launch/gke.yaml"
            ;;
        apply)
            read_run "$@"
            manifest=${TMPDIR:-/tmp}/$NAME.yaml
            substitute "$REPOSITORY/launch/gke.yaml" >"$manifest"
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
