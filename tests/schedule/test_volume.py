"""Volume counted from schedules against the closed formulas, and against the known figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from decimal import Decimal
from math import isqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_wallfacer.schedule.grid import Grid, divisors
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.volume import Shape, messages, received_bytes, received_elements, rows_bytes
from megatron_wallfacer.schedule.volume_bounds import forward_bound, ratio
from tests.schedule.cases import published

SHAPE = Shape(tokens=8, q_heads=4, kv_heads=2, head_dim=16)
#: Bytes of one shard of SHAPE: bf16 inputs, fp32 accumulators.
Q, K, OUT, DQ, DK, LSE = 1024, 512, 2048, 2048, 1024, 128
heads = st.sampled_from([(1, 1), (8, 8), (8, 4), (8, 2), (8, 1)])


@st.composite
def grids(draw: st.DrawFn, largest: int = 4096, longest_ring: int = 128) -> Grid:
    """Without a head axis."""
    team = draw(st.integers(1, min(largest, 64)))
    kv_team = draw(st.integers(1, min(largest // team, 64)))
    outer = draw(st.integers(1, min(largest // (team * kv_team), longest_ring)))
    inner = draw(st.integers(1, max(1, min(largest // (team * kv_team * outer), longest_ring // outer))))
    return Grid(team=team, kv_team=kv_team, ring_outer=outer, ring_inner=inner)


@st.composite
def published_plans(draw: st.DrawFn, largest: int = 4096, longest_ring: int = 128) -> Plan:
    team = draw(st.integers(2, isqrt(largest)))
    return published(team**2 * draw(st.integers(1, min(largest // team**2, longest_ring))), team)


def shape_of(q_heads: int, kv_heads: int) -> Shape:
    return Shape(tokens=1, q_heads=q_heads, kv_heads=kv_heads, head_dim=1)


def jumps(schedule: Schedule) -> int:
    """Transfers across the whole group: into the published order, and out of it."""
    return sum(transfer.axis == "cp" for transfer in schedule.transfers)


# --- the closed formulas, q and kv being the elements of one shard of Q and of K ---


@settings(max_examples=400)
@given(grids(), heads, st.data())
def test_native_forward_volume(grid: Grid, heads: tuple[int, int], data: st.DataObject) -> None:
    (q, kv), (c, g, r) = heads, (grid.team, grid.kv_team, grid.ring)
    rank = data.draw(st.integers(0, grid.cp_size - 1))
    expected = 2 * (c - 1) * q + 2 * (g - 1) * kv + 2 * g * (r - 1) * kv
    assert received_elements(forward_schedule(Plan(grid), rank), shape_of(q, kv)) == expected


@settings(max_examples=400)
@given(grids(), heads, st.booleans(), st.data())
def test_native_backward_volume(grid: Grid, heads: tuple[int, int], keep_gathered_q: bool, data: st.DataObject) -> None:
    (q, kv), (c, g, r) = heads, (grid.team, grid.kv_team, grid.ring)
    rank = data.draw(st.integers(0, grid.cp_size - 1))
    expected = (3 - keep_gathered_q) * (c - 1) * q + 4 * (g - 1) * kv + 4 * g * (r - 1) * kv
    assert (
        received_elements(backward_schedule(Plan(grid), rank, keep_gathered_q=keep_gathered_q), shape_of(q, kv))
        == expected
    )


@settings(max_examples=400)
@given(published_plans(), heads, st.data())
def test_published_forward_volume(plan: Plan, heads: tuple[int, int], data: st.DataObject) -> None:
    (q, kv), (c, r) = heads, (plan.grid.team, plan.grid.ring)
    schedule = forward_schedule(plan, data.draw(st.integers(0, plan.grid.cp_size - 1)))
    permuted = jumps(schedule)
    assert (
        received_elements(schedule, shape_of(q, kv))
        == 2 * (q + kv) * (c - 1) + 2 * kv * c * (r - 1) + 2 * kv * c * permuted
    )


@settings(max_examples=400)
@given(published_plans(), heads, st.booleans(), st.data())
def test_published_backward_volume(
    plan: Plan, heads: tuple[int, int], keep_gathered_q: bool, data: st.DataObject
) -> None:
    (q, kv), (c, r) = heads, (plan.grid.team, plan.grid.ring)
    rank = data.draw(st.integers(0, plan.grid.cp_size - 1))
    schedule = backward_schedule(plan, rank, keep_gathered_q=keep_gathered_q)
    gathered = (2 - keep_gathered_q) * q * (c - 1) + 2 * kv * (c - 1)
    reduced = q * (c - 1) + 2 * kv * (c - 1)
    ring = 3 * q * c * (r - 1)
    # Q in one jump, dO in another, and dQ home; none of a rank that keeps its block.
    permuted = 3 * q * c * bool(jumps(schedule))
    assert jumps(schedule) in (0, 3)
    assert received_elements(schedule, shape_of(q, kv)) == gathered + reduced + ring + permuted


@settings(max_examples=100)
@given(grids(longest_ring=64), st.data())
def test_head_dim_of_values_counts_for_values_and_outputs(grid: Grid, data: st.DataObject) -> None:
    schedule = forward_schedule(Plan(grid), data.draw(st.integers(0, grid.cp_size - 1)))
    shape = Shape(tokens=4, q_heads=4, kv_heads=2, head_dim=3, v_head_dim=5, batch=7)
    rows = 4 * 7
    moved = (grid.team - 1) * 4 * (3 + 5) + (grid.cp_size // grid.team - 1) * 2 * (3 + 5)
    assert received_elements(schedule, shape) == rows * moved


# --- bytes ---


def test_bytes_of_one_shard() -> None:
    sizes = {"q": Q, "dout": Q, "k": K, "v": K, "out": OUT, "dq": DQ, "dk": DK, "dv": DK, "lse": LSE, "delta": LSE}
    assert {tensor: SHAPE.bytes(tensor) for tensor in sizes} == sizes


def test_bytes_of_some_rows_of_a_part() -> None:
    # U = 2: a rank has half the heads, of four chunks; kv heads that both need are counted for both.
    schedule = forward_schedule(Plan(Grid(head=2, ring_outer=2)), 0)
    assert rows_bytes(schedule, SHAPE, ("q",), 4) == Q
    assert rows_bytes(schedule, SHAPE, ("k", "v"), 4) == 2 * K
    one_kv_head = Shape(tokens=8, q_heads=4, kv_heads=1, head_dim=16)
    assert rows_bytes(schedule, one_kv_head, ("k",), 4) == 2 * one_kv_head.bytes("k")


def test_messages_of_a_team_ring() -> None:
    schedule = forward_schedule(Plan(Grid(team=4, ring_outer=4)), 5)
    assert messages(schedule) == 3 + 3 + 3  # Q, K and V, partial outputs


def test_received_bytes_of_a_team_ring() -> None:
    grid = Grid(team=2, ring_outer=4)
    assert received_bytes(forward_schedule(Plan(grid), 3), SHAPE) == Counter(
        {
            ("team", "q"): Q,
            ("team", "out"): OUT,
            ("team", "lse"): LSE,
            ("ring_outer", "k"): 3 * K,
            ("ring_outer", "v"): 3 * K,
        }
    )
    assert received_bytes(backward_schedule(Plan(grid), 3), SHAPE) == Counter(
        {
            ("team", "q"): Q,
            ("team", "dout"): Q,
            ("team", "lse"): LSE,
            ("team", "delta"): LSE,
            ("team", "dq"): DQ,
            ("ring_outer", "k"): 3 * K,
            ("ring_outer", "v"): 3 * K,
            ("ring_outer", "dk"): 3 * DK,
            ("ring_outer", "dv"): 3 * DK,
        }
    )


@settings(max_examples=100)
@given(grids(largest=256), st.data())
def test_volume_is_the_bytes_without_statistics(grid: Grid, data: st.DataObject) -> None:
    shape = Shape(tokens=2, q_heads=4, kv_heads=2, head_dim=8, itemsize=1, accumulate_itemsize=1)
    schedule = backward_schedule(Plan(grid), data.draw(st.integers(0, grid.cp_size - 1)))
    by_tensor = received_bytes(schedule, shape)
    assert received_elements(schedule, shape) == sum(
        size for (_, tensor), size in by_tensor.items() if tensor not in ("lse", "delta")
    )


# --- known figures ---


def busiest(plan: Plan) -> Schedule:
    """Forward schedule of a rank that receives the most: one that the permutation gives a block, if any does."""
    if plan.kv_order == "native":
        return forward_schedule(plan, 0)
    schedules = (forward_schedule(plan, rank) for rank in range(plan.grid.cp_size))
    moving = (schedule for schedule in schedules if jumps(schedule))
    return next(moving, None) or forward_schedule(plan, 0)


def forward_units(plan: Plan, group: int) -> float:
    """In query shards, for ``group`` query heads to a kv head."""
    shape = shape_of(group, 1)
    return received_elements(busiest(plan), shape) / shape.unit


def forward_ratio(plan: Plan, group: int = 1) -> float:
    return ratio(forward_units(plan, group), forward_bound(plan.grid.cp_size, 1 / group))


def ring(cp_size: int) -> Plan:
    return Plan(Grid(ring_outer=cp_size))


def team_ring(cp_size: int, team: int) -> Plan:
    return Plan(Grid(team=team, ring_outer=cp_size // team))


def best(plans: Iterable[Plan], group: int) -> Plan:
    return min(plans, key=lambda plan: forward_units(plan, group))


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


#: P, query heads a kv head, the bound, and (volume, ratio) of the ring, of the published scheme with C = 2, 4, 8, and
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
def test_known_volumes_and_ratios(cp_size: int, group: int, name: object, printed: str, times: str) -> None:
    plan = _plan_of(name, cp_size, group)
    assert prints_as(forward_units(plan, group) / cp_size, printed)
    assert prints_as(forward_ratio(plan, group), times)
