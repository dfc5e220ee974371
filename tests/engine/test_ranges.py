"""Ranges name passes, steps, tiles and waits."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_wallfacer.engine.ranges import Ranges, tile_name
from megatron_wallfacer.engine.timeline import Pass
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.ops import Attend, SendRecv, Transfer, View
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import forward_schedule
from megatron_wallfacer.schedule.tiles import Tile
from megatron_wallfacer.schedule.volume import Shape


@pytest.mark.parametrize(
    ("tile", "name"),
    [
        (Tile((0, 1), (0, 1), causal=True), "causal 0:1 x 0:1"),
        (Tile((0, 2), (1, 4)), "full 0:2 x 1:4"),
        (Tile((1, 2), (0, 2), partial=True), "partial 1:2 x 0:2"),
    ],
)
def test_tiles_by_chunks_and_kind(tile: Tile, name: str) -> None:
    assert tile_name(tile) == name


def test_steps_are_counted_within_a_pass() -> None:
    schedule = forward_schedule(Plan(Grid(ring_outer=2)), 0)
    what = [op for op in schedule.ops if isinstance(op, Attend | View)]
    transfers: list[Transfer] = [op.transfer for op in schedule.ops if isinstance(op, SendRecv)]
    ranges, one = Ranges(), Pass(schedule, Shape(tokens=8, q_heads=1, kv_heads=1, head_dim=1))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(2):
            for thing in (one, *what, *transfers):
                with ranges(thing):
                    torch.ones(1)
    names = [event.name for event in profiled.events() if event.name.startswith("wallfacer: ")]
    steps = [name for name in names if " step " in name]
    attends = sum(isinstance(op, Attend) for op in what)
    assert [int(name.split()[2].rstrip(":")) for name in steps] == [*range(1, attends + 1)] * 2
    assert all("causal 0:" in steps[place] for place in (0, attends))
    assert names.count("wallfacer: forward pass") == 2
    assert names.count("wallfacer: view") == 2 * sum(isinstance(op, View) for op in what)
    assert sum(name.startswith("wallfacer: wait for ") for name in names) == 2 * len(transfers)
