"""Words counted from schedules against the closed formulas, and against the known figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_wallfacer.schedule.bounds import forward_bound, ratio
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.moves import Combine, Gather, Hop, Reduce
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import Schedule, backward_schedule, forward_schedule
from megatron_wallfacer.schedule.schemes import divisors
from megatron_wallfacer.schedule.volume import (
    Shape,
    buffer_bytes,
    move_bytes,
    received_bytes,
    shards_received,
    words,
)
from tests.schedule.cases import grids, published, published_plans

SHAPE = Shape(tokens=8, q_heads=4, kv_heads=2, head_dim=16)
#: Bytes of one shard of SHAPE: bf16 inputs, fp32 accumulators.
Q, K, OUT, DQ, DK, LSE = 1024, 512, 2048, 2048, 1024, 128
heads = st.sampled_from([(1, 1), (8, 8), (8, 4), (8, 2), (8, 1)])


def shape_of(q_heads: int, kv_heads: int) -> Shape:
    return Shape(tokens=1, q_heads=q_heads, kv_heads=kv_heads, head_dim=1)


def hops(moves: Iterable[object], axis: str) -> int:
    return sum(isinstance(move, Hop) and move.axis == axis for move in moves)


# --- the closed formulas, q and kv being the words of one shard of Q and of K ---


@settings(max_examples=400)
@given(grids(longest_ring=128), heads, st.data())
def test_native_forward_words(grid: Grid, heads: tuple[int, int], data: st.DataObject) -> None:
    (q, kv), (c, g, r) = heads, (grid.team, grid.kv_team, grid.ring)
    rank = data.draw(st.integers(0, grid.cp_size - 1))
    expected = 2 * (c - 1) * q + 2 * (g - 1) * kv + 2 * g * (r - 1) * kv
    assert words(forward_schedule(Plan(grid), rank), shape_of(q, kv)) == expected


@settings(max_examples=400)
@given(grids(longest_ring=128), heads, st.booleans(), st.data())
def test_native_backward_words(grid: Grid, heads: tuple[int, int], q_kept: bool, data: st.DataObject) -> None:
    (q, kv), (c, g, r) = heads, (grid.team, grid.kv_team, grid.ring)
    rank = data.draw(st.integers(0, grid.cp_size - 1))
    expected = (3 - q_kept) * (c - 1) * q + 4 * (g - 1) * kv + 4 * g * (r - 1) * kv
    assert words(backward_schedule(Plan(grid), rank, q_kept=q_kept), shape_of(q, kv)) == expected


@settings(max_examples=400)
@given(published_plans(longest_ring=128), heads, st.data())
def test_published_forward_words(plan: Plan, heads: tuple[int, int], data: st.DataObject) -> None:
    (q, kv), (c, r) = heads, (plan.grid.team, plan.grid.ring)
    schedule = forward_schedule(plan, data.draw(st.integers(0, plan.grid.cp_size - 1)))
    permuted = hops(schedule.prologue, "cp")
    assert words(schedule, shape_of(q, kv)) == 2 * (q + kv) * (c - 1) + 2 * kv * c * (r - 1) + 2 * kv * c * permuted


@settings(max_examples=400)
@given(published_plans(longest_ring=128), heads, st.booleans(), st.data())
def test_published_backward_words(plan: Plan, heads: tuple[int, int], q_kept: bool, data: st.DataObject) -> None:
    (q, kv), (c, r) = heads, (plan.grid.team, plan.grid.ring)
    rank = data.draw(st.integers(0, plan.grid.cp_size - 1))
    schedule = backward_schedule(plan, rank, q_kept=q_kept)
    gathered = (2 - q_kept) * q * (c - 1) + 2 * kv * (c - 1)
    reduced = q * (c - 1) + 2 * kv * (c - 1)
    ring = 3 * q * c * (r - 1)
    permuted = 2 * q * c * hops(schedule.prologue, "cp") + q * c * hops(schedule.epilogue, "cp")
    assert words(schedule, shape_of(q, kv)) == gathered + reduced + ring + permuted


@settings(max_examples=100)
@given(grids(longest_ring=64), st.data())
def test_head_dim_of_values_counts_for_values_and_outputs(grid: Grid, data: st.DataObject) -> None:
    schedule = forward_schedule(Plan(grid), data.draw(st.integers(0, grid.cp_size - 1)))
    shape = Shape(tokens=4, q_heads=4, kv_heads=2, head_dim=3, v_head_dim=5, batch=7)
    rows = 4 * 7
    moved = (grid.team - 1) * 4 * (3 + 5) + (grid.cp_size // grid.team - 1) * 2 * (3 + 5)
    assert words(schedule, shape) == rows * moved


# --- bytes ---


@pytest.mark.parametrize(
    ("move", "shards"),
    [
        (Gather("team", ("q",), (0, 1, 2)), 2),
        (Combine("team", (0, 1, 2)), 2),
        (Reduce("kv_team", ("dk", "dv"), (0, 1, 2, 3)), 3),
        (Hop("ring", ("k", "v"), 1, 2, shards=4), 4),
    ],
)
def test_shards_received_in_a_move(move: object, shards: int) -> None:
    assert shards_received(move) == shards


def test_bytes_of_one_shard() -> None:
    sizes = {"q": Q, "dout": Q, "k": K, "v": K, "out": OUT, "dq": DQ, "dk": DK, "dv": DK, "lse": LSE, "delta": LSE}
    assert {tensor: SHAPE.bytes(tensor) for tensor in sizes} == sizes


def test_move_bytes_by_axis_and_tensor() -> None:
    assert move_bytes(Hop("ring", ("k", "dv"), 1, 2, shards=3), SHAPE) == {("ring", "k"): 3 * K, ("ring", "dv"): 3 * DK}
    assert move_bytes(Combine("team", (0, 1, 2)), SHAPE) == {("team", "out"): 2 * OUT, ("team", "lse"): 2 * LSE}


def test_received_bytes_of_a_team_ring() -> None:
    grid = Grid(team=2, ring=4)
    assert received_bytes(forward_schedule(Plan(grid), 3), SHAPE) == Counter(
        {
            ("team", "q"): Q,
            ("team", "out"): OUT,
            ("team", "lse"): LSE,
            ("ring", "k"): 3 * K,
            ("ring", "v"): 3 * K,
        }
    )
    assert received_bytes(backward_schedule(Plan(grid), 3), SHAPE) == Counter(
        {
            ("team", "q"): Q,
            ("team", "dout"): Q,
            ("team", "lse"): LSE,
            ("team", "delta"): LSE,
            ("team", "dq"): DQ,
            ("ring", "k"): 3 * K,
            ("ring", "v"): 3 * K,
            ("ring", "dk"): 3 * DK,
            ("ring", "dv"): 3 * DK,
        }
    )


@settings(max_examples=100)
@given(grids(largest=256), st.data())
def test_words_are_the_bytes_without_statistics(grid: Grid, data: st.DataObject) -> None:
    shape = Shape(tokens=2, q_heads=4, kv_heads=2, head_dim=8, itemsize=1, accumulate_itemsize=1)
    schedule = backward_schedule(Plan(grid), data.draw(st.integers(0, grid.cp_size - 1)))
    by_tensor = received_bytes(schedule, shape)
    assert words(schedule, shape) == sum(
        size for (_, tensor), size in by_tensor.items() if tensor not in ("lse", "delta")
    )


# --- buffers, counted by hand ---


def test_buffers_of_a_ring() -> None:
    # Forward: fp32 out and lse; the K, V shard in use and the one arriving.
    assert buffer_bytes(forward_schedule(Plan(Grid(ring=4)), 0), SHAPE) == OUT + LSE + 2 * (2 * K)
    # Backward: dq, the stand-in for out; the same K, V; dk, dv in use, arriving, leaving, and at home.
    assert buffer_bytes(backward_schedule(Plan(Grid(ring=4)), 0), SHAPE) == DQ + Q + 2 * (2 * K) + 4 * (2 * DK)


def test_ring_of_two_holds_no_third_shard() -> None:
    assert buffer_bytes(forward_schedule(Plan(Grid(ring=2)), 0), SHAPE) == OUT + LSE + 2 * K
    # What a ring of two sums for the other rank leaves, and what arrives is added to what waited.
    assert buffer_bytes(backward_schedule(Plan(Grid(ring=2)), 0), SHAPE) == DQ + Q + 2 * K + 3 * (2 * DK)


def test_single_rank_holds_its_accumulators_only() -> None:
    assert buffer_bytes(forward_schedule(Plan(Grid()), 0), SHAPE) == OUT + LSE
    assert buffer_bytes(backward_schedule(Plan(Grid()), 0), SHAPE) == DQ + Q + 2 * DK


def test_buffers_of_a_team_ring() -> None:
    # The team's two shards of q, out and lse; two single K, V shards.
    plan = Plan(Grid(team=2, ring=4))
    assert buffer_bytes(forward_schedule(plan, 0), SHAPE) == 2 * (Q + OUT + LSE) + 2 * (2 * K)
    q_side = 2 * (2 * Q + 2 * LSE + DQ + Q)
    assert buffer_bytes(backward_schedule(plan, 0), SHAPE) == q_side + 2 * (2 * K) + 4 * (2 * DK)


def test_buffers_of_the_published_scheme() -> None:
    # The team's q, out and lse; two K, V blocks of two shards each.
    plan = published(8, 2)
    assert buffer_bytes(forward_schedule(plan, 0), SHAPE) == 2 * (Q + OUT + LSE) + 2 * 2 * (2 * K)
    # K, V and their gradients stay; two blocks of q, dout, lse, delta ride, and three of dq
    # (in use, arriving, leaving); the block in use has a stand-in for out.
    resident, riding = 2 * (2 * K + 2 * DK), 2 * 2 * (2 * Q + 2 * LSE) + 3 * 2 * DQ + 2 * Q
    assert buffer_bytes(backward_schedule(plan, 0), SHAPE) == resident + riding


def test_buffers_of_all_gather() -> None:
    assert buffer_bytes(forward_schedule(Plan(Grid(kv_team=4)), 0), SHAPE) == OUT + LSE + 4 * (2 * K)
    assert buffer_bytes(backward_schedule(Plan(Grid(kv_team=4)), 0), SHAPE) == DQ + Q + 4 * (2 * K + 2 * DK)


@settings(max_examples=100)
@given(st.sampled_from([(4, 16), (16, 4), (64, 1)]), st.sampled_from([4, 2, 1]))
def test_team_ring_forward_buffers_grow_with_the_team_on_the_query_side_only(
    sizes: tuple[int, int], kv_heads: int
) -> None:
    team, ring = sizes
    shape = Shape(tokens=8, q_heads=4, kv_heads=kv_heads, head_dim=16)
    kv_shards = min(2, ring - 1)
    expected = team * (Q + OUT + LSE) + kv_shards * 2 * shape.bytes("k")
    assert buffer_bytes(forward_schedule(Plan(Grid(team=team, ring=ring)), 0), shape) == expected


# --- known figures ---


def busiest(plan: Plan) -> Schedule:
    """Forward schedule of a rank that receives the most: one that the permutation gives a block, if any does."""
    if plan.kv_order == "native":
        return forward_schedule(plan, 0)
    schedules = (forward_schedule(plan, rank) for rank in range(plan.grid.cp_size))
    moving = (schedule for schedule in schedules if hops(schedule.prologue, "cp"))
    return next(moving, None) or forward_schedule(plan, 0)


def forward_words(plan: Plan, group: int) -> float:
    """In units of n*H, for ``group`` query heads to a kv head."""
    shape = shape_of(group, 1)
    return words(busiest(plan), shape) / shape.unit


def forward_ratio(plan: Plan, group: int = 1) -> float:
    return ratio(forward_words(plan, group), forward_bound(plan.grid.cp_size, 1 / group))


def ring(cp_size: int) -> Plan:
    return Plan(Grid(ring=cp_size))


def team_ring(cp_size: int, team: int) -> Plan:
    return Plan(Grid(team=team, ring=cp_size // team))


def best(plans: Iterable[Plan], group: int) -> Plan:
    return min(plans, key=lambda plan: forward_words(plan, group))


def best_published(cp_size: int, group: int) -> Plan:
    return best([published(cp_size, c) for c in divisors(cp_size) if c > 1 and cp_size % c**2 == 0], group)


def best_team_ring(cp_size: int, group: int) -> Plan:
    return best([team_ring(cp_size, c) for c in divisors(cp_size)], group)


def best_mesh(cp_size: int, group: int) -> Plan:
    """A two-dimensional tile: queries and keys gathered, no ring."""
    return best([Plan(Grid(team=c, kv_team=cp_size // c)) for c in divisors(cp_size)], group)


def prints_as(value: float, printed: str) -> bool:
    """Whether a value rounds to the figure as printed, half a unit of its last place either way."""
    figure = Decimal(printed)
    return abs(value - float(figure)) <= 0.5001 * 10.0 ** figure.as_tuple().exponent


def test_team_ring_of_64_meets_the_bound() -> None:
    assert forward_ratio(team_ring(64, 8)) == 1


def test_published_scheme_of_64_is_at_11_sevenths_of_the_bound() -> None:
    assert forward_ratio(published(64, 4)) == pytest.approx(11 / 7)
    assert prints_as(forward_ratio(published(64, 4)), "1.57")


def test_ring_of_64_is_at_four_and_a_half_times_the_bound() -> None:
    assert forward_ratio(ring(64)) == 4.5


@pytest.mark.parametrize(
    ("cp_size", "group", "single_ring", "paper", "ours", "our_team"),
    [
        (16, 1, "2.50", "1.67", "1.00", 4),
        (64, 1, "4.50", "1.57", "1.00", 8),
        (256, 1, "8.50", "1.53", "1.00", 16),
        (64, 8, "1.74", "1.13", "1.08", 2),
        (1024, 1, "16.5", None, "1.00", 32),
    ],
)
def test_table_of_the_design(
    cp_size: int, group: int, single_ring: str, paper: str | None, ours: str, our_team: int
) -> None:
    plan = best_team_ring(cp_size, group)
    assert plan.grid.team == our_team
    assert prints_as(forward_ratio(plan, group), ours)
    assert prints_as(forward_ratio(ring(cp_size), group), single_ring)
    assert paper is None or prints_as(forward_ratio(best_published(cp_size, group), group), paper)


#: P, query heads a kv head, the bound, and (words, ratio) of the ring, of the published scheme with C = 2, 4, 8, and
#: of the best two-dimensional tile, all in units of H*N.
TABLE = [
    (16, 1, "0.750", ("1.875", "2.5"), ("1.250", "1.67"), ("1.250", "1.67"), None, ("0.750", "1.00")),
    (32, 1, "0.582", ("1.938", "3.3"), ("1.125", "1.93"), ("0.875", "1.50"), None, ("0.625", "1.07")),
    (64, 1, "0.4375", ("1.969", "4.5"), ("1.063", "2.43"), ("0.688", "1.57"), ("0.688", "1.57"), ("0.4375", "1.00")),
    (256, 1, "0.234", ("1.992", "8.5"), ("1.016", "4.3"), ("0.547", "2.3"), ("0.359", "1.53"), ("0.234", "1.00")),
    (64, 4, "0.211", ("0.492", "2.3"), ("0.289", "1.37"), ("0.242", "1.15"), ("0.336", "1.59"), ("0.211", "1.00")),
    (32, 8, "0.180", ("0.242", "1.35"), ("0.195", "1.09"), ("0.273", "1.52"), None, ("0.180", "1.00")),
    (64, 8, "0.142", ("0.246", "1.74"), ("0.160", "1.13"), ("0.168", "1.19"), ("0.277", "1.96"), ("0.152", "1.08")),
    (256, 8, "0.080", ("0.249", "3.1"), ("0.134", "1.68"), ("0.089", "1.12"), ("0.093", "1.17"), ("0.085", "1.07")),
]
CELLS = [
    (cp_size, group, name, *cell)
    for cp_size, group, _, *cells in TABLE
    for name, cell in zip(("ring", 2, 4, 8, "mesh"), cells, strict=True)
    if cell is not None
]


@pytest.mark.parametrize(("cp_size", "group", "bound"), [row[:3] for row in TABLE])
def test_known_bounds(cp_size: int, group: int, bound: str) -> None:
    assert prints_as(forward_bound(cp_size, 1 / group) / cp_size, bound)


def _plan_of(name: object, cp_size: int, group: int) -> Plan:
    if name == "ring":
        return ring(cp_size)
    return best_mesh(cp_size, group) if name == "mesh" else published(cp_size, name)


@pytest.mark.parametrize(("cp_size", "group", "name", "printed", "times"), CELLS)
def test_known_words_and_ratios(cp_size: int, group: int, name: object, printed: str, times: str) -> None:
    plan = _plan_of(name, cp_size, group)
    assert prints_as(forward_words(plan, group) / cp_size, printed)
    assert prints_as(forward_ratio(plan, group), times)
