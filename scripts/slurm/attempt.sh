# shellcheck shell=bash
# One attempt of a job, for pretrain_gpt.sbatch: preflight, training, and what becomes of the job after it.
# Reads its variables and calls its functions.
# shellcheck disable=SC2154

readonly log=$LOG_DIR/train-$attempt.log
readonly finished=$RUN_DIR/finished # there when the training is over
readonly stuck=$RUN_DIR/stuck       # there when the last attempt left no new checkpoint
asked=0 cancelled=0 stop_at=0 status=143 # as if stopped, until training has ended

# The iteration of the last checkpoint, 0 without one; Megatron writes "release" for weights without an iteration.
last_checkpoint() {
    local file=$CHECKPOINT_DIR/latest_checkpointed_iteration.txt found
    [[ -e $file ]] || { echo 0 && return; }
    found=$(head -c 64 "$file" | tr -d '\0') || die "$file: cannot be read"
    [[ $found != release ]] || { echo 0 && return; }
    check_number "$file" "$found"
    echo "$found"
}

run_attempt() {
    if [[ -f $finished ]]; then
        say "$RUN_DIR is finished; take $finished away to train on"
        exit 0
    fi
    trap ask_to_save USR1
    trap 'cancelled=1' TERM
    snapshot >"$LOG_DIR/environment-$attempt.txt"
    preflight
    before=$(last_checkpoint) || exit 1
    say "attempt $attempt on $SLURM_JOB_NODELIST from iteration $before, log: $log"
    if ((!asked && !cancelled)); then
        train
    fi
    settle
}

revision() { git -C "$1" describe --always --dirty --abbrev=40 2>/dev/null || echo "no git here"; }

# What a person needs to run it again; nothing that could be a secret.
snapshot() {
    printf 'plugin: %s %s\n' "$WALLFACER_ROOT" "$(revision "$WALLFACER_ROOT")"
    [[ -z $MEGATRON_PATH ]] || printf 'Megatron-LM: %s %s\n' "$MEGATRON_PATH" "$(revision "$MEGATRON_PATH")"
    printf 'nodes: %s\ncommand:' "$SLURM_JOB_NODELIST"
    printf ' %q' "${training[@]}" "${launch[@]}"
    printf '\n\n'
    env | grep -E '^(SLURM|SBATCH|CUDA|NCCL|GLOO|UCX|FI|TORCH|NVTE|OMP|PYTHON|CONTAINER)_?' |
        grep -viE '^[^=]*(token|key|secret|jwt|passw)' | sort
}

# Each node says that it is good, or why not. Nodes are named, never drained: that is for who runs the cluster.
preflight() {
    local said=$LOG_DIR/preflight-$attempt.log names node bad=()
    : >"$said"
    RDZV_ENDPOINT=$RDZV_ENDPOINT "${on_nodes[@]}" --output="$said" bash "$WALLFACER_ROOT/scripts/slurm/preflight.sh" "$PYTHON" "$GPUS_PER_NODE" \
        "$MEGATRON_PATH" "$LOG_DIR/environment-$attempt.txt" "${launch[@]}" </dev/null || true
    names=$(node_names) || exit 1
    grep '^preflight: .*: note: ' "$said" >&2 || true
    for node in $names; do
        grep -qF "preflight: $node: ok:" "$said" || bad+=("$node")
    done
    if ((${#bad[@]})) && ((!cancelled)); then
        for node in "${bad[@]}"; do
            grep -F "preflight: $node: error:" "$said" >&2 || echo "preflight: $node: error: said nothing, see $said" >&2
        done
        die "preflight failed on ${#bad[@]} of $nodes nodes; without them: sbatch --exclude=$(IFS=,; echo "${bad[*]}") ..."
    fi
    if [[ $(sed -n 's/^preflight: .*: ok: //p' "$said" | sort -u | wc -l) -gt 1 ]]; then
        grep '^preflight: ' "$said" >&2
        die "preflight: the nodes have different versions"
    fi
}

# In the background, because a trap waits for what is in the foreground.
train() {
    "${training[@]}" "${launch[@]}" </dev/null &
    local trainer=$!
    while kill -0 "$trainer" 2>/dev/null; do
        if ((stop_at && SECONDS >= stop_at)); then
            say "ranks have not ended $SAVE_WAIT_S s after USR1: stopped"
            kill -TERM "$trainer" || true
            return
        fi
        sleep 1 &
        wait $! || true
    done
    status=0
    wait "$trainer" || status=$?
}

# USR1: the time limit is near, or somebody wants the job to save and go away. torchrun would kill its ranks half a
# minute after a signal of its own, so the ranks are signalled past it. Those that still start are ended by it.
ask_to_save() {
    asked=1
    stop_at=$((SECONDS + SAVE_WAIT_S))
    say "USR1: ranks shall save and exit"
    # shellcheck disable=SC2016 # the script is for the shells on the nodes
    timeout 60 srun --overlap --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none bash -c '
        for agent in $(pgrep -f "torch.distributed.run .*--rdzv-id $1 "); do pkill -USR2 -P "$agent"; done
        true' ask "$SLURM_JOB_ID" </dev/null || say "some nodes could not be asked"
}

# The rank that failed first, its node, and the --exclude to type: a job that is requeued may get the bad node again.
first_failure() {
    local names
    mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    (cd "$WALLFACER_ROOT" && "${ask[@]}" -m scripts.slurm.summary "$log" "${names[@]}")
}

# Finished, to be continued, or failed.
settle() {
    local after
    after=$(last_checkpoint) || exit 1
    if ((cancelled)); then
        say "ended by Slurm (scancel, or the time limit) at iteration $after; to go on, submit again with RUN_DIR=$RUN_DIR"
        exit 143
    fi
    if ((status == 0)) && ! grep -q 'exiting program' "$log"; then
        touch "$finished"
        say "finished at iteration $after"
        exit 0
    fi
    if ((status == 0)) && grep -q 'exiting program at iteration' "$log"; then
        say "stopped at iteration $after, as --exit-interval says; to go on, submit again with RUN_DIR=$RUN_DIR"
        exit 0
    fi
    if ((status != 0 && !asked)); then
        say "training failed with exit code $status; the first errors of $log:"
        first_failure || true
        # What torchrun has to say about it comes last and explains nothing.
        grep -nE 'wallfacer: error|(^|[: ])[A-Za-z.]*(Error|Exception): |Signal [0-9]+ \(' "$log" |
            grep -v 'torch\.distributed\.elastic' | sed 5q || true
    fi
    requeue "$after"
}

# Bounded twice: in number, and because two attempts in a row without a new checkpoint would be followed by a third.
requeue() {
    local state
    local again="to go on, submit again with RUN_DIR=$RUN_DIR"
    ((SAVE_INTERVAL > 0)) || die "no requeue: SAVE_INTERVAL=0 leaves nothing to go on with"
    if (($1 > before)); then
        rm -f "$stuck"
    elif [[ -e $stuck ]]; then
        rm -f "$stuck"
        die "no requeue: two attempts have left no checkpoint after iteration $1; $again"
    else
        touch "$stuck"
    fi
    ((${SLURM_RESTART_COUNT:-0} < MAX_REQUEUES)) || die "no requeue: MAX_REQUEUES=$MAX_REQUEUES is reached; $again"
    # A job that was cancelled meanwhile must not rise again.
    state=$(job_field JobState)
    [[ $state == RUNNING ]] || die "no requeue: the job is $state; $again"
    say "requeued, to go on from iteration $1"
    scontrol requeue "$SLURM_JOB_ID" || die "no requeue: scontrol failed; $again"
    exit 0
}
