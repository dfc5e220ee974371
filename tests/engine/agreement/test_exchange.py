"""The exchange of records through a store, with a thread in the place of each rank."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_wallfacer.engine.agreement import exchange
from megatron_wallfacer.engine.agreement.compare import Record, Verdict, compare
from megatron_wallfacer.engine.agreement.exchange import Exchange


def exchanged(
    texts: Mapping[int, Record], ranks: int, seconds: float = 10.0, before: Callable[[int], object] = lambda rank: None
) -> tuple[dict[int, Verdict], list[str]]:
    """Verdict by rank, and what was printed. A rank without a record does not come."""
    store, said = dist.HashStore(), []

    def join(rank: int) -> Verdict:
        before(rank)
        exchange = Exchange(store, range(ranks), rank, timedelta(seconds=seconds), say=said.append)
        return exchange.run(texts[rank].to_text(), Record.from_text, compare)

    with ThreadPoolExecutor(ranks) as pool:
        return dict(zip(texts, pool.map(join, texts), strict=True)), said


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "NOTICE_S", 0.1)
    monkeypatch.setattr(exchange, "POLL_S", 0.05)


def same(ranks: int) -> dict[int, Record]:
    return {rank: Record({"--x": "1"}) for rank in range(ranks)}


def test_all_ranks_get_the_same_verdict() -> None:
    verdicts, said = exchanged(same(4), 4)
    assert verdicts == dict.fromkeys(range(4), Verdict())
    assert not said
    verdicts, _ = exchanged(same(4) | {2: Record({"--x": "2"})}, 4)
    assert verdicts == dict.fromkeys(range(4), Verdict(("rank 2 has --x 2, ranks 0, 1, 3 have 1",)))


def test_a_late_rank_is_named_and_waited_for(quick: None) -> None:
    verdicts, said = exchanged(same(3), 3, before=lambda rank: time.sleep(0.5 * (rank == 2)))
    assert set(verdicts.values()) == {Verdict()}
    assert any(line.startswith("rank 2 has not started after 0 s; the others wait") for line in said)


def test_a_late_first_rank_is_named(quick: None) -> None:
    verdicts, said = exchanged(same(3), 3, before=lambda rank: time.sleep(0.5 * (rank == 0)))
    assert set(verdicts.values()) == {Verdict()}
    assert said == ["rank 0 has not started after 0 s; the others wait"]


@pytest.mark.parametrize("absent", [0, 2])
def test_a_rank_that_never_comes_fails_the_job_at_the_timeout(quick: None, absent: int) -> None:
    ranks = same(3)
    del ranks[absent]
    started, all_here = time.monotonic(), threading.Barrier(len(ranks))
    verdicts, _ = exchanged(ranks, 3, seconds=1.0, before=lambda rank: all_here.wait())
    assert 1.0 < time.monotonic() - started < 10
    assert all(f"rank {absent} has" in verdict.errors[0] for verdict in verdicts.values())


def test_a_difference_does_not_wait_for_late_ranks(quick: None) -> None:
    ranks = same(4) | {1: Record({"--x": "2"})}
    del ranks[3]
    started = time.monotonic()
    verdicts, _ = exchanged(ranks, 4, seconds=60)
    assert time.monotonic() - started < exchange.STAY_S + 5
    assert set(verdicts.values()) == {Verdict(("rank 1 has --x 2, ranks 0, 2 have 1",))}


def test_equal_records_are_stored_and_read_once() -> None:
    store, read = dist.HashStore(), []

    def join(rank: int) -> Verdict:
        exchange = Exchange(store, range(8), rank, timedelta(seconds=10))
        return exchange.run(
            Record({"--x": "1"}).to_text(), lambda text: read.append(text) or Record.from_text(text), compare
        )

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(join, range(8))) == {Verdict()}
    assert len(read) == 1
    assert threading.active_count() < 8
