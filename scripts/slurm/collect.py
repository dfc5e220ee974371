"""Iteration times and losses of the jobs of sweep.sh, as CSV: a row an iteration.

python -m scripts.slurm.collect SWEEP_DIR > sweep.csv
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_wallfacer.training_runs.training_log import parse_iteration

COLUMNS = ("cp_size", "seq_length", "scheme", "iteration", "milliseconds", "loss", "grad_norm")
_CELL = re.compile(r"cp(\d+)-seq(\d+)-([a-z-]+)")
_MILLISECONDS = re.compile(r"elapsed time per iteration \(ms\): (\S+)")


def rows(sweep: Path) -> Iterator[tuple[object, ...]]:
    """One for each iteration of the last attempt of each cell, in the order of :data:`COLUMNS`."""
    cells = [(found, folder) for folder in sweep.iterdir() if (found := _CELL.fullmatch(folder.name))]
    for found, folder in sorted(cells, key=lambda cell: (int(cell[0][1]), int(cell[0][2]), cell[0][3])):
        for line in _last_log(folder):
            iteration, milliseconds = parse_iteration(line), _MILLISECONDS.search(line)
            if iteration and milliseconds:
                yield *found.groups(), iteration.number, milliseconds[1], iteration.loss, iteration.grad_norm


def _last_log(cell: Path) -> list[str]:
    logs = sorted((cell / "logs").glob("train-*.log"), key=lambda log: log.stat().st_mtime)
    return logs[-1].read_text(errors="replace").splitlines() if logs else []


def main(argv: Sequence[str]) -> int:
    """Write the CSV to stdout; cells without an iteration are named on stderr, and make the exit code 1."""
    sweep = Path(argv[0])
    if not sweep.is_dir():
        print(f"sweep: error: {sweep}: is no folder; SWEEP_DIR names it", file=sys.stderr)
        return 1
    writer, seen = csv.writer(sys.stdout, lineterminator="\n"), set()
    writer.writerow(COLUMNS)
    for row in rows(sweep):
        writer.writerow(row)
        seen.add("cp{}-seq{}-{}".format(*row))
    empty = sorted(
        folder.name for folder in sweep.iterdir() if _CELL.fullmatch(folder.name) and folder.name not in seen
    )
    for name in empty:
        print(f"sweep: {name} has no iterations; its logs are in {sweep / name / 'logs'}", file=sys.stderr)
    return int(bool(empty))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
