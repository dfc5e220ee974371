"""The measurement of host time: what counts as a launch, what is empty, and the limit itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.tables import markdown
from benchmarks.host import __main__ as command
from benchmarks.host import beside
from benchmarks.host.clock import in_slices
from benchmarks.host.counts import Counts, Launches
from benchmarks.host.empty import EmptyKernel, Replay, empty_copies, empty_rows
from benchmarks.host.passes import Row, measure
from benchmarks.peers.loading import INSTALL, INSTALLED
from megatron_wallfacer.engine import merge, steps
from megatron_wallfacer.errors import OptionError

#: P 2 to 8, and one scheme at each larger size.
CASES = [(ranks, scheme) for ranks in (2, 4, 8) for scheme in ("ring", "wallfacer", "auto", "ulysses")]
CASES += [(64, "team-ring"), (512, "wallfacer")]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured(case: tuple[int, str]) -> Row:
    cp_size, scheme = case
    return measure(cp_size, scheme, max(8, 100 // cp_size))


@pytest.mark.alone
def test_host_time_is_at_most_one_and_a_half_times_what_is_allowed() -> None:
    slow = [row for row in map(measured, CASES) if not row.within(1.5)]
    # Other work on the machine can double one measurement for a moment. What is really slow is slow again.
    slow = [row for row in (measured((row.cp_size, row.scheme)) for row in slow) if not row.within(1.5)]
    assert not slow, markdown(command.HEADING, [line for row in slow for line in command.lines(row)])


def test_calls_launches_and_messages_of_a_ring_of_two() -> None:
    """One tile of the local shard and one of the received one. Each shard of k and v is one message."""
    forward, backward = measure(2, "ring", 1).counts
    assert (forward.attention, backward.attention) == (2, 2)
    # k and v leave and arrive; in backward dk and dv too.
    assert (forward.messages, backward.messages) == (2, 4)
    assert 0 < forward.launches <= 7
    assert 0 < backward.launches <= 15


def test_a_head_exchange_is_one_collective_and_two_launches() -> None:
    """Rows are packed and put in order in one launch each; results too, and they are stored in one."""
    forward, backward = measure(8, "ulysses", 1).counts
    # q, kv, out; the output's gradient, dq, dkv.
    assert (forward.messages, backward.messages) == (3, 3)
    assert forward.launches <= 8
    assert backward.launches <= 10


def test_a_scheme_that_the_heads_do_not_fit_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OptionError, match="head_size=64"):
        measure(64, "ulysses", 1)
    assert list(command.rows([64], ["ulysses"])) == []
    assert "P 64, ulysses: left out" in capsys.readouterr().err


def test_what_launches() -> None:
    x = torch.zeros(4, 4)
    with Launches() as seen:
        x[:2].copy_(x[2:])  # two views, one copy
        x.transpose(0, 1).contiguous()  # one copy
        x.contiguous()  # is already
        torch.empty(3)
        torch._foreach_copy_([x[:1], x[1:2]], [x[2:3], x[3:]])  # a list is one launch
    assert seen.launches == {"copy_": 1, "clone": 1, "_foreach_copy_": 1}
    assert not seen.messages


def test_the_limit_is_what_is_allowed_for_each_call() -> None:
    counts = Counts(attention=2, launches=7, messages=3)
    assert counts.allowed(backward=False) == 60 + 2 * 10 + 7 * 3 + 3 * 4
    assert counts.allowed(backward=True) == 60 + 2 * 16 + 7 * 3 + 3 * 4


def test_a_check_fails_above_the_limit_of_either_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counts(attention=1, launches=0, messages=0)
    row = Row(2, "ring", "", (counts, counts), (70.0, 76.0))
    for slices, code in (((70.0, 76.0), 0), ((70.1, 76.0), 1), ((70.0, 76.1), 1)):
        monkeypatch.setattr(command, "measure", lambda *_, slices=slices: replace(row, slices=slices))
        assert command.main(["--check", "--cp-size", "2", "--schemes", "ring"]) == code
        assert command.main(["--cp-size", "2", "--schemes", "ring"]) == 0


def test_a_scheme_is_held_against_its_own_peer() -> None:
    times = dict.fromkeys((*beside.PEERS, *beside.PEER_OF), (10.0, 20.0))
    assert beside.not_slower(times)
    for name in beside.PEER_OF:
        assert not beside.not_slower(times | {name: (10.0, 20.1)})
    assert not beside.not_slower(times | {"yunchang": (9.9, 20.0)})


@pytest.mark.skipif(not INSTALLED.is_dir(), reason=f"the peers are not installed: {INSTALL}")
def test_peers_are_timed_beside_this_project() -> None:
    # A process of its own: the stand-in for FlashAttention must not be importable here.
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.host", "--peers", "--cp-size", "2"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    heading, _, row = (line.strip("| ").split(" | ") for line in done.stdout.splitlines()[1:4])
    assert heading == ["P", "ring-flash-attn", "yunchang", "our ring", "our auto", "our ulysses"]
    assert all(float(number.replace(",", "")) > 50 for cell in row[1:] for number in cell.split(" / "))


@pytest.mark.alone
def test_a_slice_takes_one_slice_and_many_take_as_many() -> None:
    x = torch.zeros(64, 1, 4, 8)

    def slices(number: int) -> None:
        for _ in range(number):
            x[2:4]

    few, many = in_slices([lambda: slices(5), lambda: slices(500)], 50)
    assert few == pytest.approx(5, rel=0.5)
    # In a long loop a slice takes half of one that is timed alone.
    assert 150 < many < 600


def test_results_of_the_first_pass_come_again_in_their_order() -> None:
    seen = []
    replay = Replay(lambda x: seen.append(x) or len(seen))
    assert [replay("a"), replay("b")] == [1, 2]
    replay.repeat()
    assert [replay("c"), replay("d"), replay("e")] == [1, 2, 1]
    assert (seen, replay.calls) == (["a", "b"], 2)


def test_work_on_rows_is_empty_wherever_it_has_been_imported() -> None:
    out, lse = torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1)
    original = merge.merge_rows
    with empty_rows() as replays:
        assert steps.merge_rows is merge.merge_rows is not original
        steps.merge_rows([(out, lse)], [[(out, lse), (out + 1, lse)]])
        for replay in replays:
            replay.repeat() if replay.calls else None
        steps.merge_rows([(out, lse)], [[(out, lse), (torch.full_like(out, 7.0), lse)]])
        assert out.unique().tolist() == [0.5]
    assert steps.merge_rows is merge.merge_rows is original


def test_copies_and_sums_are_empty_and_come_back() -> None:
    x, y = torch.zeros(3), torch.ones(3)
    with empty_copies():
        assert x.copy_(y) is x
        x.add_(y).fill_(2.0)
        torch._foreach_add_([x], [y])
    assert x.tolist() == [0.0] * 3
    assert x.copy_(y).tolist() == [1.0] * 3


def test_the_empty_kernel_gives_results_of_the_right_shapes() -> None:
    q, k, v = (torch.zeros(rows, 1, heads, 8, dtype=torch.bfloat16) for rows, heads in ((2, 4), (6, 2), (6, 2)))
    kernel = EmptyKernel()
    out, lse = kernel.forward(q, k, v, causal=False, scale=1.0)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, q.shape[:3], torch.float32)
    grads: tuple[Tensor, ...] = kernel.backward(out, q, k, v, out, lse, causal=False, scale=1.0)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
