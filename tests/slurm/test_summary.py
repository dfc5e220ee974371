"""Which rank of a job on several nodes failed first, and on which node."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.slurm.summary import first_of_job, main
from tests.training_runs.test_failing_rank import _CLOSED, FIVE, raised, summary


def labelled(*nodes: str) -> str:
    """The logs of nodes as srun joins them, the last node first."""
    lines = [f"{task}: {line}" for task, log in reversed(list(enumerate(nodes))) for line in log.splitlines()]
    return "\n".join(lines)


def at(second: int, log: str) -> str:
    """A log of torchrun with another time of all failures."""
    return log.replace("20:43:55", f"20:43:{second:02}")


ENDED = summary((0, -15), (1, -15))


@pytest.mark.parametrize(
    ("nodes", "task", "rank"),
    [
        ([ENDED, raised(1, FIVE) + summary((0, -15), (1, 1))], 1, 1),
        ([raised(0, FIVE) + summary((0, 1), (1, -15)), ENDED], 0, 0),
        # A lost peer comes second, also where its node noticed first.
        ([at(10, raised(0, _CLOSED) + summary((0, 1))), at(12, raised(1, FIVE) + summary((1, 1)))], 1, 1),
        # Killed by a signal other than TERM.
        ([at(20, raised(0, _CLOSED) + summary((0, 1))), at(20, "[default1]:last\n" + summary((1, -9)))], 1, 1),
        # Two errors of their own: the earlier.
        ([at(31, raised(0, FIVE) + summary((0, 1))), at(30, raised(1, FIVE) + summary((1, 1)))], 1, 1),
    ],
)
def test_the_first_failure_of_all_nodes(nodes: list[str], task: int, rank: int) -> None:
    found = first_of_job(labelled(*nodes))
    assert found is not None
    assert (found[0], found[1].rank) == (task, rank)


def test_the_node_and_what_to_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "train.log"
    log.write_text(labelled(ENDED, raised(1, FIVE) + summary((0, -15), (1, 1))))
    assert main([str(log), "n7", "n9"]) == 0
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first == "rank 1 on n9 failed first, with exit code 1:"
    assert lines[-1] == f"  {FIVE}"
    assert last == "without this node: sbatch --exclude=n9 ..."
    log.write_text("0: fine\n")
    assert main([str(log), "n7"]) == 1
