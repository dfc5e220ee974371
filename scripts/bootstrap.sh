#!/usr/bin/env bash
# Makes .venv with the plugin, Megatron-Core and the tools for tests, from nothing but some Python >= 3.12.
#
#   scripts/bootstrap.sh                 make or complete .venv; returns at once when it is up to date
#   scripts/bootstrap.sh --find-python   print the interpreter that it would be made with
#
#   PYTHON=/path/to/python               is tried first
#   WALLFACER_PYTHON=/path/to/python     is used as it is: nothing is made or installed, only checked
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT
readonly VENV=$ROOT/.venv
readonly FINISHED=$VENV/.bootstrap-finished     # holds the fingerprint of what was installed
readonly UNFINISHED=$VENV/.bootstrap-unfinished # there while an install runs, and after one that was cut off
readonly DISK_GB=9                              # torch brings CUDA: 3 GB of wheels, 6 GB unpacked

readonly HOW_TO_GET_PYTHON="Debian/Ubuntu: apt install python3.12-venv | RHEL/Fedora: dnf install python3.12 \
| pyenv install 3.12 | uv python install 3.12; or name one: PYTHON=/path/to/python3.12 make"

# Old interpreters run this too, so it stays in the syntax that Python 2 has.
readonly CHECK_PYTHON='
import sys
if sys.version_info[:2] < (3, 12):
    sys.stdout.write("no: is Python %d.%d" % tuple(sys.version_info[:2]))
else:
    try:
        import ensurepip, venv
        sys.stdout.write("ok: " + sys.executable)
    except ImportError:
        sys.stdout.write("no: has no venv or ensurepip (on Debian/Ubuntu they are the package python%d.%d-venv)" % sys.version_info[:2])
'

say() { printf 'bootstrap: %s\n' "$*" >&2; }

die() {
    say "$*"
    exit 1
}

# "ok: <path>" or "no: <reason>". What answers anything else, like the shim of a version manager, cannot run.
ask_python() {
    local answer
    answer=$("$1" -E -s -c "$CHECK_PYTHON" 2>/dev/null </dev/null) || answer=
    case $answer in
    "ok: /"* | "no: "*) printf '%s\n' "$answer" ;;
    *) printf 'no: does not run\n' ;;
    esac
}

# One candidate a line, best first. 3.14 comes late: Megatron-Core has no wheel for it up to 0.19.
candidates() {
    local shim
    if [[ -n ${PYTHON:-} ]]; then
        printf '%s\n' "$PYTHON"
    fi
    type -aP python3.12 python3.13 python3 python python3.14 || true
    # Installed, but not on PATH. What a pattern does not find stays as it is written, and is no file.
    for shim in $(type -aP python3.12 python3.13 python3.14); do
        # A shim of pyenv that does not run stands beside versions that do.
        printf '%s\n' "${shim%/shims/*}"/versions/"${shim##*/python}".*/bin/python3
    done
    printf '%s\n' "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9].*/bin/python3 \
        "${XDG_DATA_HOME:-$HOME/.local/share}"/uv/python/*3.1[2-9]*/bin/python3 \
        /opt/*/bin/python3.1[2-9] /usr/local/bin/python3.1[2-9] /usr/local/*/bin/python3.1[2-9]
}

# Prints the first candidate that can make a virtual environment; tells why there is none.
find_python() {
    local candidate answer passed_over=
    while IFS= read -r candidate; do
        [[ -x $candidate || $candidate == "${PYTHON:-}" ]] || continue
        answer=$(ask_python "$candidate")
        case $answer in
        "ok: "*)
            [[ -z $passed_over || -z ${PYTHON:-} ]] || say "PYTHON cannot be used: ${passed_over%%,*}"
            printf '%s\n' "${answer#ok: }"
            return
            ;;
        *) passed_over+="${passed_over:+, }$candidate ${answer#no: }" ;;
        esac
    done < <(candidates | awk '!seen[$0]++')
    die "no usable Python >= 3.12 (${passed_over:-none found at all}). $HOW_TO_GET_PYTHON"
}

# What an install depends on; changes when the environment was moved or its Python replaced. Fails where none runs.
fingerprint() {
    "$VENV/bin/python" -I -c '
import hashlib, sys
known = hashlib.sha256(repr((sys.version, sys.prefix)).encode())
for path in sys.argv[1:]:
    known.update(open(path, "rb").read())
print(known.hexdigest())' "$ROOT/setup.py" "$ROOT/pyproject.toml" 2>/dev/null
}

is_up_to_date() {
    local wanted
    [[ -f $FINISHED ]] && wanted=$(fingerprint) && [[ $(<"$FINISHED") == "$wanted" ]]
}

# An environment made by hand is completed; one that an interrupted install left behind is not to be trusted.
can_be_completed() {
    [[ ! -e $UNFINISHED ]] && [[ $(ask_python "$VENV/bin/python") == "ok: "* ]] &&
        "$VENV/bin/python" -m pip --version >/dev/null 2>&1
}

make_environment() {
    local python started=$SECONDS
    if ! can_be_completed; then
        python=$(find_python)
        say "making .venv with $python"
        "$python" -m venv --clear "$VENV"
    fi
    say "installing into .venv: needs about $DISK_GB GB of disk and several minutes the first time"
    rm -f "$FINISHED"
    : >"$UNFINISHED"
    # Compiling all of torch takes a minute on one core; what is imported is compiled then, once.
    (cd "$ROOT" && "$VENV/bin/python" -m pip install --disable-pip-version-check --no-compile -e '.[dev]') ||
        die "pip failed, see above; run the same command again when its cause is gone"
    fingerprint >"$FINISHED.new"
    mv "$FINISHED.new" "$FINISHED"
    rm "$UNFINISHED"
    say "done in $((SECONDS - started)) s"
}

# An environment of the user's is left as it is, so it has to have everything already.
check_given_python() {
    local python=$1 version missing
    # A path, because the command `wallfacer` is looked for beside it.
    [[ $python == */* && -x $python ]] || die "WALLFACER_PYTHON=$python must be the path of an interpreter"
    version=$("$python" -I -c 'import sys; print(sys.version_info[:2] >= (3, 12))' 2>/dev/null) || version=
    [[ $version == True ]] || die "WALLFACER_PYTHON=$python does not run or is older than Python 3.12"
    # Looks for modules without importing them: that would cost every call ten seconds.
    missing=$("$python" -P -c '
import importlib.util, sys
def found(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
print(*(name for name in sys.argv[1:] if not found(name)))' \
        torch numpy rich matplotlib yaml megatron.training megatron_wallfacer pytest hypothesis ruff)
    [[ -z $missing ]] ||
        die "WALLFACER_PYTHON=$python lacks: $missing. To add what is missing: $python -m pip install -e '${ROOT}[dev]'"
}

case ${1:-} in
--find-python) find_python ;;
"")
    if [[ -n ${WALLFACER_PYTHON:-} ]]; then
        check_given_python "$WALLFACER_PYTHON"
    elif ! is_up_to_date; then
        make_environment
    fi
    ;;
*) die "unknown argument $1; known: --find-python" ;;
esac
