"""The comparison of the exactness tests can fail: runs that are wrong on purpose are noticed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_wallfacer.attention import forget_groups
from megatron_wallfacer.engine import call
from megatron_wallfacer.schedule.accumulator import Accumulator, Part
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.ops import Accumulate, Concat, Message, Op, PostRecv, Schedule, SendRecv
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.rows import Range
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.tiles import Tile, tiles
from tests.engine.passes import TENSORS, Case, errors, run_cases
from tests.support.dense import Problem
from tests.support.pool import Pool

PACKAGE = "megatron_wallfacer"
PLANS = {
    "team-ring": Plan(Grid(team=2, ring_outer=4)),
    "loongtrain": Plan(Grid(head=2, ring_outer=4), backward="pass-q", head_groups=2),
    "wallfacer": Plan(Grid(team=2, kv_team=2, ring_outer=2), kv_order="paper", backward="pass-q"),
    "mesh": Plan(Grid(team=4, kv_team=2)),
}
GRADIENTS = TENSORS[1:]

# --- what is done wrong in the engine, or in the tiles ---


def _flipped(q_chunks: Sequence[int], k_chunks: Sequence[int], **options: object) -> tuple[Tile, ...]:
    return tuple(replace(tile, causal=False) for tile in tiles(q_chunks, k_chunks, **options))


def _dropped(q_chunks: Sequence[int], k_chunks: Sequence[int], **options: object) -> tuple[Tile, ...]:
    return tiles(q_chunks, k_chunks, **options)[:-1]


def _plain_mean(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    out.add_(part_out).div_(2)
    lse.copy_(torch.logaddexp(lse, part_lse))


_take = Accumulator.take


def _last_wins(self: Accumulator) -> list[tuple[Range, bool, tuple[Part, ...]]]:
    return [(rows, False, parts[-1:]) for rows, _, parts in _take(self)]


def _no_delta(dout: Tensor, delta: Tensor, proxy: Tensor) -> None:
    proxy.zero_()


def _shifted(source: Sequence[int], into: Sequence[int], chunks: Iterable[int]) -> Iterator[tuple[Range, Range]]:
    """As if every block's rows stood in the order in which they come."""
    for index, chunk in enumerate(sorted(chunks)):
        place = source.index(chunk)
        yield (place, place + 1), (index, index + 1)


# --- what is done wrong in a schedule ---


def _with_ops(schedule: Schedule, ops: Iterable[Op]) -> Schedule:
    return replace(schedule, ops=tuple(ops))


def _without_a_result(schedule: Schedule) -> Schedule:
    """What the last Accumulate adds is still waited for."""
    last = next(op for op in reversed(schedule.ops) if isinstance(op, Accumulate))
    unused = {"unused": schedule.values[last.source]}
    ops = (Concat("unused", (last.source,)) if op is last else op for op in schedule.ops)
    return replace(schedule, ops=tuple(ops), values={**schedule.values, **unused})


def _with_a_result_twice(schedule: Schedule) -> Schedule:
    indices = [index for index, op in enumerate(schedule.ops) if isinstance(op, Accumulate)]
    return _with_ops(
        schedule, (op for index, op in enumerate(schedule.ops) for _ in range(1 + (index in indices[-1:])))
    )


def _with_receives(schedule: Schedule, changed: Mapping[Message, Message]) -> Schedule:
    """Expect and Start of a transfer know each other by its identity, so they get the same new transfer."""
    transfers = {
        id(transfer): replace(transfer, receives=tuple(changed.get(message, message) for message in transfer.receives))
        for transfer in schedule.transfers
    }
    return _with_ops(
        schedule,
        (
            replace(op, transfer=transfers[id(op.transfer)]) if isinstance(op, PostRecv | SendRecv) else op
            for op in schedule.ops
        ),
    )


def _with_tags_swapped(schedule: Schedule) -> Schedule:
    """On one rank, the first two messages that another sends alike are taken for one another."""
    if schedule.rank:
        return schedule
    alike: dict[tuple[int, tuple[str, ...], int], list[Message]] = defaultdict(list)
    for transfer in schedule.transfers:
        for message in transfer.receives:
            alike[message.peer, transfer.payload, len(message.chunks)].append(message)
    first, second = next(messages[:2] for messages in alike.values() if len(messages) > 1)
    return _with_receives(schedule, {first: replace(first, tag=second.tag), second: replace(second, tag=first.tag)})


def _with_peers_swapped(schedule: Schedule) -> Schedule:
    """What two ranks send in one transfer is taken for one another."""
    first, second, *_ = next(transfer.receives for transfer in schedule.transfers if len(transfer.receives) > 1)
    return _with_receives(
        schedule, {first: replace(first, value=second.value), second: replace(second, value=first.value)}
    )


