"""Reading Megatron's training log."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ITERATION = re.compile(
    r"iteration\s+(?P<iteration>\d+)/\s*\d+ .*? lm loss: (?P<loss>\S+) .*? grad norm: (?P<grad_norm>\S+)"
)


@dataclass(frozen=True)
class Iteration:
    """One line of the log. Losses have seven digits there."""

    number: int
    loss: float
    grad_norm: float


def parse_iteration(line: str) -> Iteration | None:
    """The iteration that a line reports, if it reports one."""
    found = _ITERATION.search(line)
    if found is None:
        return None
    return Iteration(int(found["iteration"]), float(found["loss"]), float(found["grad_norm"]))
