"""Compare losses of a context-parallel run with those of one rank, in fp32 and in lower precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from megatron_wallfacer.errors import WallfacerError

#: Names of the runs on one rank: in fp32, and in the dtype of the context-parallel run.
EXACT, WHOLE = "1 rank, fp32", "1 rank"
#: Allowed relative difference between two runs in fp32.
TOLERANCE = 1e-5
#: Allowed difference of a context-parallel run from fp32, as a multiple of the difference of one rank in its dtype.
ALLOWED = 2.0


@dataclass(frozen=True)
class LossComparison:
    """Differences of runs from one rank in fp32.

    Attributes:
        differences: relative difference of the loss, by run and iteration.
        allowed: largest allowed difference of a context-parallel run.
    """

    differences: dict[str, list[float]]
    allowed: float

    def largest(self, run: str) -> float:
        """Return the largest relative difference of a run."""
        return max(self.differences[run])

    def agrees(self, run: str) -> bool:
        """Return whether the differences of a run are allowed."""
        return self.largest(run) <= self.allowed


def compare(exact: Sequence[float], whole: Sequence[float], runs: Mapping[str, Sequence[float]]) -> LossComparison:
    """Compare runs with one rank in fp32.

    Args:
        exact: losses of one rank in fp32, by iteration.
        whole: losses of one rank in the dtype of the runs; the same as ``exact`` where that is fp32.
        runs: losses of each run, by its name.

    Raises:
        WallfacerError: runs have different numbers of iterations, or a loss is NaN.
    """
    losses = [exact, whole, *runs.values()]
    if len(set(map(len, losses))) != 1 or any(loss != loss for run in losses for loss in run):
        raise WallfacerError(f"losses={losses}: must be as many numbers for each run, none of them NaN")
    # Two orders of addition in fp32 may differ by the tolerance.
    allowed = max(ALLOWED * max(differences(exact, whole)), TOLERANCE)
    return LossComparison({name: differences(exact, run) for name, run in runs.items()}, allowed)


def differences(reference: Sequence[float], losses: Sequence[float]) -> list[float]:
    """Return the absolute difference relative to the reference, for each iteration of both runs."""
    return [_relative(wanted, loss) for wanted, loss in zip(reference, losses, strict=False)]


def _relative(wanted: float, loss: float) -> float:
    if loss == wanted:
        return 0.0
    return abs(loss - wanted) / abs(wanted) if wanted else inf
