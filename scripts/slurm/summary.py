"""The first failure of a job on several nodes, from the log of srun with ``--label``: python -m scripts.slurm.summary.

    python -m scripts.slurm.summary LOG NODE...

LOG is what srun wrote, each line with the number of its task in front; NODE is the node of each task. Prints rank, node
and error lines of the rank that failed first, other than by torchrun's SIGTERM, and the ``--exclude`` to type.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_wallfacer.training_runs.failing_rank import Failure, first_failure

_LABELLED = re.compile(r"^ *(\d+): ?(.*)$", re.MULTILINE)


def by_task(log: str) -> dict[int, str]:
    """Return the lines of each task, without their labels."""
    found: dict[int, list[str]] = {}
    for task, text in _LABELLED.findall(log):
        found.setdefault(int(task), []).append(text)
    return {task: "\n".join(lines) for task, lines in found.items()}


def first_of_job(log: str) -> tuple[int, Failure] | None:
    """Return the task whose rank failed first, and how; None where the log shows no failing rank.

    A rank that only lost the connection to another, or that torchrun ended, is the first where there is no other.

    Args:
        log: of srun with ``--label``, of torchrun with or without ``--tee 3``.
    """
    failures = [(task, found) for task, text in by_task(log).items() if (found := first_failure(text)) is not None]
    return min(failures, key=lambda one: (one[1].follows, one[1].time, one[0]), default=None)


def main(argv: Sequence[str]) -> int:
    """Print the summary. Return 0, or 1 where the log shows no failing rank."""
    log, *nodes = argv
    first = first_of_job(Path(log).read_text(errors="replace"))
    if first is None:
        return 1
    task, failure = first
    node = nodes[task] if task < len(nodes) else f"node {task} of the job"
    heading, *lines = str(failure).splitlines()
    print(heading.replace(" failed first", f" on {node} failed first", 1))
    print("\n".join(f"  {line}" for line in lines))
    if task < len(nodes):
        print(f"without this node: sbatch --exclude={node} ...")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
