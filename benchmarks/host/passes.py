"""One rank's forward and backward pass of a scheme, on the smallest tensors, counted and timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.host.clock import in_slices
from benchmarks.host.counts import Counts, Launches
from benchmarks.host.empty import EmptyKernel, Replay, empty_copies, empty_rows
from benchmarks.host.world import fake_world
from benchmarks.ours import Ours
from megatron_wallfacer.schedule.formulas import busiest_rank
from megatron_wallfacer.schedule.schemes import make_plan

HEADS, HEAD_DIM = (32, 8), 8
#: Tokens per rank.
TOKENS = 2
PASSES = ("forward", "backward")


class Passes:
    """Forward and backward of one attention; backward differentiates the forward before it.

    Args:
        attend: attention of q, k and v.
        shape: batch, tokens of a rank and their order, before heads and channels: ``(2, 1)`` sbhd, ``(1, 2)`` bshd.
    """

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], shape: tuple[int, int]) -> None:
        q_heads, kv_heads = HEADS
        shapes = [(*shape, heads, HEAD_DIM) for heads in (q_heads, kv_heads, kv_heads)]
        self._inputs = [torch.zeros(one, dtype=torch.bfloat16, requires_grad=True) for one in shapes]
        self._dout = torch.zeros(shapes[0], dtype=torch.bfloat16)
        self._attend = attend

    def forward(self) -> None:
        self._out = self._attend(*self._inputs)

    def backward(self) -> None:
        torch.autograd.grad(self._out, self._inputs, self._dout)


@dataclass(frozen=True)
class Row:
    """One scheme at one size.

    Attributes:
        cp_size, scheme, grid: what ran.
        counts: of forward and backward.
        slices: host time of forward and backward.
    """

    cp_size: int
    scheme: str
    grid: str
    counts: tuple[Counts, Counts]
    slices: tuple[float, float]

    @property
    def allowed(self) -> tuple[int, int]:
        """Host time that forward and backward may take, in slices."""
        forward, backward = self.counts
        return forward.allowed(backward=False), backward.allowed(backward=True)

    def within(self, factor: float = 1.0) -> bool:
        """Whether both passes take at most ``factor`` times what is allowed."""
        return all(took <= factor * limit for took, limit in zip(self.slices, self.allowed, strict=True))


def measure(cp_size: int, scheme: str, rounds: int) -> Row:
    """The busiest rank of a scheme.

    Raises:
        OptionError: the scheme has no plan for this size and these heads.
    """
    plan, kernel = make_plan(scheme, cp_size, q_heads=HEADS[0], kv_heads=HEADS[1], tokens=TOKENS), EmptyKernel()
    with fake_world(busiest_rank(plan), cp_size), empty_rows() as rows:
        ours = Ours(scheme, cp_size, HEADS, {"scheme": scheme, "tokens": TOKENS})
        ours.prepare()
        passes = Passes(ours.bind(kernel, HEAD_DIM), (2, 1))
        replays = (kernel.forward, kernel.backward, *rows)
        on_rows = [_recorded(run, rows) for run in (passes.forward, passes.backward)]
        for replay in replays:
            replay.repeat()
        operators = [_operators(run) for run in (passes.forward, passes.backward)]
        with empty_copies():
            # A plan is lowered, and a cache filled, in the first pass only.
            passes.forward()
            passes.backward()
            slices = in_slices((passes.forward, passes.backward), rounds)
    calls = (kernel.forward.calls, kernel.backward.calls)
    forward, backward = (
        Counts(attention, seen.launches.total() + row_launches, seen.messages.total())
        for attention, seen, row_launches in zip(calls, operators, on_rows, strict=True)
    )
    return Row(cp_size, scheme, str(plan.grid), (forward, backward), (slices[0], slices[1]))


def _recorded(run: Callable[[], None], rows: Sequence[Replay]) -> int:
    """Calls of functions on rows in the first pass."""
    before = sum(replay.calls for replay in rows)
    run()
    return sum(replay.calls for replay in rows) - before


def _operators(run: Callable[[], None]) -> Launches:
    with Launches() as launches:
        run()
    return launches
