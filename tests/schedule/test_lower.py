"""Lowered programs: each step touches the memory of its own operation, and no memory that a message may still use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product, takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_wallfacer.schedule import program as steps
from megatron_wallfacer.schedule.formulas import busiest_rank
from megatron_wallfacer.schedule.heads import head_groups
from megatron_wallfacer.schedule.lifetimes import (
    aliases,
    lifetimes,
    local_part_key,
    local_parts,
    proxy_key,
    rows_key,
    value_key,
)
from megatron_wallfacer.schedule.lower import lower
from megatron_wallfacer.schedule.mask import CAUSAL, FULL, Mask, chunk_mask_of
from megatron_wallfacer.schedule.memory import kept_buffers, workspace
from megatron_wallfacer.schedule.ops import Accumulate, Attend, Concat, Op, Schedule, SendRecv, Transfer, reads, writes
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.program import WORKSPACE, Operand, Program, ProgramStep
from megatron_wallfacer.schedule.rows import contiguous
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.volume import Shape, received_bytes, rows_bytes
from megatron_wallfacer.schedule.workspace import aligned
from tests.schedule.cases import all_plans, plans

Bytes = tuple[int, int]
CHUNK = 4


def shape_of(heads: tuple[int, int]) -> Shape:
    return Shape(tokens=2 * CHUNK, q_heads=heads[0], kv_heads=heads[1], head_dim=8, v_head_dim=16)


def strides_of(shape: Shape, schedule: Schedule, head: int) -> dict[str, tuple[int, ...]]:
    """Of contiguous own tensors."""
    widths = {"q": 8, "k": 8, "v": 16, "dout": 16, "out": 16, "lse": 0, "delta": 0}
    names = ("q", "k", "v") if not schedule.backward or head == 1 else ()
    found = {}
    for name in (*names, *(("dout", "out", "lse", "delta") if schedule.backward else ())):
        heads = shape.kv_heads if name in ("k", "v") else shape.q_heads
        found[name] = contiguous((shape.tokens, 1, heads, *([widths[name]] if widths[name] else [])))
    return found


def lowered(
    plan: Plan,
    rank: int,
    *,
    backward: bool,
    mask: Mask = CAUSAL,
    keep_gathered_q: bool = False,
    all_to_all: bool = False,
) -> Program:
    heads = 2 * plan.grid.head, 2 * plan.grid.head
    shape = shape_of(heads)
    build = backward_schedule if backward else forward_schedule
    chunk_mask = chunk_mask_of(mask, plan.grid.cp_size, CHUNK)
    groups = head_groups(plan, *heads)
    schedule = build(
        plan, rank, causal=mask.right == 0, groups=groups, keep_gathered_q=keep_gathered_q, chunk_mask=chunk_mask
    )
    strides = strides_of(shape, schedule, plan.grid.head)
    return lower(schedule, shape, mask, strides, varlen=False, all_to_all=all_to_all)


# --- bytes ---


def itemsize(program: Program, operand: Operand) -> int:
    return {"input": program.shape.itemsize, "wide": program.shape.accumulate_itemsize, "bytes": 1}[operand.view]


def spans(program: Program, operand: Operand) -> list[Bytes]:
    """First byte, and the one after the last, of each range of bytes."""
    size, ranges = itemsize(program, operand), [(operand.offset, operand.offset + 1)]
    for length, stride in reversed(list(zip(operand.shape, operand.strides, strict=True))):
        if len(ranges) == 1 and (ranges[0][1] - ranges[0][0] == stride or length == 1):
            ((start, end),) = ranges
            ranges = [(start, start + (end - start) * length)]
        else:
            ranges = [(start + step * stride, end + step * stride) for step in range(length) for start, end in ranges]
    return [(start * size, end * size) for start, end in ranges]


def touched(step: ProgramStep) -> tuple[set[int], set[int]]:
    """Operands that a step reads, and those that it writes."""
    match step:
        case steps.Copy(pairs=pairs):
            return {source for _, source in pairs}, {into for into, _ in pairs}
        case steps.Sum(rows=rows):
            return {one for _, sources in rows for one in sources if isinstance(one, int)}, {into for into, _ in rows}
        case steps.Merge(rows=rows):
            sources = {one for _, parts in rows for part in parts for one in part if isinstance(one, int)}
            return sources, {one for into, _ in rows for one in into}
        case steps.Fill(rows=rows):
            return set(), {operand for operand, _ in rows}
        case steps.OutProxy():
            return {step.dout, step.delta}, {step.into}
        case steps.AttendForward():
            return {step.q, step.k, step.v}, set()
        case steps.AttendBackward():
            return {step.dout, step.q, step.k, step.v, step.out, step.lse}, set()
    return set(), set()


def in_workspace(program: Program, numbers: set[int]) -> Iterator[Bytes]:
    for number in numbers:
        operand = program.operands[number]
        if operand.buffer == WORKSPACE:
            yield from spans(program, operand)


def bytes_of(program: Program, step: ProgramStep) -> tuple[list[Bytes], list[Bytes]]:
    """Ranges of the workspace that a step reads, and those that it writes."""
    if isinstance(step, steps.Permute):
        into, source = program.operands[step.into], program.operands[step.source]
        blocks = [list(_blocks(program, into, range(len(step.index)))), list(_blocks(program, source, step.index))]
        return blocks[1], blocks[0]
    read, written = (list(in_workspace(program, numbers)) for numbers in touched(step))
    return read, written


def _blocks(program: Program, operand: Operand, numbers: Iterable[int]) -> Iterator[Bytes]:
    (_, elements), step = operand.shape, operand.strides[0]
    if operand.buffer == WORKSPACE:
        for number in numbers:
            block = Operand(WORKSPACE, operand.view, (elements,), (1,), operand.offset + number * step)
            yield from spans(program, block)


def ends_of(program: Program, number: int) -> tuple[list[Bytes], list[Bytes]]:
    """Ranges of the workspace that a transfer sends, and those that it receives."""
    transfer = program.transfers[number]
    if isinstance(transfer, steps.AllToAll):
        ends = {transfer.send}, {transfer.receive}
    else:
        ends = tuple({message.operand for message in end} for end in (transfer.sends, transfer.receives))
    sent, received = (list(in_workspace(program, end)) for end in ends)
    return sent, received


def overlap(a: Bytes, b: Bytes) -> bool:
    return a[0] < b[1] and b[0] < a[1]


# --- the checks ---


def regions_of(schedule: Schedule, index: int, op: Op) -> set[object]:
    """Keys of the buffers that an operation may touch."""
    other_names = aliases(schedule)
    found = {value_key(other_names.get(name, name)) for name in (*reads(op), *writes(op))}
    if isinstance(op, Concat) and len(op.sources) == 1:
        return set()
    if isinstance(op, SendRecv):
        found |= {rows_key(index, position) for position in range(len(op.transfer.sends))}
        found |= {local_part_key(index, "sent"), local_part_key(index, "received")}
    found |= {local_part_key(part.start, "received") for part in local_parts(schedule) if part.reader == index}
    if isinstance(op, Attend):
        found |= {proxy_key(op.q)}
    return found


def waiting(schedule: Schedule, index: int) -> set[object]:
    """Keys of buffers that an operation may touch for others before it, whose sums have waited."""
    names = {name for op in schedule.ops[:index] if isinstance(op, Attend) for name in (op.q_into, op.kv_into)}
    other_names = aliases(schedule)
    return {value_key(other_names.get(name, name)) for name in names}


def folded_together(schedule: Schedule, index: int) -> set[object]:
    """Keys of buffers that the last of several Accumulates may touch for all of them."""
    run = list(takewhile(lambda op: isinstance(op, Accumulate), reversed(schedule.ops[: index + 1])))
    other_names = aliases(schedule)
    return {value_key(other_names.get(name, name)) for op in run for name in (op.source, op.into)}


def check_regions(program: Program) -> None:
    """Every step stays inside the buffers of its operation's values, which are alive then."""
    schedule, shape = program.schedule, program.shape
    placement, kept = workspace(schedule, shape), kept_buffers(schedule)
    regions: dict[object, tuple[int, int, Bytes]] = {}
    for life in lifetimes(schedule):
        if life.key not in kept:
            start = placement.offsets[life.key]
            # A permutation fills the padding too.
            end = start + aligned(int(rows_bytes(schedule, shape, life.payload, life.chunks)))
            regions[life.key] = life.first, life.last, (start, end)
    indices = {id(op): index for index, op in enumerate(schedule.ops)}
    for label, found in program.steps:
        if isinstance(label, Transfer):
            continue
        index = indices[id(label)]
        keys = regions_of(schedule, index, label) | folded_together(schedule, index)
        if any(isinstance(step, steps.Sum | steps.Merge) for step in found):
            keys |= waiting(schedule, index)
        mine = (regions[key] for key in keys if key in regions)
        allowed = side_by_side(region for first, last, region in mine if first <= index <= last)
        for step in found:
            for start, end in (span for found in bytes_of(program, step) for span in found):
                assert any(low <= start and end <= high for low, high in allowed), (label, step)


