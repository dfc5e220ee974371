"""An exception in attention() before its pass: no other rank waits, each names the cause, and the next call works."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_wallfacer.attention import attention, forget_groups
from megatron_wallfacer.engine import groups
from megatron_wallfacer.engine.agreement import calls
from megatron_wallfacer.schedule.schemes import make_plan
from tests.support.pool import Pool

ERRORS = {"type": TypeError, "memory": MemoryError, "interrupt": KeyboardInterrupt}
CHECKS = "megatron_wallfacer.attention.checks.select_kernel"
EXCHANGE = "megatron_wallfacer.engine.agreement.exchange.Exchange"
PLAN = make_plan("ring", 4)
#: Those who wait are told by the store, which the first rank polls.
LIMIT_S = 30


def one_call(group: dist.ProcessGroup) -> str:
    """The error of a call of attention; empty if there is none."""
    q = torch.ones(1, 8, 2, 8)
    try:
        attention(q, q, q, plan=PLAN, group=group, kernel="reference")
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def outcome(rank: int, ranks: tuple[int, ...], error: str, place: str, call: int) -> tuple[str, float, str]:
    """Error and seconds of a call that some ranks break, and the error of the next one."""
    group = dist.new_group([0, 1, 2, 3])
    if call > 1:
        assert one_call(group) == ""
        calls._made[group] = call - 1

    def broken(*_: Any, **__: Any) -> None:
        raise ERRORS[error]("no choice\nin many lines")

    with pytest.MonkeyPatch.context() as patch:
        if rank in ranks:
            patch.setattr(place, broken)
        started = time.monotonic()
        first = one_call(group)
        seconds = time.monotonic() - started
    dist.barrier(group)
    again = one_call(group)
    forget_groups()
    dist.barrier(group)
    return first, seconds, again


def wanted(ranks: tuple[int, ...], rank: int, error: str, others: str) -> tuple[str, ...]:
    name = ERRORS[error].__name__
    if rank in ranks:
        return (f"{name}: no choice",)
    return tuple(others.format(one, name) for one in ranks)


@pytest.mark.parametrize("ranks", [(0,), (2,), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("error", ERRORS)
def test_in_the_first_calls_every_rank_names_the_cause(
    pools: Callable[[int], Pool], ranks: tuple[int, ...], error: str
) -> None:
    """Nothing has been sent, so the next call works on all ranks."""
    others = "DisagreementError: attention(), call 2: rank {} failed before its first message: {}: no choice"
    outcomes = pools(4).run(outcome, ranks, error, CHECKS, 2)
    for rank, (first, seconds, again) in enumerate(outcomes):
        assert first.startswith(wanted(ranks, rank, error, others)), first
        assert "\n" not in first or rank in ranks
        assert seconds < LIMIT_S
        assert again == ""


@pytest.mark.parametrize("ranks", [(1,), (0, 1, 2, 3)], ids=str)
def test_in_later_calls_ranks_that_wait_for_messages_name_the_cause(
    pools: Callable[[int], Pool], ranks: tuple[int, ...]
) -> None:
    others = "WallfacerError: rank {} failed before a pass: {}: no choice; attention's groups are closed"
    outcomes = pools(4).run(outcome, ranks, "interrupt", CHECKS, calls.CALLS + 1)
    for rank, (first, seconds, again) in enumerate(outcomes):
        assert first.startswith(wanted(ranks, rank, "interrupt", others)), first
        assert seconds < LIMIT_S
        assert "KeyboardInterrupt: no choice; attention's groups are closed: start the job again" in again


@pytest.mark.parametrize(
    ("rank", "place"), [(0, f"{EXCHANGE}._collect"), (2, f"{EXCHANGE}._leave")], ids=["before", "after the verdict"]
)
def test_a_rank_that_is_interrupted_while_calls_are_compared(
    pools: Callable[[int], Pool], rank: int, place: str
) -> None:
    outcomes = pools(4).run(outcome, (rank,), "interrupt", place, 2)
    for one, (first, seconds, _) in enumerate(outcomes):
        assert seconds < LIMIT_S
        assert "KeyboardInterrupt: no choice" in first
        assert one == rank or f"rank {rank} failed before " in first


def interrupted_while_groups_are_made(rank: int, ranks: tuple[int, ...]) -> tuple[str, float, str]:
    """Error and seconds of a first call with a SIGINT on some ranks between two collective calls; the next error."""
    group = dist.new_group([0, 1, 2, 3])

    def everyone(*arguments: Any, **keywords: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return members(*arguments, **keywords)

    members = groups._everyone
    # A job that a shell has put in the background ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        if rank in ranks:
            patch.setattr(groups, "_everyone", everyone)
        started = time.monotonic()
        first = one_call(group)
        seconds = time.monotonic() - started
    signal.signal(signal.SIGINT, before)
    dist.barrier(group)
    again = one_call(group)
    forget_groups()
    dist.barrier(group)
    return first, seconds, again


@pytest.mark.parametrize("ranks", [(0,), (2,), (0, 1, 2, 3)], ids=str)
def test_an_interrupt_while_groups_are_made(pools: Callable[[int], Pool], ranks: tuple[int, ...]) -> None:
    outcomes = pools(4).run(interrupted_while_groups_are_made, ranks)
    for rank, (first, seconds, again) in enumerate(outcomes):
        assert seconds < LIMIT_S
        cause = "failed before a pass: KeyboardInterrupt; attention's groups are closed"
        assert first == "KeyboardInterrupt: " if rank in ranks else cause in first, first
        assert cause in again, again
