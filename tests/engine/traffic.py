"""What :mod:`tests.engine.wire` measures: single transfers and whole passes of a few MB. Runs on workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.call import Call, Runtime
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.program import MessageBuffer, PointToPoint

RANKS = 8
TOKENS = 256  # of a rank in a pass
SHARD_BYTES = 2**20  # of a rank in a single transfer
SHARD_ROWS = SHARD_BYTES // 4 // 2  # of a chunk, in fp32

Count = Counter[str]
"""Bytes received by one rank, by axis and tensor."""
Job = tuple[Callable[..., Count], tuple[object, ...]]

PLANS = {
    "ring": Plan(Grid(ring_outer=RANKS)),
    "double ring": Plan(Grid(ring_outer=4, ring_inner=2)),
    "bidirectional ring": Plan(Grid(ring_outer=RANKS), bidirectional=True),
    "tokenring": Plan(Grid(ring_outer=RANKS), forward="pass-q"),
    "burst": Plan(Grid(ring_outer=4, ring_inner=2), backward="pass-q"),
    "usp": Plan(Grid(head=2, ring_outer=4), head_groups=2),
    "all-gather": Plan(Grid(kv_team=RANKS)),
    "team-ring": Plan(Grid(team=4, ring_outer=2)),
    "head x team x ring": Plan(Grid(head=2, team=2, ring_outer=2)),
    "mesh": Plan(Grid(team=4, kv_team=2)),
    "wallfacer": Plan(Grid(team=2, kv_team=2, ring_outer=2), kv_order="paper", backward="pass-q"),
    "wallfacer permuted": Plan(Grid(team=2, kv_team=2, ring_outer=2), kv_order="permuted", backward="pass-q"),
}


# --- single transfers ---


@dataclass(frozen=True)
class HandMade:
    """A transfer, the rows of each of its operands, and which operand each received block is."""

    transfer: PointToPoint
    operands: list[Tensor]
    received: dict[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes that it receives."""
        return sum(self.operands[message.operand].nbytes for message in self.transfer.receives)


CHANNEL = ("ring_outer", "inputs")


def numbered(chunks: Sequence[int], rank: int, rows: int) -> Tensor:
    """A block in which each row holds 100 x rank + the number of its chunk."""
    return torch.tensor([100.0 * rank + chunk for chunk in chunks]).repeat_interleave(rows)


def hop(rank: int, ranks: int, rows: int, way: int = 1, tag: int = 0) -> HandMade:
    """Every rank sends its shard so many ranks further."""
    to, came_from = (rank + way) % ranks, (rank - way) % ranks
    mine = numbered(shard_chunks(rank, ranks), rank, rows)
    transfer = PointToPoint(CHANNEL, (MessageBuffer(to, 0, tag),), (MessageBuffer(came_from, 1, tag),))
    return HandMade(transfer, [mine, torch.empty_like(mine)], {f"from{came_from}": 1})


def gather(rank: int, ranks: int, rows: int) -> HandMade:
    """Every rank sends its shard to every other."""
    others = [peer for peer in range(ranks) if peer != rank]
    mine = numbered(shard_chunks(rank, ranks), rank, rows)
    received = {f"from{peer}": index for index, peer in enumerate(others, 1)}
    transfer = PointToPoint(
        CHANNEL,
        tuple(MessageBuffer(peer, 0, 0) for peer in others),
        tuple(MessageBuffer(peer, received[f"from{peer}"], 0) for peer in others),
    )
    return HandMade(transfer, [mine, *(torch.empty_like(mine) for _ in others)], received)


def scatter(rank: int, ranks: int, rows: int) -> HandMade:
    """Every rank has a sum of all rows, and sends each rank the rows of its shard."""
    others = [peer for peer in range(ranks) if peer != rank]
    leaving = [numbered(shard_chunks(peer, ranks), rank, rows) for peer in others]
    received = {f"from{peer}": len(others) + index for index, peer in enumerate(others)}
    transfer = PointToPoint(
        CHANNEL,
        tuple(MessageBuffer(peer, index, 0) for index, peer in enumerate(others)),
        tuple(MessageBuffer(peer, received[f"from{peer}"], 0) for peer in others),
    )
    return HandMade(transfer, [*leaving, *map(torch.empty_like, leaving)], received)


TRANSFERS = {"hop": hop, "gather": gather, "scatter": scatter}


class Flight:
    """A transfer that has been started."""

    def __init__(self, transfers: Transfers, made: HandMade, *, early: bool = False) -> None:
        """With its receives posted before, if so wanted."""
        self.works: list[object] = [None]
        self._made, self._bound = made, transfers.bind(0, made.transfer, torch.device("cpu"))
        if early:
            self._bound.post(made.operands, self.works)

    def start(self) -> Flight:
        self._bound.start(self._made.operands, self.works)
        return self

    def wait(self) -> dict[str, list[float]]:
        """Rows of what has arrived."""
        self._bound.wait(self._made.operands, self.works)
        return {name: self._made.operands[index].tolist() for name, index in self._made.received.items()}


# --- jobs ---


def cases() -> dict[str, dict[str, Job]]:
    """Jobs by case and part."""
    transfers = {kind: {"": (run_transfer, (kind,))} for kind in TRANSFERS}
    passes = {
        name: {"forward": (run_forward, (plan,)), "backward": (run_backward, (plan,))} for name, plan in PLANS.items()
    }
    return transfers | passes


@cache
def call_of(plan: Plan) -> Call:
    """The groups of a plan, made once."""
    return Call(plan, Runtime(Transfers(connect(None, plan.grid)), TorchCpuKernel(), scale=0.125))


def counted(transfers: Transfers, run: Callable[[], object]) -> Count:
    """What a rank counts while it runs something."""
    before = transfers.received.copy()
    run()
    return Counter({" ".join(key): size for key, size in (transfers.received - before).items()})


def run_transfer(rank: int, kind: str) -> Count:
    """One transfer over all ranks."""
    made = TRANSFERS[kind](rank, RANKS, SHARD_ROWS)
    Flight(call_of(PLANS["ring"]).runtime.transfers, made).start().wait()
    return Counter({" ".join(CHANNEL): made.nbytes})


_outputs: dict[Plan, Tensor] = {}


def run_forward(_rank: int, plan: Plan) -> Count:
    """A forward pass."""
    call = call_of(plan)
    q, k, v = (torch.ones(TOKENS, 1, heads, 64, requires_grad=True) for heads in (8, 4, 4))
    return counted(call.runtime.transfers, lambda: _outputs.update({plan: attend(q, k, v, call)}))


def run_backward(_rank: int, plan: Plan) -> Count:
    """The backward pass of the forward before it."""
    return counted(call_of(plan).runtime.transfers, lambda: _outputs.pop(plan).sum().backward())
