"""``wallfacer words``: what each scheme makes a rank receive, against the lower bounds. Counted from the schedules."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from megatron_wallfacer.cli.table import as_json, figure, show_table
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.bounds import (
    backward_bound,
    forward_bound,
    ratio,
    whole_backward_bound,
    whole_forward_bound,
)
from megatron_wallfacer.schedule.formulas import backward_words, busiest_rank, forward_words
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.heads import check_heads
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import Schedule, backward_schedule, forward_schedule
from megatron_wallfacer.schedule.schemes import RIDERS, SCHEMES, factorisations, make_plan
from megatron_wallfacer.schedule.volume import Shape, words

SIZES, GROUPS, Q_HEADS = (16, 64, 256, 1024), (1, 4, 8), 64
#: Every name, each with the axes that move the fewest words; ``auto`` is one of the others.
NAMED = tuple(name for name in SCHEMES if name != "auto")
#: Axes over which the best grid is searched, by the name of its row. A double ring moves no fewer words than a ring.
_WITHOUT_HEAD, _WITH_HEAD = ("team", "kv_team", "ring_outer"), ("head", "team", "kv_team", "ring_outer")
BEST = {
    "best-forward": (forward_words, backward_words, _WITHOUT_HEAD),
    "best-backward": (backward_words, forward_words, _WITHOUT_HEAD),
    "best-forward-head": (forward_words, backward_words, _WITH_HEAD),
    "best-backward-head": (backward_words, forward_words, _WITH_HEAD),
}
DOES_NOT_FIT = "heads do not divide"


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``words``."""
    parser = commands.add_parser("words", help="count what each scheme makes a rank receive, against the lower bound")
    sizes, groups = (" ".join(map(str, default)) for default in (SIZES, GROUPS))
    parser.add_argument("--cp-size", type=int, nargs="+", default=SIZES, metavar="P", help=f"sizes (default: {sizes})")
    parser.add_argument(
        "--group", type=int, nargs="+", default=GROUPS, metavar="N", help=f"q heads to a kv head (default: {groups})"
    )
    parser.add_argument("--q-heads", type=int, default=Q_HEADS, metavar="N", help="query heads of a rank (default: 64)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_words)


def run_words(arguments: argparse.Namespace) -> int:
    """Print the table."""
    found = rows(arguments.cp_size, arguments.group, arguments.q_heads)
    if arguments.json:
        print(as_json(found))
    else:
        show(found)
    return 0


@dataclass(frozen=True)
class Row:
    """One scheme at one size; words in units of n*H, received by a rank for one layer.

    Attributes:
        cp_size: P.
        group: q heads to a kv head.
        scheme: its name, or that of a search over all grids for the fewest words of one pass.
        grid: its axes, or why there are none; then the rest is None.
        forward, backward: words.
        forward_ratio, backward_ratio: over the lower bound.
        forward_whole, backward_whole: over the lower bound for whole shards.
    """

    cp_size: int
    group: int
    scheme: str
    grid: str
    forward: float | None = None
    forward_ratio: float | None = None
    forward_whole: float | None = None
    backward: float | None = None
    backward_ratio: float | None = None
    backward_whole: float | None = None


def rows(sizes: Iterable[int] = SIZES, groups: Sequence[int] = GROUPS, q_heads: int = Q_HEADS) -> Iterator[Row]:
    """Every scheme at every size and kv ratio, and the best grids of all.

    Args:
        sizes: of the context-parallel group.
        groups: q heads to a kv head.
        q_heads: heads that there are to divide.

    Raises:
        OptionError: a size that is no group size, or heads that cannot be grouped so.
    """
    sizes = tuple(sizes)
    for cp_size in sizes:
        if cp_size < 1:
            raise OptionError("cp_size", cp_size, "a positive number of ranks")
    for group in groups:
        if q_heads < 1 or group < 1 or q_heads % group:
            raise OptionError("group", group, f"a divisor of {q_heads} query heads")
    return _rows(sizes, groups, q_heads)


def _rows(sizes: Sequence[int], groups: Sequence[int], q_heads: int) -> Iterator[Row]:
    """The rows one by one; large sizes take seconds."""
    for cp_size, group in product(sizes, groups):
        shape = Shape(tokens=2, q_heads=q_heads, kv_heads=q_heads // group, head_dim=1)
        for scheme in NAMED:
            yield _row(scheme, named_plan(scheme, cp_size, shape), cp_size, shape)
        for name, (first, second, axes) in BEST.items():
            yield _row(name, _best(cp_size, shape, axes, first, second), cp_size, shape)


def named_plan(scheme: str, cp_size: int, shape: Shape) -> Plan | None:
    """The plan of a scheme for these heads; None where it would have to divide heads that do not divide.

    Raises:
        OptionError: a size that is no group size.
    """
    try:
        return make_plan(scheme, cp_size, q_heads=shape.q_heads, kv_heads=shape.kv_heads)
    except OptionError as error:
        if error.option != "head_size":
            raise
        return None


def show(found: Iterable[Row]) -> None:
    """One line a row."""
    print("Words received by a rank for one layer, in units of n*H. /bound: over the bound for undivided heads;")
    print("/whole: over that for whole shards. Below 1, heads are divided.")
    passes = (">fwd", ">/bound", ">/whole", ">bwd", ">/bound", ">/whole")
    rows = (
        (
            str(row.cp_size),
            str(row.group),
            row.scheme,
            row.grid,
            figure(row.forward),
            figure(row.forward_ratio),
            figure(row.forward_whole),
            figure(row.backward),
            figure(row.backward_ratio),
            figure(row.backward_whole),
        )
        for row in found
    )
    show_table((">P", ">q/kv", "scheme", "grid", *passes), rows)


Formula = Callable[..., float]


def _best(cp_size: int, shape: Shape, axes: Sequence[str], first: Formula, second: Formula) -> Plan:
    """The plan with the fewest words in one pass; of those, the fewest in the other pass, then the fewest copies."""

    def key(plan: Plan) -> tuple[float, ...]:
        counts = (formula(plan, shape.kappa, kv_heads=shape.kv_heads) for formula in (first, second))
        return *(round(count, 9) for count in counts), plan.grid.kv_team, plan.grid.team

    return min(_all_plans(cp_size, shape, axes), key=key)


def _all_plans(cp_size: int, shape: Shape, axes: Sequence[str]) -> Iterator[Plan]:
    for sizes in factorisations(cp_size, axes):
        grid = Grid(**sizes)
        try:
            check_heads(Plan(grid), shape.q_heads, shape.kv_heads)
        except OptionError:
            continue
        for forward, backward in product(RIDERS, RIDERS):
            yield Plan(grid, forward=forward, backward=backward)


def _row(name: str, plan: Plan | None, cp_size: int, shape: Shape) -> Row:
    group = shape.q_heads // shape.kv_heads
    if plan is None:
        return Row(cp_size, group, name, DOES_NOT_FIT)
    forward, backward = (
        words(schedule, shape) / shape.unit for schedule in _schedules(replace(plan, scheme="", head_groups=1))
    )
    return Row(
        cp_size=cp_size,
        group=group,
        scheme=name,
        grid=str(plan.grid),
        forward=forward,
        forward_ratio=ratio(forward, forward_bound(cp_size, shape.kappa)),
        forward_whole=ratio(forward, whole_forward_bound(cp_size, shape.kappa)),
        backward=backward,
        backward_ratio=ratio(backward, backward_bound(cp_size, shape.kappa)),
        backward_whole=ratio(backward, whole_backward_bound(cp_size, shape.kappa)),
    )


@cache
def _schedules(plan: Plan) -> tuple[Schedule, Schedule]:
    """Forward and backward of a rank that receives as much as any: the same whatever the heads and the name."""
    rank = busiest_rank(plan)
    return forward_schedule(plan, rank), backward_schedule(plan, rank)
