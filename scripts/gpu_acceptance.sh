#!/usr/bin/env bash
# Everything that one GPU can show, in ten minutes: results.md, logs and tables in runs/gpu/<date>-<card>.
#
#   scripts/gpu_acceptance.sh                  on a machine with one GPU
#   scripts/gpu_acceptance.sh --smoke          on any machine, small: shows that every part starts, measures nothing
#   scripts/gpu_acceptance.sh --only peers     one part; --list names them, --help has all options
#
# Packages that are installed are used; the results name those that are missing. The exit code is 1 if any part is not
# as it must be.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${WALLFACER_PYTHON:-.venv/bin/python}
if [[ ! -x $python ]]; then
    echo "gpu_acceptance.sh: there is no $python: run make bootstrap, or set WALLFACER_PYTHON" >&2
    exit 2
fi
exec "$python" -m benchmarks.gpu.acceptance "$@"
