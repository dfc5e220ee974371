"""What is computed from the timeline of a rank."""

from __future__ import annotations

from benchmarks.jobs import waiting_share
from megatron_wallfacer.engine.timeline import TimelineEvent


def test_the_waiting_share_is_that_of_the_whole_span() -> None:
    rows = (("copy", 100, 101), ("compute", 101, 105), ("wait", 105, 107), ("compute", 108, 110), ("wait", 110, 110))
    assert waiting_share([TimelineEvent(row, "", start, end) for row, start, end in rows]) == 0.2


def test_no_event_is_no_waiting() -> None:
    assert waiting_share([]) == 0
