"""Launches of a pass on a GPU, counted, and their limits."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from benchmarks.gpu import launches, traffic
from benchmarks.gpu.launches import LIMITS, Launches
from megatron_wallfacer.engine.row_table import Place, RowOperation


@pytest.mark.parametrize(("cp_size", "scheme"), LIMITS)
def test_other_launches_are_within_their_limits(cp_size: int, scheme: str) -> None:
    _, both = launches.count(cp_size, scheme)
    for one, most in zip(both, LIMITS[cp_size, scheme][1], strict=True):
        assert one.others.total() <= most, one.others.most_common()


def test_a_ring_of_two_launches_what_can_be_counted_by_hand() -> None:
    _, (forward, backward) = launches.count(2, "auto")
    # K and V are packed; both results are merged straight into the output.
    assert (forward.calls, forward.batches) == (2, 1)
    assert forward.others == {("SendRecv", "copies"): 1, ("WriteResult", "merges"): 1}
    # The visitors' sums go home before they are complete, and come back as received rows.
    assert (backward.calls, backward.batches) == (2, 2)
    assert backward.others.total() == 4


@pytest.mark.parametrize(
    ("calls", "others", "within"), [(2, 3, True), (3, 3, False), (2, 4, False)], ids=["within", "calls", "others"]
)
def test_a_check_fails_above_each_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], calls: int, others: int, within: bool
) -> None:
    kinds = Counter({("SendRecv", "copies"): others})
    both = Launches(2, kinds, 1), Launches(calls, kinds, 1, most=(2, 3))
    monkeypatch.setattr(launches, "LIMITS", {(2, "ring"): ()})
    monkeypatch.setattr(launches, "count", lambda *_: ("ring_outer 2", both))
    assert launches.report([(2, "ring")], kinds=True) == (0 if within else 1)
    printed = capsys.readouterr().out
    assert f"| backward | {calls} | 2 | {others} | 3 | 1 | {'ok' if within else 'above'} |" in printed
    assert f"| SendRecv | copies | {others} |" in printed


def test_every_operator_that_is_no_view_is_a_launch() -> None:
    seen = traffic.Traffic(["SendRecv"])
    with seen:
        x = torch.zeros(4, 2)
        x[2:].copy_(x[:2])
        x.view(8).add_(1)
    assert seen.launches == {("SendRecv", name): 1 for name in ("zeros", "copy_", "add_")}


def test_bytes_are_those_of_every_row_that_is_read_and_written() -> None:
    wide, narrow = Place(0, True, 0, (16, 8, 1)), Place(1, False, 0, (16, 8, 1))
    operation = RowOperation((4, 2, 8), (wide,), ((wide,), (narrow,), (narrow,)))
    assert traffic.byte_table([operation], torch.bfloat16, torch.float32, None).nbytes == 64 * (4 + 4 + 2 + 2)
    fill = RowOperation((4, 2, 8), (wide,), ((wide._replace(base=-1),),))
    assert traffic.byte_table([fill], torch.bfloat16, torch.float32, None).nbytes == 64 * 4
