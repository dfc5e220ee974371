#!/bin/bash
# Context-parallel sizes x sequence lengths x schemes: a job each, then one CSV.
#
#   CONFIG=configs/llama3-8b-128k.yaml CP_SIZES="4 8" SEQ_LENGTHS="65536 131072" SCHEMES="team-ring ring" \
#       scripts/slurm/sweep.sh [--megatron-flag value ...]      submit what is not finished yet
#   scripts/slurm/sweep.sh --collect > sweep.csv                iteration times and losses of what has run
#
# What pretrain_gpt.sbatch reads from the environment it reads here too. DRY_RUN=1 prints the commands.
set -euo pipefail

: "${SWEEP_DIR:=runs/sweep}"
: "${CP_SIZES:=}"
: "${SEQ_LENGTHS:=}"
: "${SCHEMES:=auto}"
: "${ITERATIONS:=20}"
: "${SBATCH_ARGS:=}" # more words for sbatch, like --nodes=4 --time=20
: "${PYTHON:=}"
: "${DRY_RUN:=0}"

die() {
    printf 'sweep: error: %s\n' "$*" >&2
    exit 1
}

[[ -f scripts/slurm/pretrain_gpt.sbatch ]] || die "type this in the folder of the repository"
if [[ ${1:-} == --collect ]]; then
    [[ -n $PYTHON || ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
    exec "${PYTHON:-python3}" -m scripts.slurm.collect "$SWEEP_DIR"
fi
for name in CONFIG CP_SIZES SEQ_LENGTHS; do
    [[ -n ${!name:-} ]] || die "$name is not set"
done
# shellcheck source=scripts/slurm/values.sh
source scripts/slurm/values.sh
check_pattern DRY_RUN "$DRY_RUN" '[01]' "0 or 1"
for name in CONFIG SWEEP_DIR PYTHON; do check_path "$name" "${!name}"; done
for name in CP_SIZES SEQ_LENGTHS SCHEMES SBATCH_ARGS; do check_text "$name" "${!name}"; done
check_number ITERATIONS "$ITERATIONS" 1
[[ -f $CONFIG ]] || die "CONFIG=$CONFIG: there is no such file"
read -ra more <<<"$SBATCH_ARGS"
read -ra cp_sizes <<<"$CP_SIZES"
read -ra seq_lengths <<<"$SEQ_LENGTHS"
read -ra schemes <<<"$SCHEMES"
for word in "${cp_sizes[@]}"; do check_number CP_SIZES "$word" 1; done
for word in "${seq_lengths[@]}"; do check_number SEQ_LENGTHS "$word" 1; done
for word in "${schemes[@]}"; do check_pattern SCHEMES "$word" '[a-z][a-z0-9-]*' "names of schemes"; done

for cp_size in "${cp_sizes[@]}"; do
    for seq_length in "${seq_lengths[@]}"; do
        for scheme in "${schemes[@]}"; do
            cell=cp$cp_size-seq$seq_length-$scheme # collect.py reads this name
            if [[ -f $SWEEP_DIR/$cell/finished ]]; then
                echo "sweep: $cell is finished already" >&2
                continue
            fi
            # Nothing is saved, so nothing is requeued either: a cell is short.
            command=(env RUN_DIR="$SWEEP_DIR/$cell" SAVE_INTERVAL=0 CONFIG="$CONFIG"
                sbatch --job-name="wallfacer-$cell" "${more[@]}" scripts/slurm/pretrain_gpt.sbatch
                --wallfacer-cp-size "$cp_size" --wallfacer-scheme "$scheme" --seq-length "$seq_length"
                --max-position-embeddings "$seq_length" --train-iters "$ITERATIONS" --log-interval 1 "$@")
            if [[ $DRY_RUN == 1 ]]; then
                printf '%q ' "${command[@]}"
                echo
            else
                "${command[@]}"
            fi
        done
    done
done
