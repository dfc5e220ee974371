"""What a pass launches on a GPU, counted on any machine: ``python -m benchmarks.gpu.traffic --launches``.

Both passes of the busiest rank run on tensors without memory, as :mod:`benchmarks.gpu.traffic` runs them. A launch is a
kernel of the package or an operator of PyTorch that is no view; attention calls and messages are counted apart. ``max``
columns are limits: above one the exit code is 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu import traffic
from benchmarks.gpu.tables import markdown
from megatron_wallfacer.schedule.program import AttendBackward, AttendForward, Program

TOKENS, HEADS, HEAD_DIM = 1 << 20, (32, 8), 128
PASSES = ("forward", "backward")
#: Most attention calls and other launches, forward and backward, by ranks and scheme; None: no limit.
LIMITS: dict[tuple[int, str], tuple[tuple[int | None, int | None], tuple[int, int]]] = {
    (2, "auto"): ((2, 2), (6, 6)),
    (4, "auto"): ((4, 4), (12, 12)),
    (8, "auto"): ((8, 8), (24, 24)),
    (8, "ulysses"): ((None, None), (8, 10)),
    (32, "ulysses"): ((None, None), (8, 10)),
    (512, "team-ring"): ((40, 45), (80, 130)),
    (512, "wallfacer"): ((20, 8), (40, 60)),
    (512, "ring"): ((None, None), (520, 1100)),
}


@dataclass(frozen=True)
class Launches:
    """One pass.

    Attributes:
        calls: attention calls.
        others: other launches by (operation of the schedule, kernel or operator).
        batches: transfers: messages that start together.
        most: limits of attention calls and other launches.
    """

    calls: int
    others: Counter[tuple[str, str]]
    batches: int
    most: tuple[int | None, int | None] = (None, None)

    @property
    def within(self) -> bool:
        """Whether both counts are within their limits."""
        counts = self.calls, self.others.total()
        return all(limit is None or number <= limit for number, limit in zip(counts, self.most, strict=True))


def count(cp_size: int, scheme: str) -> tuple[str, tuple[Launches, Launches]]:
    """The grid of a scheme, and both passes of its busiest rank.

    Raises:
        OptionError: the scheme cannot be had for these heads.
    """
    ran = traffic.run(cp_size, HEADS, scheme, HEAD_DIM, TOKENS // cp_size)
    calls, others = LIMITS.get((cp_size, scheme), ((None, None), (None, None)))
    found = [
        Launches(_calls(program), seen.launches, len(program.transfers), limits)
        for program, seen, limits in zip(ran.programs, ran.seen, zip(calls, others, strict=True), strict=True)
    ]
    return ran.grid, (found[0], found[1])


def _calls(program: Program) -> int:
    return sum(isinstance(step, AttendForward | AttendBackward) for _, steps in program.steps for step in steps)


def report(settings: Sequence[tuple[int, str]] = tuple(LIMITS), *, kinds: bool = False) -> int:
    """Print a row for each pass.

    Args:
        settings: (ranks, scheme).
        kinds: print other launches by operation and kernel too.

    Returns:
        0; 1 where a count is above its limit.
    """
    lines, tables, within = [], [], True
    for cp_size, scheme in settings:
        grid, both = count(cp_size, scheme)
        for name, one in zip(PASSES, both, strict=True):
            limits = ["" if limit is None else str(limit) for limit in one.most]
            counts = f"{one.calls}", limits[0], f"{one.others.total()}", limits[1], f"{one.batches}"
            lines.append((str(cp_size), scheme, grid, name, *counts, "ok" if one.within else "above"))
            tables.append((f"P {cp_size}, {scheme}, {name}", one.others))
            within &= one.within
    heading = ("P", "scheme", "grid", "pass", "attention calls", "max", "other launches", "max", "message batches", "")
    print(markdown(heading, lines))
    for title, others in tables if kinds else ():
        rows = [(operation, kernel, str(number)) for (operation, kernel), number in others.most_common()]
        print(f"\n{title}\n\n{markdown(('operation', 'launch', 'number'), rows)}")
    return int(not within)
