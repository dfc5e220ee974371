"""The schedule of one rank: the operations of its head groups, interleaved so that tiles hide transfers.

The engine runs the lowered schedule, the counters count its messages, the pictures draw it, and property tests prove it
correct. The schedule of one rank is built without the schedules of other ranks.

The order of operations follows two rules. Results that other ranks wait for are computed first, and sent immediately.
Other results, mainly of local queries and local keys, are computed while the first or the last transfers are in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_wallfacer.schedule import ops
from megatron_wallfacer.schedule.dense import HeadGroupBuilder
from megatron_wallfacer.schedule.emitter import OpEmitter
from megatron_wallfacer.schedule.mask import ChunkMask
from megatron_wallfacer.schedule.operands import OperandRows, PassSpec
from megatron_wallfacer.schedule.ops import GATHERED, LOCAL, RowSet, Schedule, received
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.sparse import SparseHeadGroupBuilder, append_sparse

#: Number of attention operations by which the receives of a transfer are posted before the transfer starts.
POST_AHEAD = 1


def forward_schedule(
    plan: Plan,
    rank: int,
    *,
    causal: bool = True,
    groups: int = 1,
    keep_gathered_q: bool = False,
    chunk_mask: ChunkMask | None = None,
) -> Schedule:
    """Return the schedule of the forward pass of one rank.

    Args:
        plan: grid and choices.
        rank: index in the context-parallel group.
        causal: whether the mask is causal; otherwise attention is full.
        groups: number of head groups, from :func:`megatron_wallfacer.schedule.heads.head_groups`.
        keep_gathered_q: whether forward keeps the gathered queries for backward.
        chunk_mask: unmasked chunk pairs, in place of ``causal``. If the mask is sparse and ``kv_order`` is
            ``native``, ranks exchange rows directly, not around the ring (:mod:`megatron_wallfacer.schedule.sparse`).
    """
    return _schedule(PassSpec(plan, rank, False, causal, groups, keep_gathered_q, chunk_mask))


def backward_schedule(plan: Plan, rank: int, **options: Any) -> Schedule:
    """Return the schedule of the backward pass of one rank. The options are those of :func:`forward_schedule`."""
    return _schedule(PassSpec(plan, rank, True, **options))


def is_sparse(plan: Plan, chunk_mask: ChunkMask | None) -> bool:
    """Return whether ranks send rows directly to the ranks that need the rows, instead of around a ring."""
    return chunk_mask is not None and chunk_mask.is_sparse and plan.kv_order == "native"


def _schedule(spec: PassSpec) -> Schedule:
    grid, groups = spec.plan.grid, spec.groups
    program: list[ops.Op] = []
    values: dict[str, ops.Value] = {}
    first = grid.coordinates(spec.rank)["head"] * groups
    sparse = is_sparse(spec.plan, spec.chunk_mask)
    builder = SparseHeadGroupBuilder if sparse else HeadGroupBuilder
    builders = [builder(spec, OpEmitter(first + group, group, groups, program, values)) for group in range(groups)]
    operands = builders[0].operands
    if sparse:
        append_sparse(builders)
    elif operands.results(operands.ring_operand):
        _append_with_ring_results(builders, operands)
    else:
        _append_without_ring_results(builders, operands)
    return Schedule(
        rank=spec.rank,
        cp_size=grid.cp_size,
        head_slices=grid.head * groups,
        backward=spec.backward,
        values=values,
        ops=_post_early(program),
        given=tuple(sorted(name for builder in builders for name in builder.group.given)),
        keeps=tuple(sorted(name for builder in builders for name in builder.group.keeps)),
    )


def _append_without_ring_results(builders: Sequence[HeadGroupBuilder], operands: OperandRows) -> None:
    """Append all operations of a pass that sends no results around the ring.

    Tiles of local rows against the first blocks of the ring operand come first. Tiles of local rows against the last
    blocks are computed while results of gathered rows are in flight.
    """
    ring = [*operands.first_block, *map(received, range(1, len(operands.ring_steps)))]
    gathers = GATHERED in operands.stationary_rows
    early, late = operands.first_pass, operands.last_pass if gathers else ring[-1:]
    # With a single block, only local rows against local rows can hide the results in flight.
    starting = builders[:1] if ring == [LOCAL] else builders
    _begin(builders, starting, operands)
    for index, builder in enumerate(builders):
        computed = early if builder in starting else ()
        for rows in ring:
            builder.ring.send_next(rows)
            if gathers and rows == ring[-1]:
                builder.compute_last_gathered(rows)
            else:
                builder.compute_stationary(rows, local=rows not in (*computed, *late))
            if rows == ring[0]:
                _start_next(builders, index)
        if index:
            builders[index - 1].group.join_heads()
        for rows in late:
            if rows not in computed:
                builder.group.compute_tiles(LOCAL, rows)
    _end(builders)


def _append_with_ring_results(builders: Sequence[HeadGroupBuilder], operands: OperandRows) -> None:
    """Append all operations of a pass that sends results around the ring.

    Results that must travel the most hops are computed first. Results that stay on this rank are computed last. Only
    the first head group begins with tiles of local rows, because no block has arrived yet.
    """
    is_alone = len(builders) == 1
    blocks, gathers = operands.first_block, GATHERED in operands.stationary_rows
    leaves_local = is_alone and len(operands.first_pass) > 1
    _begin(builders, builders[:1], operands, sends_results=True, leaves_local=leaves_local)
    for index, builder in enumerate(builders):
        computed = operands.first_pass if index == 0 else ()
        if GATHERED in blocks:
            builder.ring.send_next(GATHERED)
        _append_ring(builders, index, computed)
        for rows in blocks if LOCAL in blocks else ():
            if gathers and rows == blocks[-1]:
                builder.compute_last_gathered(rows)
            elif gathers:
                builder.compute_gathered(rows)
            if rows != LOCAL:
                builder.group.compute_tiles(LOCAL, rows)
        if LOCAL not in blocks:
            builder.return_results(operands.stationary)
        if index:
            builders[index - 1].group.join_heads()
        if LOCAL in blocks and (index or leaves_local):
            builder.group.compute_tiles(LOCAL, LOCAL)
        if blocks != (LOCAL,):
            builder.group.accumulate(builder.group.accumulator(operands.ring_operand, blocks[-1]))
            builder.return_results(operands.ring_operand)
    _end(builders)


def _begin(
    builders: Sequence[HeadGroupBuilder],
    starting: Sequence[HeadGroupBuilder],
    operands: OperandRows,
    *,
    sends_results: bool = False,
    leaves_local: bool = False,
) -> None:
    """Start the first transfers, and append tiles of local rows for the head groups in ``starting``.

    Args:
        builders: builders of all head groups.
        starting: builders of the head groups whose tiles are appended.
        operands: operand rows of this rank.
        sends_results: whether to append transfers for results of the ring operand. With gathered stationary rows, these
            results are not complete, and are sent later.
        leaves_local: whether to omit the tiles of local queries against local keys.
    """
    builders[0].group.split_heads()
    for index, builder in enumerate(builders):
        if index == 0:
            builder.start_transfers()
        builder.start_inner_ring()
        if index + 1 < len(builders):
            builders[index + 1].group.split_heads()
        for rows in operands.first_pass if builder in starting else ():
            if not (leaves_local and rows == LOCAL):
                builder.ring.send_next(rows)
                builder.group.compute_tiles(LOCAL, rows)
            if sends_results and rows != LOCAL and GATHERED not in operands.stationary_rows:
                builder.ring.send_results(rows.step)


def _start_next(builders: Sequence[HeadGroupBuilder], index: int) -> None:
    """Start the next head group's transfers. An earlier start would delay the transfers of this head group."""
    if index + 1 < len(builders):
        builders[index + 1].start_transfers()


