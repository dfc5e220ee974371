"""Exact: every grid, with every feature that it can have, against dense attention in fp64."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations, cycle, permutations, product
from math import prod

import pytest

from megatron_wallfacer.schedule.grid import AXES, Grid, divisors
from megatron_wallfacer.schedule.merging import merges_rows
from megatron_wallfacer.schedule.operands import OperandRows
from megatron_wallfacer.schedule.plan import Plan
from tests.engine.passes import Case, errors, run_cases
from tests.support.dense import Problem
from tests.support.pool import Pool

SIZES = (1, 2, 3, 4, 6, 8, 9, 12)
#: Of these, other placements of the axes than the default one too.
PLACED_SIZES = (4, 6, 8)
LARGE = (
    Grid(2, 2, 1, 2, 2),
    Grid(2, 2, 2, 2, 1),
    Grid(2, 1, 2, 2, 2),
    Grid(1, 2, 2, 2, 2),
    Grid(4, 2, 1, 2, 1),
    Grid(2, 4, 1, 1, 2),
    Grid(1, 4, 4, 1, 1),
    Grid(1, 1, 1, 16, 1),
    Grid(2, 2, 1, 3, 2),
    Grid(4, 2, 1, 3, 1),
    Grid(4, 2, 1, 1, 3),
    Grid(2, 3, 1, 2, 2, ("ring_inner", "head", "ring_outer", "team")),
    Grid(1, 2, 2, 3, 2, ("kv_team", "ring_outer", "team", "ring_inner")),
)
#: Up to this size two pairs of ring variants per order and direction, beyond it one.
ALL_VARIANTS = 8
VARIANTS = (("pass-kv", "pass-kv"), ("pass-kv", "pass-q"), ("pass-q", "pass-q"), ("pass-q", "pass-kv"))


def all_grids(cp_size: int) -> Iterator[Grid]:
    """Every factorisation, at the default placement."""
    return (Grid(*sizes) for sizes in product(divisors(cp_size), repeat=len(AXES)) if prod(sizes) == cp_size)


def other_placements(grid: Grid) -> Iterator[Grid]:
    """Two other orders of the wide axes, or one where there is no more."""
    orders = [order for order in permutations(grid.placement) if order != grid.placement]
    return (Grid(*map(grid.size_of, AXES), order) for order in dict.fromkeys([*orders[-1:], *orders[:1]]))


def plans(grid: Grid, first: int) -> Iterator[Plan]:
    """Every order and direction that exists for a grid, each with some ring variants, from the ``first`` on."""
    orders = ("native", "paper", "permuted") if grid.team == grid.kv_team > 1 else ("native",)
    ways = (False, True) if grid.ring > 1 and 1 in (grid.ring_outer, grid.ring_inner) else (False,)
    for index, (order, way) in enumerate(product(orders, ways), start=first):
        chosen = (index % 4, (index + 2) % 4) if grid.cp_size <= ALL_VARIANTS else (index % 4,)
        for forward, backward in (VARIANTS[number] for number in chosen):
            yield Plan(grid, "any", order, forward, backward, bidirectional=way)


def heads_of(grid: Grid) -> tuple[tuple[int, int], ...]:
    """(query heads, kv heads): as many, fewer, one."""
    q_heads, fewer = (8, 2) if 8 % grid.head == 0 else (4 * grid.head, 2 * grid.head)
    return (q_heads, q_heads), (q_heads, fewer), (q_heads, 1)


def options() -> Iterator[tuple[int, bool, int, int, bool]]:
    """Endlessly, all (kind of heads, causal, batch, head groups, keep) in an order that has no period in common."""
    every = list(product(range(3), (True, False), (1, 3), (1, 2), (False, True)))
    random.Random(0).shuffle(every)
    return cycle(every)


@cache
def cases() -> dict[tuple[str, int, int], list[Case]]:
    """By (placement, number of ranks, ranks of the head axis); cases of one grid stand together."""
    found: dict[tuple[str, int, int], list[Case]] = {}
    grids = [("default", grid) for size in SIZES for grid in all_grids(size)]
    grids += [("other", other) for size in PLACED_SIZES for grid in all_grids(size) for other in other_placements(grid)]
    grids += [("large", grid) for grid in LARGE]
    drawn = options()
    for index, (kind, grid) in enumerate(grids):
        chosen = list(plans(grid, index))
        for plan in chosen[index % len(chosen) :][:1] if kind == "other" else chosen:
            heads, causal, batch, groups, keep = next(drawn)
            q_heads, kv_heads = heads_of(grid)[heads]
            problem = Problem(grid.cp_size, batch=batch, q_heads=q_heads, kv_heads=kv_heads, causal=causal)
            fields = {name: getattr(plan, name) for name in ("kv_order", "forward", "backward", "bidirectional")}
            case = Case(Plan(grid, head_groups=groups, **fields), problem, keep)
            merged = replace(case, plan=replace(case.plan, shard_work=0))
            again = index % 3 == 0 and merges(merged)
            found.setdefault((kind, grid.cp_size, grid.head), []).extend([case, merged] if again else [case])
    return found


def merges(case: Case) -> bool:
    """Whether local and gathered rows are computed in one call in either pass."""
    passes = (OperandRows(case.plan, 0, backward=backward) for backward in (False, True))
    return any(merges_rows(operands, case.groups) for operands in passes)


def features(case: Case) -> set[str]:
    """Wide axes of a case, and what is particular about it."""
    plan, problem = case.plan, case.problem
    found = {axis for axis in AXES if plan.grid.size_of(axis) > 1}
    flags = {
        "pass-q forward": plan.forward == "pass-q",
        "pass-q backward": plan.backward == "pass-q",
        plan.kv_order: True,
        "bidirectional": plan.bidirectional,
        "head groups": case.groups > 1,
        "few kv heads": 1 < problem.kv_heads < problem.q_heads,
        "one kv head": problem.kv_heads == 1,
        "full": not problem.causal,
        "batch": problem.batch > 1,
        "merged rows": merges(case),
        "kept q": case.keep_gathered_q and plan.grid.team > 1,
    }
    return found | {name for name, has in flags.items() if has}


#: Pairs that cannot be.
EXCLUDED = (
    {"ring_outer", "ring_inner", "bidirectional"},
    {"native", "paper", "permuted"},
    {"few kv heads", "one kv head"},
    {"one kv head", "head groups"},
)


def test_each_feature_meets_each_axis_and_each_other_feature() -> None:
    met = {frozenset(pair) for some in cases().values() for case in some for pair in combinations(features(case), 2)}
    names = sorted({name for pair in met for name in pair})
    missing = [pair for pair in combinations(names, 2) if frozenset(pair) not in met]
    assert [pair for pair in missing if not any(set(pair) < group or set(pair) == group for group in EXCLUDED)] == []
    assert len(names) == len(AXES) + 13


@pytest.mark.parametrize("key", cases(), ids=lambda key: f"{key[0]}-{key[1]}-head{key[2]}")
def test_fp64_matches_dense_attention(pools: Callable[[int], Pool], key: tuple[str, int, int]) -> None:
    some = cases()[key]
    ranks = pools(key[1]).run(run_cases, some)
    for index, case in enumerate(some):
        worst = errors(case.problem, [results[index] for results in ranks])
        assert max(worst.values()) <= 1e-12, (case, worst)
