"""At the end of the process ranks destroy their groups together, or leave them."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_wallfacer.engine import leaving
from megatron_wallfacer.engine.leaving import all_leave, at_exit

SHORT = timedelta(milliseconds=200)


def test_all_ranks_leave() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: all_leave(store, 4, timedelta(seconds=20)), range(4))) == [True] * 4


def test_nobody_waits_for_a_rank_that_stays_and_it_does_not_wait_for_them() -> None:
    store = dist.HashStore()
    start = time.monotonic()
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(lambda _: all_leave(store, 4, SHORT), range(3))) == [False] * 3
    assert time.monotonic() - start < 10
    # It comes when the others have gone: alone in a teardown it would wait for ever.
    assert not all_leave(store, 4, SHORT)


def test_a_store_that_is_gone_is_no_error() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
    del server
    assert not all_leave(client, 2, SHORT)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the exit of a rank that is not alone has called."""
    called: list[str] = []
    monkeypatch.setattr(leaving, "_steps", [])
    monkeypatch.setattr(leaving.atexit, "register", lambda step: called.append("registered"))
    monkeypatch.setattr(leaving, "all_leave", lambda store, ranks: True)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: None)
    return called


def test_steps_are_called_once_and_in_order(steps: list[str]) -> None:
    first, second = lambda: steps.append("first"), lambda: steps.append("second")
    for step in (first, second, first):
        at_exit(step)
    leaving._leave()
    assert steps == ["registered", "first", "second"]


def test_nothing_is_called_after_an_error(steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit(lambda: steps.append("step"))
    monkeypatch.setattr(sys, "last_exc", ValueError(), raising=False)
    leaving._leave()
    assert steps == ["registered"]