@dataclass(frozen=True)
class Sabotage:
    """Something wrong.

    Attributes:
        spoils: the tensors that must suffer.
        target, replacement: what is replaced by what.
        forward, backward: how the schedules of every rank are changed.
        plans: the plans in which there is something to sabotage.
    """

    spoils: tuple[str, ...]
    target: str | None = None
    replacement: Callable | None = None
    forward: Callable[[Schedule], Schedule] | None = None
    backward: Callable[[Schedule], Schedule] | None = None
    plans: tuple[str, ...] = tuple(PLANS)


WITH_TEAMS = ("team-ring", "wallfacer", "mesh")
SABOTAGE = {
    "causal flag of a tile flipped": Sabotage(TENSORS, f"{PACKAGE}.schedule.head_group.tiles", _flipped),
    "a tile dropped": Sabotage(TENSORS, f"{PACKAGE}.schedule.head_group.tiles", _dropped),
    "lse ignored in a merge": Sabotage(("out",), f"{PACKAGE}.engine.merge.merge_into", _plain_mean),
    "results replaced, not added": Sabotage(TENSORS, f"{PACKAGE}.schedule.accumulator.Accumulator.take", _last_wins),
    "delta ignored in backward": Sabotage(("dq", "dk"), f"{PACKAGE}.engine.steps.out_proxy", _no_delta),
    "rows left unsorted": Sabotage(
        ("out",), f"{PACKAGE}.schedule.lower_values.common_rows", _shifted, plans=("loongtrain", "wallfacer", "mesh")
    ),
    "a result not accumulated in forward": Sabotage(TENSORS, forward=_without_a_result, plans=WITH_TEAMS),
    "a result not accumulated in backward": Sabotage((), backward=_without_a_result),
    "a result accumulated twice in forward": Sabotage(("out",), forward=_with_a_result_twice, plans=WITH_TEAMS),
    "a result accumulated twice in backward": Sabotage((), backward=_with_a_result_twice),
    # Elsewhere swapped tags come to nothing: the ranks wait for each other.
    "tags swapped in forward": Sabotage(("out",), forward=_with_tags_swapped, plans=("team-ring",)),
    "peers swapped in forward": Sabotage(TENSORS, forward=_with_peers_swapped, plans=("mesh",)),
    "peers swapped in backward": Sabotage((), backward=_with_peers_swapped, plans=("mesh",)),
}


@contextmanager
def done(sabotage: Sabotage | None) -> Iterator[None]:
    """On a worker: with the damage done, and passes compiled anew."""
    sabotage = sabotage or Sabotage(())
    forget_groups()

    def changed(make: Callable[..., Schedule], change: Callable[[Schedule], Schedule] | None) -> Callable:
        return lambda plan, rank, **options: (change or (lambda same: same))(make(plan, rank, **options))

    with (
        patch.object(call, "forward_schedule", changed(forward_schedule, sabotage.forward)),
        patch.object(call, "backward_schedule", changed(backward_schedule, sabotage.backward)),
    ):
        if sabotage.target is None:
            yield
        else:
            with patch(sabotage.target, sabotage.replacement):
                yield


def sabotaged(rank: int, case: Case, name: str | None) -> list[np.ndarray]:
    """On a worker: one problem, done wrong."""
    with done(None if name is None else SABOTAGE[name]):
        return run_cases(rank, [case])[0]


def case_of(plan: str) -> Case:
    return Case(PLANS[plan], Problem(8))


@pytest.mark.parametrize("plan", PLANS)
def test_comparison_passes_without_sabotage(pools: Callable[[int], Pool], plan: str) -> None:
    case = case_of(plan)
    assert max(errors(case.problem, pools(8).run(sabotaged, case, None)).values()) <= 1e-12


@pytest.mark.parametrize(
    ("name", "plan"), [(name, plan) for name, sabotage in SABOTAGE.items() for plan in sabotage.plans]
)
def test_comparison_notices_sabotage(pools: Callable[[int], Pool], name: str, plan: str) -> None:
    case, spoils = case_of(plan), SABOTAGE[name].spoils
    found = errors(case.problem, pools(8).run(sabotaged, case, name))
    assert all(found[tensor] > 1e-3 for tensor in spoils), found
    # What spoils the backward pass spoils some gradient; which one depends on the ring variant. Forward stays as it is.
    if not spoils:
        assert max(found[tensor] for tensor in GRADIENTS) > 1e-3 > 1e-12 >= found["out"], found


@pytest.mark.parametrize("damage", [1e-10, float("nan")])
def test_comparison_notices_one_wrong_number_on_one_rank(pools: Callable[[int], Pool], damage: float) -> None:
    case = case_of("team-ring")
    ranks = pools(8).run(sabotaged, case, None)
    ranks[2][3].flat[0] += damage
    found = errors(case.problem, ranks)
    assert found["dv"] > 1e-12 >= max(found[name] for name in ("out", "dq", "dk"))
