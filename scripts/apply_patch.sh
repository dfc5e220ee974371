#!/usr/bin/env bash
# Puts the plugin's one import into pretrain_gpt.py of a Megatron-LM checkout, for people who want to type that script
# itself:  torchrun --nproc-per-node 8 pretrain_gpt.py ... --wallfacer-cp-size 8
#
#   scripts/apply_patch.sh MEGATRON_PATH            apply; nothing happens where it is applied already
#   scripts/apply_patch.sh MEGATRON_PATH --revert   take it out again
#
#   PYTHON=/path/to/python   reads the script for the check afterwards (default: python3)
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT
readonly LINE='import megatron_wallfacer.auto  # noqa: F401'

die() {
    printf 'apply_patch: error: %s\n' "$*" >&2
    exit 1
}

# A number that package_info.py assigns, read without running it.
assigned() {
    sed -n "s/^$1 *= *\([0-9][0-9]*\) *$/\1/p" "$MEGATRON/megatron/core/package_info.py"
}

# The patch of this release.
find_patch() {
    local version patch
    version=$(assigned MAJOR).$(assigned MINOR)
    patch=$ROOT/patches/core_$version.patch
    [[ -f $patch ]] ||
        die "megatron-core $version of $MEGATRON has no patch; there are: $(cd "$ROOT/patches" && echo core_*.patch)"
    printf '%s\n' "$patch"
}

is_applied() {
    grep -qxF "$LINE" "$MEGATRON/pretrain_gpt.py"
}

apply() {
    (cd "$MEGATRON" && git apply --unidiff-zero "$@" "$PATCH") ||
        die "git could not apply $PATCH to $MEGATRON/pretrain_gpt.py"
}

# A patch without context fits anywhere. The import must stand once, by itself, before torch and Megatron are imported.
stands_right() {
    "${PYTHON:-python3}" - "$MEGATRON/pretrain_gpt.py" 2>/dev/null <<'CHECK'
import ast, sys
imported = []
for node in ast.parse(open(sys.argv[1], encoding="utf-8").read()).body:
    if isinstance(node, ast.Import):
        imported += [name.name for name in node.names]
    elif isinstance(node, ast.ImportFrom):
        imported.append(node.module or "")
heavy = [place for place, name in enumerate(imported) if name.split(".")[0] in ("torch", "megatron", "gpt_builders")]
ours = [place for place, name in enumerate(imported) if name == "megatron_wallfacer.auto"]
sys.exit(not (len(ours) == 1 and heavy and ours[0] < heavy[0]))
CHECK
}

[[ $# -ge 1 && $# -le 2 && $1 != -* && ${2:---revert} == --revert ]] ||
    die "usage: scripts/apply_patch.sh MEGATRON_PATH [--revert]"
[[ -f $1/pretrain_gpt.py && -f $1/megatron/core/package_info.py ]] ||
    die "$1 is no Megatron-LM checkout: it must hold pretrain_gpt.py and megatron/core/package_info.py"
# git would replace the link, not what it points to.
[[ ! -L $1/pretrain_gpt.py ]] || die "$1/pretrain_gpt.py is a link: give the checkout that it leads to"
for tool in git "${PYTHON:-python3}"; do
    command -v "$tool" >/dev/null || die "$tool: is not here"
done
MEGATRON=$(cd "$1" && pwd)
PATCH=$(find_patch)
readonly MEGATRON PATCH

if [[ ${2:-} == --revert ]]; then
    if ! is_applied; then
        echo "apply_patch: $MEGATRON/pretrain_gpt.py is not patched"
        exit 0
    fi
    apply --reverse
    ! is_applied || die "$MEGATRON/pretrain_gpt.py still has the import"
    echo "apply_patch: took the import out of $MEGATRON/pretrain_gpt.py"
    exit 0
fi
if is_applied; then
    stands_right || die "$MEGATRON/pretrain_gpt.py has the import, but not once and before torch and Megatron"
    echo "apply_patch: $MEGATRON/pretrain_gpt.py is patched already"
    exit 0
fi
apply
if ! stands_right; then
    apply --reverse
    die "$MEGATRON/pretrain_gpt.py is not as ${PATCH##*/} expects; it is left as it was"
fi
echo "apply_patch: ${PATCH##*/} applied to $MEGATRON/pretrain_gpt.py"