def side_by_side(regions: Iterable[Bytes]) -> list[Bytes]:
    """Regions that follow one another without a gap as one."""
    found: list[Bytes] = []
    for start, end in sorted(regions):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def check_flights(program: Program) -> None:
    """What a transfer sends is not written, and what it receives is not touched, until it has been waited for."""
    sent: dict[int, list[Bytes]] = {}
    coming: dict[int, list[Bytes]] = {}
    waited = set()
    for _, found in program.steps:
        for step in found:
            match step:
                case steps.PostReceives(transfer=number) | steps.SendReceive(transfer=number):
                    leaving, coming[number] = ends_of(program, number)
                    if isinstance(step, steps.SendReceive):
                        sent[number] = leaving
                case steps.Wait(transfer=number):
                    del sent[number]
                    coming.pop(number, None)
                    waited.add(number)
            read, written = bytes_of(program, step)
            for mine in (one for flight in sent.values() for one in flight):
                assert not any(overlap(mine, other) for other in written), step
            for mine in (one for flight in coming.values() for one in flight):
                assert not any(overlap(mine, other) for other in (*read, *written)), step
            _check_apart(sent, coming)
    assert not sent
    assert waited == set(range(len(program.transfers)))


def _check_apart(sent: Mapping[int, list[Bytes]], coming: Mapping[int, list[Bytes]]) -> None:
    """Nothing arrives where something else arrives or leaves."""
    arriving = [one for flight in coming.values() for one in flight]
    for index, mine in enumerate(arriving):
        assert not any(overlap(mine, other) for other in arriving[index + 1 :])
        assert not any(overlap(mine, other) for flight in sent.values() for other in flight)


