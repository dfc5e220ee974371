"""Read iterations from Megatron's training log."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ITERATION = re.compile(
    r"iteration\s+(?P<iteration>\d+)/\s*\d+ .*? lm loss: (?P<loss>\S+) .*? grad norm: (?P<grad_norm>\S+)"
)


@dataclass(frozen=True)
class Iteration:
    """One iteration in the log, counted from 1.

    ``loss`` is rounded to seven digits. ``grad_norm`` is the norm before clipping.
    """

    number: int
    loss: float
    grad_norm: float


def parse_iteration(line: str) -> Iteration | None:
    """Return the iteration that a line of the log reports, or None for any other line."""
    match = _ITERATION.search(line)
    if match is None:
        return None
    return Iteration(int(match["iteration"]), float(match["loss"]), float(match["grad_norm"]))
