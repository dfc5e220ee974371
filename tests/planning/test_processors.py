"""Costs of being a process of a shared machine."""

from __future__ import annotations

from statistics import mean, quantiles

import pytest

from megatron_wallfacer.planning.cluster import Host
from megatron_wallfacer.planning.processors import Lateness

HOST = Host(cores=2, copy_gbyte_s=1.0, late_us=1000.0)


def test_most_waits_are_short_and_some_are_long() -> None:
    lateness = Lateness(HOST)
    waits = [1e3 * lateness.seconds(used=1.0, sleeps=1) for _ in range(20_000)]
    assert mean(waits) == pytest.approx(1.0, rel=0.05)
    tenths = quantiles(waits, n=10)
    assert tenths[4] == pytest.approx(0.25, rel=0.1)
    assert tenths[8] == pytest.approx(2.65, rel=0.1)


def test_waits_grow_with_what_is_used_and_with_sleeps() -> None:
    assert Lateness(HOST).seconds(used=0.5, sleeps=3) == pytest.approx(Lateness(HOST).seconds(used=1.0, sleeps=3) / 2)
    one, more = Lateness(HOST), Lateness(HOST)
    assert more.seconds(1.0, 3) == pytest.approx(sum(one.seconds(1.0, 1) for _ in range(3)))
    assert Lateness(HOST).seconds(used=0.0, sleeps=3) == 0


def test_a_draw_gives_the_same_waits_again() -> None:
    def waits(draw: int) -> list[float]:
        lateness = Lateness(HOST, draw)
        return [lateness.seconds(1.0, 1) for _ in range(5)]

    assert waits(0) == waits(0)
    assert waits(0) != waits(1)
