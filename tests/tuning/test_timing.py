"""The clock of all measurements."""

from __future__ import annotations

import pytest
import torch

from megatron_wallfacer.tuning import timing

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the work moves, and other ranks that take 1 s longer than this one."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.dist, "barrier", lambda: None)
    monkeypatch.setattr(timing.dist, "all_reduce", lambda tensor, _: tensor.add_(1.0))
    return now


def test_the_slowest_rank_counts(clock: list[float]) -> None:
    def work() -> str:
        clock[0] += 2.0
        return "result"

    assert timing.time_call(work, CPU) == ("result", 3.0)


def test_the_first_call_is_not_counted(clock: list[float]) -> None:
    seconds = iter((8.0, 1.0, 2.0))

    def work() -> None:
        clock[0] += next(seconds)

    assert timing.time_calls(work, CPU, repeats=2) == [2.0, 3.0]


def test_a_gpu_has_finished_when_the_clock_starts_and_stops(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "largest", lambda value, _: value)
    launched = [5.0]

    def synchronize() -> None:
        clock[0] += launched.pop() if launched else 0.0

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    # Five seconds of earlier work do not count, three seconds of launched work do.
    assert timing.time_call(lambda: launched.append(3.0), torch.device("cuda"))[1] == 3.0
