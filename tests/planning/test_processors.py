"""Costs of processes that share one node."""

from __future__ import annotations

from statistics import mean, quantiles

import pytest

from megatron_wallfacer.planning.cluster import HostProcessors
from megatron_wallfacer.planning.processors import WakeUpDelay

HOST = HostProcessors(cores=2, copy_gbyte_s=1.0, wake_up_us=1000.0)


def test_most_waits_are_short_and_some_are_long() -> None:
    delay = WakeUpDelay(HOST)
    delays = [1e3 * delay.seconds(used=1.0, sleeps=1) for _ in range(20_000)]
    assert mean(delays) == pytest.approx(1.0, rel=0.05)
    tenths = quantiles(delays, n=10)
    assert tenths[4] == pytest.approx(0.25, rel=0.1)
    assert tenths[8] == pytest.approx(2.65, rel=0.1)


def test_waits_grow_with_what_is_used_and_with_sleeps() -> None:
    assert WakeUpDelay(HOST).seconds(used=0.5, sleeps=3) == pytest.approx(
        WakeUpDelay(HOST).seconds(used=1.0, sleeps=3) / 2
    )
    one, more = WakeUpDelay(HOST), WakeUpDelay(HOST)
    assert more.seconds(1.0, 3) == pytest.approx(sum(one.seconds(1.0, 1) for _ in range(3)))
    assert WakeUpDelay(HOST).seconds(used=0.0, sleeps=3) == 0


def test_a_seed_gives_the_same_waits_again() -> None:
    def delays(seed: int) -> list[float]:
        delay = WakeUpDelay(HOST, seed)
        return [delay.seconds(1.0, 1) for _ in range(5)]

    assert delays(0) == delays(0)
    assert delays(0) != delays(1)
