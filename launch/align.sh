#!/usr/bin/env bash
# A Hugging Face model learns to reply, and from preferences: SFT, reward model, PPO, export.
#
#   launch/align.sh [--dry-run] HF_DIR CHATS.jsonl PAIRS.jsonl PROMPTS.jsonl OUT [FLAGS]
#
# It makes
#   OUT/sft       HF_DIR with a LoRA adapter, trained on the conversations of CHATS.jsonl
#   OUT/reward    which of two replies is better, learned from PAIRS.jsonl
#   OUT/ppo       OUT/sft, trained on what OUT/reward makes of its replies to PROMPTS.jsonl
#   OUT/hf        OUT/ppo for transformers' AutoModelForCausalLM and AutoTokenizer
#   OUT/adapter   the adapter of OUT/sft for peft, beside HF_DIR; unless --sft.adapter.kind=none
#
# The configs are those of configs/align; the files are as lm/data/conversations.py says. The same
# command goes on where it was stopped; what is there and whole stays as it is.
#
# FLAGS: --config.FIELD=VALUE is for all three trainings, and --sft.FIELD=VALUE,
# --reward.FIELD=VALUE, --ppo.FIELD=VALUE for one of them. --dry-run prints the commands. The
# environment variable PYTHON=python says which Python has lm in it.
#
# An example, for a model whose tokenizer has no chat template:
#   launch/align.sh Llama-3.2-1B chats.jsonl pairs.jsonl prompts.jsonl runs/llama \
#       --config.mesh.fsdp=-1 --config.data.block_size=512 --sft.chat_template=chatml
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DRY_RUN=${DRY_RUN:-0}
while [[ ${1:-} == --* ]]; do
    case $1 in
        --help) manual ;;
        --dry-run) DRY_RUN=1 ;;
        *) fail "'$1' must come after OUT: only --dry-run and --help come first" ;;
    esac
    shift
done
NEEDS="needs HF_DIR CHATS.jsonl PAIRS.jsonl PROMPTS.jsonl OUT; see --help"
[[ $# -ge 5 ]] || fail "$NEEDS"
for argument in "${@:1:5}"; do
    [[ -n $argument && $argument != --* ]] || fail "'$argument' is a flag: $NEEDS"
done
HF=$1 CHATS=$2 PAIRS=$3 PROMPTS=$4 OUT=$5
shift 5

# Of every step, its own flags.
SFT=() REWARD=() PPO=()
for flag in "$@"; do
    case $flag in
        --config.*=*) SFT+=("$flag") REWARD+=("$flag") PPO+=("$flag") ;;
        --sft.*=*) SFT+=("--config.${flag#--sft.}") ;;
        --reward.*=*) REWARD+=("--config.${flag#--reward.}") ;;
        --ppo.*=*) PPO+=("--config.${flag#--ppo.}") ;;
        *) fail "'$flag' must be --config.FIELD=VALUE, or --sft., --reward. or --ppo.FIELD=VALUE" ;;
    esac
done
if [[ $DRY_RUN != 1 ]]; then
    [[ -f $HF/config.json ]] || fail "HF_DIR='$HF' must be a Hugging Face directory: no config.json"
    for file in "$CHATS" "$PAIRS" "$PROMPTS"; do
        [[ -f $file ]] || fail "'$file' must be a file of JSON lines: there is none"
    done
    [[ $PAIRS != *.jsonl || $(head -n 1 "$PAIRS") == *'"chosen"'* ]] ||
        fail "'$PAIRS' must hold pairs: its first line has no field 'chosen'"
    [[ ! -e $OUT || -d $OUT ]] || fail "OUT='$OUT' must be a directory, or a new name"
fi

MAIN=$REPOSITORY/main.py
[[ $PWD != "$REPOSITORY" ]] || MAIN=main.py
SIGNALS=0 CHILD=
leave() {
    SIGNALS=$((SIGNALS + 1))
    [[ -z $CHILD ]] || kill -TERM "$CHILD" 2>/dev/null || true
}
trap leave INT TERM

# `main FLAGS…`: runs main.py, which saves and leaves at a signal; its exit code is the script's.
main() {
    local code seen=-1
    if [[ $DRY_RUN == 1 ]]; then
        run "${PYTHON:-python}" "$MAIN" "$@"
        return
    fi
    "${PYTHON:-python}" "$MAIN" "$@" &
    CHILD=$!
    # A signal ends `wait` before the child has ended: wait until none came in between.
    while [[ $seen != "$SIGNALS" ]]; do
        seen=$SIGNALS
        code=0
        wait "$CHILD" || code=$?
    done
    CHILD=
    [[ $code == 0 ]] || exit "$code"
}

# `train NAME FLAGS…` into OUT/NAME, unless these very flags have done so.
train() {
    local name=$1 done=$OUT/.$1.done flags
    shift
    flags=$(quoted "--config=configs/align/$name.py" "--workdir=$OUT/$name" "$@")
    if [[ $DRY_RUN != 1 && -e $done && $(<"$done") == "$flags" ]]; then
        say "$name: done"
        return
    fi
    main "--config=configs/align/$name.py" "--workdir=$OUT/$name" "$@"
    [[ $DRY_RUN == 1 ]] || printf '%s\n' "$flags" >"$done"
}

# `write NAME RUN FORM`: OUT/RUN into OUT/NAME, which is there when it is whole.
write() {
    if [[ $DRY_RUN != 1 && -e $OUT/$1 ]]; then
        [[ ! $OUT/.$2.done -nt $OUT/$1 ]] ||
            fail "$OUT/$1 is of an earlier $OUT/$2: move it away to have it written anew"
        say "$1: done"
        return
    fi
    main --config=configs/convert.py --config.init_from="$OUT/$2" --config.to="$3" \
        --workdir="$OUT/$1"
}

SFT=(--config.init_from="$HF" --config.data.path="$CHATS" --config.adapter.kind=lora
    ${SFT[@]+"${SFT[@]}"})
REWARD=(--config.init_from="$OUT/sft" --config.data.path="$PAIRS" ${REWARD[@]+"${REWARD[@]}"})
PPO=(--config.init_from="$OUT/sft" --config.data.path="$PROMPTS"
    --config.rewards.functions="$OUT/reward" --config.learning.critic_from="$OUT/reward"
    ${PPO[@]+"${PPO[@]}"})

# A flag that one of the later steps does not know is said before hours of SFT.
if [[ $DRY_RUN != 1 && ! -e $OUT/.sft.done ]]; then
    main --config=configs/align/reward.py "${REWARD[@]}" --help >/dev/null
    main --config=configs/align/ppo.py "${PPO[@]}" --help >/dev/null
fi
train sft "${SFT[@]}"
train reward "${REWARD[@]}"
train ppo "${PPO[@]}"
write hf ppo hf
[[ " ${SFT[*]} " == *" --config.adapter.kind=none "* ]] || write adapter sft peft
