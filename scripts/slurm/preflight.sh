#!/bin/bash
# Whether this node can take part; one line. Run by attempt.sh on every node, in the container where there is one.
#
#   preflight.sh PYTHON GPUS MEGATRON_PATH SNAPSHOT COMMAND...
#
# The first node adds to the file SNAPSHOT what Python has installed, and what COMMAND would run.
set -uo pipefail
python=$1 gpus=$2 megatron=$3 snapshot=$4
shift 4
node=${SLURMD_NODENAME:-$(hostname)}

fail() {
    printf 'preflight: %s: error: %s\n' "$node" "$*"
    exit 1
}

die() { fail "$@"; }
# shellcheck source=scripts/slurm/values.sh
source "$(dirname "${BASH_SOURCE[0]}")/values.sh"
check_number GPUS_PER_NODE "$gpus"
command -v "$python" >/dev/null || fail "PYTHON=$python: is not here"
[[ -z $megatron || -f $megatron/pretrain_gpt.py ]] || fail "MEGATRON_PATH=$megatron: has no pretrain_gpt.py here"
if ((gpus > 0)); then
    seen=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ')
    ((seen >= gpus)) || fail "nvidia-smi shows $seen of $gpus GPUs"
fi
answer=$("$python" -c '
import platform, sys
import torch
import megatron_wallfacer.attention
gpus, seen = int(sys.argv[1]), torch.cuda.device_count() if sys.argv[1] != "0" else 0
if seen < gpus:
    sys.exit(f"torch {torch.__version__} sees {seen} of {gpus} GPUs")
print(f"Python {platform.python_version()}, torch {torch.__version__}, plugin {megatron_wallfacer.__version__}")
' "$gpus" 2>&1) || fail "${answer##*$'\n'}"
if [[ -n ${RDZV_ENDPOINT:-} ]]; then
    # What an earlier job has left can make this one fail in ways that do not name it. It is named here, and not touched.
    "$python" "$(dirname "${BASH_SOURCE[0]}")/leftovers.py" "$RDZV_ENDPOINT" 2>&1 | sed "s/^/preflight: $node: note: /"
fi
if [[ ${SLURM_PROCID:-0} == 0 ]]; then
    # The launch asks Megatron's parser whether it takes the flags, on the first node; for a record that need not be.
    { echo && "$python" -m pip --disable-pip-version-check freeze && echo && SLURM_NODEID='' "$@" --dry-run; } >>"$snapshot" 2>&1
fi
printf 'preflight: %s: ok: %s\n' "$node" "${answer##*$'\n'}"
