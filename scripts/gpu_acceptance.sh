#!/usr/bin/env bash
# Everything that one GPU can show, into docs/gpu/<date>-<card>.md: versions, commands, tables.
#
#   scripts/gpu_acceptance.sh              on a machine with one GPU; some minutes
#   scripts/gpu_acceptance.sh --smoke      on any machine, small: shows that it runs, measures nothing
#
# What is installed is used, and what is not is said. The exit code is 1 if any part did not do what is wanted of it.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

python=${WALLFACER_PYTHON:-.venv/bin/python}
smoke=() device=cuda dtypes=(bfloat16 float16) dtype=bfloat16
case "${1:-}" in
"") ;;
--smoke) smoke=(--smoke --device cpu) device=cpu dtypes=(bfloat16) ;;
*)
    echo "gpu_acceptance.sh: $1: the only option is --smoke" >&2
    exit 2
    ;;
esac
if [[ ! -x $python ]]; then
    echo "gpu_acceptance.sh: there is no $python: run make bootstrap, or set WALLFACER_PYTHON" >&2
    exit 2
fi
if [[ $device == cuda ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_acceptance.sh: PyTorch finds no GPU here: --smoke runs anywhere" >&2
    exit 2
fi

card=cpu
if [[ $device == cuda ]]; then
    card=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())')
fi
page=${PAGE:-docs/gpu/$(date +%Y-%m-%d)-$card.md}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
mkdir -p "$(dirname "$page")"
failed=0

# A heading, the command as it is typed, what it printed.
part() {
    local title=$1
    shift
    echo "== $title" >&2
    {
        printf '\n## %s\n\n    %s\n\n' "$title" "${*/#$python/python}"
        "$@" 2>"$out/errors"
        local code=$?
        if ((code)); then
            printf '\n**Not as wanted: exit code %d.**\n' "$code"
        fi
        if [[ -s $out/errors ]]; then
            printf '\nOn stderr:\n\n'
            tail -n 40 "$out/errors" | sed 's/^/    /'
        fi
        ((code == 0))
    } >>"$page" || failed=1
}

ranks() {
    local count=$1
    shift
    part "$count ranks on one card" "$python" -m torch.distributed.run --nproc-per-node "$count" \
        --master-port "$((29500 + RANDOM % 1000))" -m benchmarks.gpu.exact --dtype "$dtype" "${smoke[@]}" "$@"
}

printf '# %s, %s\n\nMade by scripts/gpu_acceptance.sh%s\n' "$card" "$(date +%Y-%m-%d)" "${1:+ $1}" >"$page"
part "Machine and versions" "$python" -m megatron_wallfacer.cli.main doctor
for one in "${dtypes[@]}"; do
    part "Kernels against fp64, $one" "$python" -m benchmarks.gpu.accuracy --dtype "$one" "${smoke[@]}"
done
ranks 4
ranks 8
part "Training on one card, split and whole" "$python" -m benchmarks.gpu.parity --dtype "$dtype" "${smoke[@]}"
part "Tile efficiency" "$python" -m benchmarks.gpu.efficiency --dtype "$dtype" "${smoke[@]}"
part "Peak memory" "$python" -m benchmarks.gpu.memory --dtype "$dtype" "${smoke[@]}"
part "Profile" "$python" -m benchmarks.gpu.gaps --dtype "$dtype" --out "${page%.md}" "${smoke[@]}"
echo "$page" >&2
exit "$failed"
