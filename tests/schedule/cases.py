"""Which schedules the tests look at: all small ones, and random large ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import permutations
from math import isqrt

from hypothesis import strategies as st

from megatron_wallfacer.schedule.grid import AXES, Grid
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schemes import divisors
from tests.schedule.proof import LARGEST

#: Some (P, C) for which the published arrangement exists.
PUBLISHED = ((8, 2), (16, 2), (16, 4), (32, 2), (32, 4), (64, 2), (64, 4), (64, 8), (128, 8))


def published(cp_size: int, team: int, placement: tuple[str, ...] = ("team", "ring", "kv_team")) -> Plan:
    """The paper's arrangement: team = kv_team = C, ring = P / C^2."""
    return Plan(Grid(team, team, cp_size // team**2, placement), "wallfacer", "paper", "q")


@cache
def all_plans(cp_size: int) -> tuple[Plan, ...]:
    """Every plan of this size: all factorisations, all placements that differ, both orders of K, V."""
    return tuple(plan for grid in _all_grids(cp_size) for plan in plans_of(grid))


def plans_of(grid: Grid) -> Iterator[Plan]:
    yield Plan(grid)
    if grid.team == grid.kv_team:
        yield Plan(grid, "wallfacer", "paper", "q")


def _all_grids(cp_size: int) -> list[Grid]:
    different = {}
    for team in divisors(cp_size):
        for kv_team in divisors(cp_size // team):
            for placement in permutations(AXES):
                grid = Grid(team, kv_team, cp_size // team // kv_team, placement)
                # Where an axis of one rank stands among the others makes no difference.
                wide = tuple(axis for axis in placement if grid.size_of(axis) > 1)
                different.setdefault((team, kv_team, wide), grid)
    return list(different.values())


placements = st.permutations(AXES).map(tuple)


@st.composite
def grids(draw: st.DrawFn, largest: int = LARGEST, longest_ring: int = LARGEST) -> Grid:
    """Axes whose product is at most ``largest``: teams of up to 64, any ring."""
    team = draw(st.integers(1, min(largest, 64)))
    kv_team = draw(st.integers(1, min(largest // team, 64)))
    ring = draw(st.integers(1, min(largest // (team * kv_team), longest_ring)))
    return Grid(team, kv_team, ring, draw(placements))


@st.composite
def published_plans(draw: st.DrawFn, largest: int = LARGEST, longest_ring: int = LARGEST) -> Plan:
    team = draw(st.integers(1, isqrt(largest)))
    ring = draw(st.integers(1, min(largest // team**2, longest_ring)))
    return published(team * team * ring, team, draw(placements))


def plans(largest: int = LARGEST, longest_ring: int = LARGEST) -> st.SearchStrategy[Plan]:
    return grids(largest, longest_ring).map(Plan) | published_plans(largest, longest_ring)
