"""Compare the losses of context-parallel runs with the losses of a run on one rank in fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from megatron_wallfacer.errors import WallfacerError

#: Names of the run on one rank in fp32, and of the run on one rank in the dtype of the context-parallel run.
EXACT, WHOLE = "1 rank, fp32", "1 rank"
#: Allowed relative difference between two runs in fp32.
TOLERANCE = 1e-5
#: Allowed difference between a context-parallel run and one rank in fp32, as a multiple of the difference between one
#: rank in the same dtype and one rank in fp32.
ALLOWED = 2.0


@dataclass(frozen=True)
class LossComparison:
    """Relative differences between the losses of runs and the losses of a reference run: one rank in fp32.

    Attributes:
        differences: key: name of a run; value: relative difference of its loss at each iteration.
        allowed: largest relative difference that a context-parallel run may have.
    """

    differences: dict[str, list[float]]
    allowed: float

    def largest(self, run: str) -> float:
        """Return the largest relative difference between the losses of ``run`` and the reference run."""
        return max(self.differences[run])

    def agrees(self, run: str) -> bool:
        """Return whether every relative difference of ``run`` is at most ``allowed``."""
        return self.largest(run) <= self.allowed


def compare(exact: Sequence[float], whole: Sequence[float], runs: Mapping[str, Sequence[float]]) -> LossComparison:
    """Compare the losses of ``runs`` with the losses of a reference run: one rank in fp32.

    Args:
        exact: losses of the reference run, by iteration.
        whole: losses of a run on one rank in the dtype of ``runs``, by iteration. For fp32 this is the reference run.
        runs: key: name of a run; value: its losses by iteration.

    Raises:
        WallfacerError: Runs have different numbers of iterations, or a loss is NaN.
    """
    losses = [exact, whole, *runs.values()]
    if len(set(map(len, losses))) != 1 or any(loss != loss for run in losses for loss in run):
        raise WallfacerError(f"losses={losses}: must be the same number of losses for each run, without NaN")
    # The order of additions alone can cause a difference up to the tolerance in fp32.
    allowed = max(ALLOWED * max(differences(exact, whole)), TOLERANCE)
    return LossComparison({name: differences(exact, run) for name, run in runs.items()}, allowed)


def differences(reference: Sequence[float], losses: Sequence[float]) -> list[float]:
    """Return |loss - reference| / |reference| for each iteration that both runs have."""
    return [_relative(wanted, loss) for wanted, loss in zip(reference, losses, strict=False)]


def _relative(wanted: float, loss: float) -> float:
    if loss == wanted:
        return 0.0
    return abs(loss - wanted) / abs(wanted) if wanted else inf