def _append_ring(builders: Sequence[HeadGroupBuilder], index: int, computed: Sequence[RowSet]) -> None:
    """Append ring steps and the transfers of their results. Skip tiles of local rows against ``computed`` rows."""
    builder, operands, pass_start = builders[index], builders[index].operands, None
    first_pass = () if computed and GATHERED not in operands.stationary_rows else operands.first_pass[1:]
    # A first pass of local rows alone can hide little of the next group's transfers, so these start now.
    if not first_pass:
        _start_next(builders, index)
    for rows in (*operands.later_steps, *first_pass):
        builder.ring.send_next(rows)
        builder.compute_stationary(rows, local=rows not in computed)
        if first_pass and rows == operands.later_steps[0]:
            _start_next(builders, index)
        if pass_start is not None:
            builder.ring.send_results(pass_start)
            pass_start = None
        step = rows.step
        if step == 0 or operands.starts_pass(step):
            continue
        builder.ring.send_results(step)
        # The gradient of a pass is collected at the rank of its first step. That rank waits for it one step later.
        if operands.starts_pass(step + 1) or step + 1 == len(operands.ring_steps):
            pass_start = operands.pass_start(step)
    if pass_start is not None:
        builder.ring.send_results(pass_start)


def _end(builders: Sequence[HeadGroupBuilder]) -> None:
    builders[-1].group.join_heads()
    for builder in builders:
        builder.group.write_results()


def _post_early(program: Sequence[ops.Op]) -> tuple[ops.Op, ...]:
    """Insert :class:`PostRecv` operations, each :data:`POST_AHEAD` attention operations ahead of its transfer."""
    attends = [index for index, op in enumerate(program) if isinstance(op, ops.Attend)]
    posted: dict[int, list[ops.Op]] = {}
    seen = 0
    for op in program:
        seen += isinstance(op, ops.Attend)
        if isinstance(op, ops.SendRecv) and op.transfer.receives and seen:
            posted.setdefault(attends[max(0, seen - POST_AHEAD)], []).append(ops.PostRecv(op.transfer))
    return tuple(step for index, op in enumerate(program) for step in (*posted.get(index, ()), op))
