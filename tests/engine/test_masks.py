"""Exact under every mask: windows, documents of any length, sinks, capped logits, narrower values; on every grid."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan
from tests.engine.passes import Case, errors, reference, run_cases
from tests.engine.test_exactness import all_grids, plans
from tests.support.dense import Problem, relative_error
from tests.support.pool import Pool

SIZES = (1, 2, 3, 4, 6, 8)
TOLERANCE = 1e-12
#: Tokens of a chunk.
CHUNK = 3


def masks(cp_size: int) -> Iterator[dict[str, object]]:
    """Kinds of masks on 2P chunks of 3 tokens: by window, by documents, both; what is cut; causal and not."""
    tokens = 2 * cp_size * CHUNK
    short = tuple(range(0, tokens, 2))  # documents shorter than a chunk
    some = (0, 1, tokens // 2 + 1, tokens - 1, tokens)  # of one token, spanning many ranks
    pieces = (0, 2 * cp_size, 6 * cp_size)  # each cut into 2P: 1 and 2 tokens a chunk
    yield {"window": (2, 0)}  # less than a chunk
    yield {"window": (CHUNK + 1, 0)}
    yield {"window": (1, 0)}
    yield {"window": (4, 1), "causal": False}
    yield {"documents": (*short, tokens)}
    yield {"documents": some}
    yield {"documents": some, "causal": False}
    yield {"documents": (0, 1, 1 + tokens // 3)}  # and padding
    yield {"documents": (0, 1, 1 + tokens // 3), "causal": False, "sinks": True}
    yield {"documents": some, "window": (CHUNK, 0)}
    yield {"documents": pieces, "shard_mode": "per_document"}
    yield {"documents": pieces, "shard_mode": "per_document", "causal": False}
    yield {"documents": pieces, "shard_mode": "per_document", "window": (2, 0)}
    yield {"sinks": True}
    yield {"sinks": True, "window": (5, 0), "kv_heads": 2}
    yield {"softcap": 0.7}
    yield {"softcap": 0.7, "documents": some}
    yield {"v_head_dim": 5}
    yield {"v_head_dim": 11, "documents": some, "sinks": True, "kv_heads": 1}


@cache
def cases(cp_size: int) -> list[Case]:
    """Every mask on some grids, every grid under some masks."""
    found = [plan for grid in all_grids(cp_size) for plan in plans(grid, 0) if 4 % plan.grid.head == 0]
    kinds, rng = list(masks(cp_size)), random.Random(cp_size)
    rng.shuffle(found)
    many = max(len(kinds), min(len(found), 60))
    drawn = [(found[index % len(found)], kinds[index % len(kinds)]) for index in range(many)]
    made = [
        # The reference kernel takes documents together, PyTorch's one by one.
        Case(
            replace(plan, head_groups=1 + index % 2),
            Problem(cp_size, CHUNK, **mask),
            keep_gathered_q=index % 3 == 0,
            kernel="reference" if index // 3 % 2 else "torch",
        )
        for index, (plan, mask) in enumerate(drawn)
    ]
    return sorted(made, key=lambda case: str(case.plan.grid))


@pytest.mark.parametrize("cp_size", SIZES)
def test_every_mask(cp_size: int, pools: Callable[[int], Pool]) -> None:
    results = pools(cp_size).run(run_cases, cases(cp_size))
    for index, case in enumerate(cases(cp_size)):
        found = [ranks[index] for ranks in results]
        worst = errors(case.problem, found)
        assert max(worst.values()) <= TOLERANCE, (case, worst)
        if case.problem.sinks:
            # Each rank has the part of its own rows; data-parallel reduction adds them up.
            total = torch.from_numpy(np.sum([rank[4] for rank in found], axis=0))
            assert relative_error(total, reference(case.problem)[4]) <= TOLERANCE, case


def test_padding_is_finite_and_has_no_gradient(pools: Callable[[int], Pool]) -> None:
    """Rows that see nothing, on ranks that have others and on ranks that have none."""
    problem = Problem(4, CHUNK, documents=(0, 4))
    for plan in (Plan(Grid(ring_outer=4)), Plan(Grid(team=2, ring_outer=2)), Plan(Grid(head=4))):
        for rank, (result,) in enumerate(pools(4).run(run_cases, [Case(plan, problem)])):
            assert all(np.isfinite(x).all() for x in result)
            if rank > 1:  # chunks 2, 3 and 4, 5 of 8; the document ends in chunk 1
                assert all((x == 0).all() for x in result)


def test_bf16_accumulates_in_fp32(pools: Callable[[int], Pool]) -> None:
    problem = Problem(4, 8, window=(11, 0), documents=(0, 5, 40, 64), dtype=torch.bfloat16)
    case = Case(Plan(Grid(team=2, ring_outer=2)), problem)
    results = [ranks[0] for ranks in pools(4).run(run_cases, [case])]
    assert max(errors(problem, results).values()) <= 2e-2


@pytest.mark.parametrize(
    "wrong",
    [
        {"documents": (0, 6, 13, 24)},
        {"documents": (0, 5, 14, 24)},
        {"window": (4, 0)},
        {"window": (6, 0)},
        {"sinks": False},
    ],
)
def test_a_mask_that_is_a_little_off_is_seen(wrong: dict[str, object], pools: Callable[[int], Pool]) -> None:
    """Negative control: boundaries and windows that are wrong by one, and sinks left out."""
    right = Problem(4, CHUNK, documents=(0, 5, 13, 24), window=(5, 0), sinks=True)
    case = Case(Plan(Grid(team=2, ring_outer=2)), replace(right, **wrong))
    results = [ranks[0] for ranks in pools(4).run(run_cases, [case])]
    assert max(errors(right, results).values()) > 1e6 * TOLERANCE
