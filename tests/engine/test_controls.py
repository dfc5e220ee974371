"""The comparison of the exactness tests can fail: runs that are wrong on purpose are noticed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_wallfacer.attention import forget_groups
from megatron_wallfacer.engine.merge import PartialOutput
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.tiles import Tile, tiles
from tests.engine.test_exactness import errors, run_problem
from tests.support.dense import Problem
from tests.support.pool import Pool

PACKAGE = "megatron_wallfacer"
TEAM_RING, PUBLISHED = Plan(Grid(team=2, ring=4)), make_plan("wallfacer", 8, team_size=2)


def _flipped(q_chunks: list[int], k_chunks: list[int], *, causal: bool) -> tuple[Tile, ...]:
    return tuple(replace(tile, causal=False) for tile in tiles(q_chunks, k_chunks, causal=causal))


def _dropped(q_chunks: list[int], k_chunks: list[int], *, causal: bool) -> tuple[Tile, ...]:
    return tiles(q_chunks, k_chunks, causal=causal)[:-1]


def _plain_mean(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return out.mean(0), torch.logsumexp(lse, dim=0)


def _last_wins(self: PartialOutput, rows: slice, out: Tensor, lse: Tensor) -> None:
    self.out[rows], self.lse[rows] = out, lse


def _no_delta(dout: Tensor, delta: Tensor) -> Tensor:
    return torch.zeros_like(dout)


def _not_added(sums: tuple[Tensor, ...], parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    for total, part in zip(sums, parts, strict=True):
        total.copy_(part)
    return sums


def _unsorted(block: Tensor, order: tuple[int, ...]) -> Tensor:
    return block.contiguous()


#: What is replaced by what, and the tensors that it must spoil.
SABOTAGE = {
    "causal flag of a tile flipped": (f"{PACKAGE}.schedule.schedule.tiles", _flipped, ("out", "dq", "dk", "dv")),
    "a tile dropped": (f"{PACKAGE}.schedule.schedule.tiles", _dropped, ("out", "dq", "dk", "dv")),
    "lse ignored between tiles": (f"{PACKAGE}.engine.merge.PartialOutput.add", _last_wins, ("out",)),
    "lse ignored between ranks": (f"{PACKAGE}.engine.forward.merge_stacked", _plain_mean, ("out",)),
    "delta ignored in backward": (f"{PACKAGE}.engine.backward.surrogate_output", _no_delta, ("dq", "dk")),
    "gradients replaced, not added": (f"{PACKAGE}.engine.backward._add", _not_added, ("dq", "dk", "dv")),
    "gathered chunks left unsorted": (f"{PACKAGE}.engine.transfers._reorder", _unsorted, ("out", "dq", "dk", "dv")),
}


def sabotaged(rank: int, problem: Problem, plan: Plan, sabotage: str | None) -> list[np.ndarray]:
    """On a worker: one problem, done wrong."""
    damage: AbstractContextManager[object] = nullcontext()
    if sabotage is not None:
        target, replacement, _ = SABOTAGE[sabotage]
        damage = patch(target, replacement)
    with damage:
        result = run_problem(rank, problem, plan, False, "torch")
    forget_groups()
    return result


@pytest.mark.parametrize("plan", [TEAM_RING, PUBLISHED], ids=["team-ring", "wallfacer"])
def test_comparison_passes_without_sabotage(pools: Callable[[int], Pool], plan: Plan) -> None:
    problem = Problem(8)
    found = errors(problem, pools(8).run(sabotaged, problem, plan, None))
    assert max(found.values()) <= 1e-12


@pytest.mark.parametrize("plan", [TEAM_RING, PUBLISHED], ids=["team-ring", "wallfacer"])
@pytest.mark.parametrize("sabotage", SABOTAGE)
def test_comparison_notices_sabotage(pools: Callable[[int], Pool], plan: Plan, sabotage: str) -> None:
    problem = Problem(8)
    found = errors(problem, pools(8).run(sabotaged, problem, plan, sabotage))
    assert all(found[tensor] > 1e-3 for tensor in SABOTAGE[sabotage][2]), found


def test_comparison_notices_a_tenth_digit_on_one_rank(pools: Callable[[int], Pool]) -> None:
    problem = Problem(8)
    ranks = pools(8).run(sabotaged, problem, TEAM_RING, None)
    ranks[2][3].flat[0] += 1e-10
    found = errors(problem, ranks)
    assert found["dv"] > 1e-12 >= max(found[name] for name in ("out", "dq", "dk"))
