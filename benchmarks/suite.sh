#!/usr/bin/env bash
# Every measurement of docs/benchmarks.md: benchmarks/suite.sh OUT [SETTING ...]. Root, an idle machine, about 45 minutes.
# REPEATS, samples of each scheme, is 7 unless set.
# What it shows is printed by: python -m benchmarks.claims OUT
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/suite.sh OUT [SETTING ...]}
shift
python=${PYTHON:-.venv/bin/python}

joint="u1-i4-c2-o2 u2-i2-c2-o2 u4-i1-c2-o2"
grouped="u1-i2-c2-o4 u1-i1-c4-o4 u2-i2-c1-o4-1 double-ring-1 double-ring-2 usp-2 rfa-zigzag"
declare -A schemes=(
  [c-4x4]="$joint u1-i1-c4-o4 double-ring-1 double-ring-2 wallfacer-* ring rfa-zigzag usp-4 usp-8"
  [b-4x4]="$joint u1-i1-c4-o4 double-ring-2 wallfacer-2-in usp-4 usp-8"
  [b-half-4x4]="$joint u1-i1-c4-o4"
  [nic50-4x4]="$joint double-ring-2 usp-4 usp-8"
  [c-4x4-gqa]=$grouped
  [nic50-4x4-gqa]=$grouped
  [nic25-4x4-gqa]=$grouped
  [nic25-16x1-gqa]="u2-i1-c2-o4-1 u1-i1-c2-o8 u1-i4-c1-o4 u1-i4-c1-o4-1"
  [c-2x4]="u1-i2-c2-o2 u2-i1-c2-o2 u1-i4-c1-o2 rfa-zigzag usp-2 usp-4"
  [c-4x2]="u1-i2-c2-o2 u2-i1-c2-o2 rfa-zigzag usp-2 usp-4"
)
order="c-4x4 b-4x4 b-half-4x4 nic50-4x4 c-4x4-gqa nic50-4x4-gqa nic25-4x4-gqa nic25-16x1-gqa c-2x4 c-4x2"
set -f # the patterns are the benchmark's, not the shell's
for setting in ${*:-$order}; do
  # shellcheck disable=SC2086
  $python -m benchmarks.emulated "benchmarks/configs/$setting.yaml" --schemes ${schemes[$setting]} --timelines --repeats "${REPEATS:-7}" --out "$out/$setting"
done
