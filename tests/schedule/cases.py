"""Which schedules the tests look at: all small ones, and random large ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import permutations, product
from math import isqrt, prod

from hypothesis import strategies as st

from megatron_wallfacer.schedule.grid import AXES, DEFAULT_PLACEMENT, Grid
from megatron_wallfacer.schedule.merging import LEAST_WORK
from megatron_wallfacer.schedule.plan import RING_VARIANTS, Plan
from tests.schedule.proof import LARGEST, Programs

#: Some (P, C) for which the published arrangement exists.
PUBLISHED = ((8, 2), (16, 2), (16, 4), (32, 2), (32, 4), (64, 2), (64, 4), (64, 8), (128, 8))
#: Up to this size every placement is looked at, beyond it two.
ALL_PLACEMENTS = 4
#: Work of a shard with which all calls are merged that can be.
SMALL_CALLS = 0


def published(
    cp_size: int, team: int, placement: tuple[str, ...] = ("team", "ring_outer", "kv_team"), order: str = "paper"
) -> Plan:
    """The paper's arrangement: team = kv_team = C, ring = P / C^2; pass-Q in backward."""
    grid = Grid(team=team, kv_team=team, ring_outer=cp_size // team**2, placement=placement)
    return Plan(grid, "wallfacer", kv_order=order, backward="pass-q")


@cache
def all_plans(cp_size: int) -> tuple[Plan, ...]:
    """Every plan of this size: all factorisations and, of small sizes, placements; all orders and ring variants."""
    return tuple(plan for grid in _all_grids(cp_size) for plan in plans_of(grid))


def plans_of(grid: Grid) -> Iterator[Plan]:
    """Every plan with this grid. The variant of one pass makes no difference to the other: both have the same."""
    orders = ("native", "paper", "permuted") if grid.team == grid.kv_team > 1 else ("native",)
    ways = (False, True) if grid.ring > 2 and 1 in (grid.ring_outer, grid.ring_inner) else (False,)
    for order, variant, both_ways in product(orders, RING_VARIANTS, ways):
        plan = Plan(grid, kv_order=order, forward=variant, backward=variant, bidirectional=both_ways)
        yield plan
        if grid.team > 1 and (variant == "pass-kv" or order != "native"):
            yield replace(plan, shard_work=SMALL_CALLS)


def both_passes(plan: Plan, **options: bool | int) -> tuple[Programs, Programs]:
    """(forward, backward) of a plan."""
    return Programs(plan, backward=False, **options), Programs(plan, backward=True, **options)


def _all_grids(cp_size: int) -> list[Grid]:
    orders = list(permutations(AXES)) if cp_size <= ALL_PLACEMENTS else [DEFAULT_PLACEMENT, DEFAULT_PLACEMENT[::-1]]
    # Equal grids compare equal: where an axis of one rank stands makes no difference.
    return list(dict.fromkeys(Grid(*sizes, order) for sizes in _factorisations(cp_size, len(AXES)) for order in orders))


def _factorisations(number: int, factors: int) -> Iterator[tuple[int, ...]]:
    if factors == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in _factorisations(number // first, factors - 1))


placements = st.permutations(AXES).map(tuple)
#: Everything that a pass is asked besides its plan.
passes = st.fixed_dictionaries(
    {"backward": st.booleans(), "causal": st.booleans(), "groups": st.integers(1, 3), "keep_gathered_q": st.booleans()}
)


@st.composite
def grids(draw: st.DrawFn, largest: int = LARGEST, widest: int = 64, longest_ring: int = LARGEST) -> Grid:
    """Axes whose product is at most ``largest``: teams of up to ``widest``, any ring; half of them with one rank."""
    sizes = dict.fromkeys(AXES, 1)
    for axis in draw(st.permutations(AXES)):
        if draw(st.booleans()):
            most = longest_ring // (sizes["ring_outer"] * sizes["ring_inner"]) if axis.startswith("ring") else widest
            sizes[axis] = draw(st.integers(1, max(1, min(largest // prod(sizes.values()), most))))
    return Grid(**sizes, placement=draw(placements))


@st.composite
def _published_grids(draw: st.DrawFn, largest: int, widest: int, longest_ring: int) -> Grid:
    team = draw(st.integers(1, min(isqrt(largest), widest)))
    outer = draw(st.integers(1, min(largest // team**2, longest_ring)))
    inner = draw(st.integers(1, max(1, min(largest // (team**2 * outer), longest_ring // outer))))
    head = draw(st.integers(1, max(1, min(largest // (team**2 * outer * inner), 4))))
    return Grid(head, team, team, outer, inner, draw(placements))


@st.composite
def plans(draw: st.DrawFn, largest: int = LARGEST, widest: int = 64, longest_ring: int = LARGEST) -> Plan:
    """Any plan of at most so many ranks."""
    limits = {"largest": largest, "widest": widest, "longest_ring": longest_ring}
    grid = draw(grids(**limits) | _published_grids(**limits))
    order = draw(st.sampled_from(("native", "paper", "permuted"))) if grid.team == grid.kv_team else "native"
    single = 1 in (grid.ring_outer, grid.ring_inner)
    variants = draw(st.sampled_from(RING_VARIANTS)), draw(st.sampled_from(RING_VARIANTS))
    work = draw(st.sampled_from((None, SMALL_CALLS, LEAST_WORK // 3)))
    return Plan(grid, "any", order, *variants, bidirectional=single and draw(st.booleans()), shard_work=work)
