"""One rank of a context-parallel group, alone: its kernels, merges and copies are real, its messages are not.

What it would receive is there at once. So a single process stands for any rank of any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from megatron_wallfacer.engine.blocks import Block, Sizes
from torch import Tensor

from megatron_wallfacer.engine import operators
from megatron_wallfacer.engine.call import Call, Runtime
from megatron_wallfacer.engine.groups import AxisGroups
from megatron_wallfacer.engine.timeline import Recorder, nothing
from megatron_wallfacer.engine.transfers import Arrival, Expected, Pending, Transfers
from megatron_wallfacer.kernels.protocol import Kernel
from megatron_wallfacer.schedule.formulas import busiest_rank
from megatron_wallfacer.schedule.ops import Move, Value
from megatron_wallfacer.schedule.plan import Plan


class NoTransfers(Transfers):
    """Whatever is expected has arrived, with the numbers that its memory held.

    Args:
        groups: without process groups.
        reuse: give the same few buffers again and again, filled once with what attention computes with; else allocate
            each, as transfers do.
    """

    def __init__(self, groups: AxisGroups, *, reuse: bool) -> None:
        super().__init__(groups)
        self._reuse = reuse
        self._packets: dict[tuple[object, ...], Tensor] = {}

    def expect(self, move: Move, values: Mapping[str, Value], sizes: Sizes) -> Expected | None:
        return None

    def start(
        self,
        move: Move,
        sent: Mapping[str, Block],
        values: Mapping[str, Value],
        sizes: Sizes,
        expected: Expected | None = None,
    ) -> Pending:
        # What leaves is packed, as it would be.
        packets = [self._packet(sent[message.value], message, move, values, sizes) for message in move.sends]
        blocks = {message.value: self._block(values[message.value], sizes) for message in move.receives}
        return Pending((), {name: Arrival(block, block.packet) for name, block in blocks.items()}, packets)

    def _block(self, value: Value, sizes: Sizes) -> Block:
        if not self._reuse:
            return sizes.like(value)
        key = value.payload, len(value.chunks), value.part
        if key not in self._packets:
            block = sizes.like(value)
            for tensor in block.tensors.values():
                tensor.normal_()
            self._packets[key] = block.packet
        return sizes.unpack(value, self._packets[key])


@dataclass
class OneRank:
    """Attention of the busiest rank of a plan, causal, batch 1.

    Args:
        plan: its grid says how many ranks there are.
        tokens: of the whole sequence.
        heads: (query, kv).
        head_dim: channels of a head.
        kernel: the local one.
        device: where.
        dtype: of q, k, v.
        reuse: see :class:`NoTransfers`.
        recorder: who looks on.
    """

    plan: Plan
    tokens: int
    heads: tuple[int, int]
    head_dim: int
    kernel: Kernel
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    reuse: bool = True
    recorder: Recorder = nothing
    call: Call = field(init=False)

    def __post_init__(self) -> None:
        cp_size = self.plan.grid.cp_size
        groups = AxisGroups(self.plan.grid, busiest_rank(self.plan), tuple(range(cp_size)), ("one",) * cp_size, {})
        transfers = NoTransfers(groups, reuse=self.reuse)
        runtime = Runtime(transfers, self.kernel, self.head_dim**-0.5, self.recorder)
        self.call = Call(self.plan, runtime)

    @property
    def shard(self) -> int:
        """Tokens of a rank."""
        return self.tokens // self.plan.grid.cp_size

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and dout, sbhd."""
        q_heads, kv_heads = self.heads
        options = {"device": self.device, "dtype": self.dtype}
        shapes = [(self.shard, 1, heads, self.head_dim) for heads in (q_heads, kv_heads, kv_heads, q_heads)]
        q, k, v, dout = (torch.randn(shape, **options) for shape in shapes)
        return q, k, v, dout

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(out, lse, kept)."""
        return operators.attention(q, k, v, None, self.call.number)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, done: tuple[Tensor, Tensor, list[Tensor]]
    ) -> tuple[Tensor, ...]:
        """(dq, dk, dv, nothing)."""
        out, lse, kept = done
        inputs = [] if self.plan.grid.head > 1 else [q, k, v]
        return operators.attention_backward(
            dout, out, lse, None, kept, inputs, k.shape[2], self.head_dim, self.call.number
        )
