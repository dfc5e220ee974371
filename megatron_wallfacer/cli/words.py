"""``wallfacer words``: what each scheme makes a rank receive, against the lower bound. Counted from the schedules."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from megatron_wallfacer.schedule.bounds import backward_bound, forward_bound, ratio
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape, busiest_rank, words

SIZES, GROUPS = (16, 64, 256, 1024), (1, 4, 8)
#: ``team-ring`` and ``wallfacer`` with the C that moves the fewest words.
SCHEMES = ("team-ring", "wallfacer", "ring", "all-gather")


@dataclass(frozen=True)
class Row:
    """One scheme at one size; words in units of n*H, received by a rank for one layer.

    Attributes:
        cp_size: P.
        group: q heads to a kv head.
        scheme: its name; ``grid`` its axes.
        forward, backward: words.
        forward_ratio, backward_ratio: over the lower bound.
    """

    cp_size: int
    group: int
    scheme: str
    grid: str
    forward: float
    forward_ratio: float
    backward: float
    backward_ratio: float


def rows(sizes: Iterable[int] = SIZES, groups: Sequence[int] = GROUPS) -> Iterator[Row]:
    """Every scheme at every size and kv ratio.

    Raises:
        OptionError: a size that is no group size.
    """
    for cp_size in sizes:
        for group in groups:
            for scheme in SCHEMES:
                yield _row(cp_size, group, scheme)


def as_json(found: Iterable[Row]) -> str:
    """A list of objects with the fields of :class:`Row`."""
    return json.dumps([asdict(row) for row in found], indent=2)


def as_table(found: Iterable[Row]) -> str:
    """Plain columns, one line a row."""
    heading = (
        f"{'P':>5} {'q/kv':>5}  {'scheme':<11} {'grid':<34} {'forward':>9} {'/bound':>7} {'backward':>9} {'/bound':>7}"
    )
    lines = [
        f"{row.cp_size:>5} {row.group:>5}  {row.scheme:<11} {row.grid:<34} {row.forward:>9.3f} "
        f"{row.forward_ratio:>7.2f} {row.backward:>9.3f} {row.backward_ratio:>7.2f}"
        for row in found
    ]
    return "\n".join(["Words received by a rank for one layer, in units of n*H", heading, *lines])


def _row(cp_size: int, group: int, scheme: str) -> Row:
    plan, shape = make_plan(scheme, cp_size, kappa=1 / group), Shape(tokens=1, q_heads=group, kv_heads=1, head_dim=1)
    rank = busiest_rank(cp_size)
    forward = words(forward_schedule(plan, rank), shape) / shape.unit
    backward = words(backward_schedule(plan, rank), shape) / shape.unit
    return Row(
        cp_size=cp_size,
        group=group,
        scheme=scheme,
        grid=str(plan.grid),
        forward=forward,
        forward_ratio=ratio(forward, forward_bound(cp_size, shape.kappa)),
        backward=backward,
        backward_ratio=ratio(backward, backward_bound(cp_size, shape.kappa)),
    )
