"""Whether losses of a split training run agree with those of one rank, in fp32 and in lower precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from megatron_wallfacer.errors import WallfacerError

#: Names of the runs on one rank.
EXACT, WHOLE = "1 rank, fp32", "1 rank"
#: Relative difference up to which two runs in fp32 agree.
TOLERANCE = 1e-5
#: How many times the distance of one rank in the same dtype a split run may have from one rank in fp32.
ALLOWED = 2.0


@dataclass(frozen=True)
class Comparison:
    """Distances of runs from one rank in fp32.

    Attributes:
        differences: relative differences of the loss, by run and iteration.
        allowed: largest difference that a split run may have.
    """

    differences: dict[str, list[float]]
    allowed: float

    def largest(self, run: str) -> float:
        """Return the largest relative difference of a run."""
        return max(self.differences[run])

    def agrees(self, run: str) -> bool:
        """Return whether a split run is within what is allowed."""
        return self.largest(run) <= self.allowed


def compare(exact: Sequence[float], whole: Sequence[float], runs: Mapping[str, Sequence[float]]) -> Comparison:
    """Compare runs with one rank in fp32.

    Args:
        exact: losses of one rank in fp32, by iteration.
        whole: losses of one rank in the dtype of the runs; `exact` itself where that is fp32.
        runs: losses of each run, by its name.

    Raises:
        WallfacerError: a run has fewer iterations than the others, or a loss that is no number.
    """
    losses = [exact, whole, *runs.values()]
    if len(set(map(len, losses))) != 1 or any(loss != loss for run in losses for loss in run):
        raise WallfacerError(f"losses={losses}: must be as many numbers of each run")
    # Any two orders of sums in fp32 may differ by the tolerance.
    allowed = max(ALLOWED * max(differences(exact, whole)), TOLERANCE)
    return Comparison({name: differences(exact, run) for name, run in runs.items()}, allowed)


def differences(reference: Sequence[float], losses: Sequence[float]) -> list[float]:
    """Absolute differences relative to the reference, by iteration, as far as both go."""
    return [_relative(wanted, loss) for wanted, loss in zip(reference, losses, strict=False)]


def _relative(wanted: float, loss: float) -> float:
    if loss == wanted:
        return 0.0
    return abs(loss - wanted) / abs(wanted) if wanted else inf