def check(program: Program) -> None:
    check_regions(program)
    check_flights(program)
    assert program.received == received_bytes(program.schedule, program.shape)
    for operand in program.operands:
        if operand.buffer == WORKSPACE:
            assert all(0 <= start < end <= program.workspace_bytes for start, end in spans(program, operand))


def check_exchanges(plan: Plan, rank: int, program: Program) -> None:
    """Every transfer along the head axis is one all-to-all of that group, with a part for each rank."""
    check(program)
    for planned, transfer in zip(program.schedule.transfers, program.transfers, strict=True):
        assert isinstance(transfer, steps.AllToAll) == (planned.axis == "head")
        if isinstance(transfer, steps.AllToAll):
            assert transfer.ranks == plan.grid.neighbours(rank, "head")
            sizes = [program.operands[number].shape[0] for number in (transfer.send, transfer.receive)]
            part = rows_bytes(program.schedule, program.shape, planned.payload, 2)
            assert sizes == [len(transfer.ranks) * aligned(int(part))] * 2


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 6])
def test_every_small_plan(cp_size: int, backward: bool) -> None:
    for plan in all_plans(cp_size):
        for rank, keep_gathered_q in product({0, busiest_rank(plan)}, (False, True)):
            check(lowered(plan, rank, backward=backward, keep_gathered_q=keep_gathered_q))
            if plan.grid.head > 1:
                check_exchanges(
                    plan, rank, lowered(plan, rank, backward=backward, keep_gathered_q=keep_gathered_q, all_to_all=True)
                )


@settings(max_examples=60)
@given(plans(largest=64), st.booleans(), st.booleans(), st.data())
def test_any_plan(plan: Plan, backward: bool, causal: bool, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, plan.grid.cp_size - 1))
    check(lowered(plan, rank, backward=backward, mask=CAUSAL if causal else FULL))


@settings(max_examples=60)
@given(plans(largest=24), st.booleans(), st.data())
def test_any_mask(plan: Plan, backward: bool, data: st.DataObject) -> None:
    tokens = 2 * plan.grid.cp_size * CHUNK
    ends = data.draw(st.sets(st.integers(1, tokens - 1), max_size=5))
    left = data.draw(st.none() | st.integers(0, tokens))
    mask = Mask(left=left, documents=(0, *sorted(ends), tokens))
    rank = data.draw(st.integers(0, plan.grid.cp_size - 1))
    check(lowered(plan, rank, backward=backward, mask=mask))


def test_a_region_that_is_reused_too_early_is_noticed() -> None:
    program = lowered(all_plans(4)[0], 0, backward=True)
    moved = tuple(
        operand._replace(offset=0) if operand.buffer == WORKSPACE else operand for operand in program.operands
    )
    from dataclasses import replace

    with pytest.raises(AssertionError):
        check(replace(program, operands=moved))


# --- alignment ---


@pytest.mark.parametrize(("chunk", "heads"), [(1, (1, 1)), (3, (3, 1)), (5, (4, 2))])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_tensors_of_a_message_lie_side_by_side_each_aligned_to_its_elements(
    chunk: int, heads: tuple[int, int], itemsize: int
) -> None:
    """Odd sizes too: with bfloat16 no view of the statistics may begin at a multiple of two only."""
    plan = Plan(all_plans(4)[-1].grid, backward="pass-q")
    wide = max(4, itemsize)
    shape = Shape(2 * chunk, *heads, 5, 7, itemsize=itemsize, accumulate_itemsize=wide)
    schedule = backward_schedule(plan, 0)
    widths = {"q": 5, "k": 5, "v": 7, "dout": 7, "out": 7}
    strides = {
        name: contiguous((2 * chunk, 1, heads[name in "kv"], *([widths[name]] if name in widths else [])))
        for name in ("q", "k", "v", "dout", "out", "lse", "delta")
    }
    program = lower(schedule, shape, CAUSAL, strides, varlen=False)
    messages = {message.operand for transfer in program.transfers for message in (*transfer.sends, *transfer.receives)}
    assert messages
    for message in (program.operands[number] for number in messages):
        assert message.view == "bytes"
        assert message.offset % 128 == 0
