"""What :mod:`tests.engine.wire` measures: single moves and whole passes of a few MB. Runs on workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.blocks import Block, Sizes
from megatron_wallfacer.engine.call import Call, Runtime
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.transfers import Pending, Transfers
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.ops import KV, Message, Move, Q, Value
from megatron_wallfacer.schedule.plan import Plan

RANKS = 8
TOKENS = 256  # of a rank in a pass
SIZES = Sizes(2048, 1, 1, 1, 64, 64, 1, torch.float32, torch.device("cpu"))
SHARD_BYTES = 2**20  # of q, of a rank in a single move

Count = Counter[str]
"""Bytes received by one rank, by axis and tensor."""
Job = tuple[Callable[..., Count], tuple[object, ...]]

PLANS = {
    "ring": Plan(Grid(ring_outer=RANKS)),
    "double ring": Plan(Grid(ring_outer=4, ring_inner=2)),
    "bidirectional ring": Plan(Grid(ring_outer=RANKS), bidirectional=True),
    "tokenring": Plan(Grid(ring_outer=RANKS), forward="q"),
    "burst": Plan(Grid(ring_outer=4, ring_inner=2), backward="q"),
    "usp": Plan(Grid(head=2, ring_outer=4), head_groups=2),
    "all-gather": Plan(Grid(kv_team=RANKS)),
    "team-ring": Plan(Grid(team=4, ring_outer=2)),
    "head x team x ring": Plan(Grid(head=2, team=2, ring_outer=2)),
    "mesh": Plan(Grid(team=4, kv_team=2)),
    "wallfacer": Plan(Grid(team=2, kv_team=2, ring_outer=2), kv_order="paper", backward="q"),
    "wallfacer permuted": Plan(Grid(team=2, kv_team=2, ring_outer=2), kv_order="permuted", backward="q"),
}


# --- single moves ---


@dataclass(frozen=True)
class HandMade:
    """A move, what its names stand for, and what it sends."""

    move: Move
    values: dict[str, Value]
    blocks: dict[str, Block]


def numbered(value: Value, sizes: Sizes, rank: int) -> Block:
    """A block in which each row holds 100 x rank + the number of its chunk."""
    block = sizes.like(value)
    for tensor in block.tensors.values():
        for index, chunk in enumerate(value.chunks):
            tensor[sizes.rows((index, index + 1))] = 100 * rank + chunk
    return block


def hop(rank: int, ranks: int, sizes: Sizes, payload: tuple[str, ...] = KV, way: int = 1, tag: int = 0) -> HandMade:
    """Every rank sends its shard so many ranks further."""
    to, came_from = (rank + way) % ranks, (rank - way) % ranks
    values = {
        "mine": Value(payload, shard_chunks(rank, ranks), 0),
        f"from{came_from}": Value(payload, shard_chunks(came_from, ranks), 0),
    }
    sends = (Message(to, "mine", values["mine"].chunks, tag),)
    receives = (Message(came_from, f"from{came_from}", values[f"from{came_from}"].chunks, tag),)
    move = Move("ring_outer", payload, sends, receives)
    return HandMade(move, values, {"mine": numbered(values["mine"], sizes, rank)})


def gather(rank: int, ranks: int, sizes: Sizes, payload: tuple[str, ...] = Q) -> HandMade:
    """Every rank sends its shard to every other."""
    others = [peer for peer in range(ranks) if peer != rank]
    values = {f"from{peer}": Value(payload, shard_chunks(peer, ranks), 0) for peer in range(ranks)}
    mine = f"from{rank}"
    sends = tuple(Message(peer, mine, values[mine].chunks, 0) for peer in others)
    receives = tuple(Message(peer, f"from{peer}", values[f"from{peer}"].chunks, 0) for peer in others)
    return HandMade(Move("ring_outer", payload, sends, receives), values, {mine: numbered(values[mine], sizes, rank)})


def scatter(rank: int, ranks: int, sizes: Sizes, payload: tuple[str, ...] = ("dq",)) -> HandMade:
    """Every rank has a sum of all rows, and sends each rank the rows of its shard."""
    others = [peer for peer in range(ranks) if peer != rank]
    values = {f"from{peer}": Value(payload, shard_chunks(rank, ranks), 0) for peer in others}
    values["sum"] = Value(payload, tuple(range(2 * ranks)), 0)
    sends = tuple(Message(peer, "sum", shard_chunks(peer, ranks), 0) for peer in others)
    receives = tuple(Message(peer, f"from{peer}", shard_chunks(rank, ranks), 0) for peer in others)
    return HandMade(Move("ring_outer", payload, sends, receives), values, {"sum": numbered(values["sum"], sizes, rank)})


MOVES = {"hop": hop, "gather": gather, "scatter": scatter}


def start(transfers: Transfers, made: HandMade, sizes: Sizes, *, early: bool = False) -> Pending:
    """Begin a move, with its receives posted before if asked for."""
    expected = transfers.expect(made.move, made.values, sizes) if early else None
    return transfers.start(made.move, made.blocks, made.values, sizes, expected)


# --- jobs ---


def cases() -> dict[str, dict[str, Job]]:
    """Jobs by case and part."""
    moves = {kind: {"": (run_move, (kind,))} for kind in MOVES}
    passes = {
        name: {"forward": (run_forward, (plan,)), "backward": (run_backward, (plan,))} for name, plan in PLANS.items()
    }
    return moves | passes


@cache
def call_of(plan: Plan) -> Call:
    """The groups of a plan, made once."""
    return Call(plan, Runtime(Transfers(connect(None, plan.grid)), TorchCpuKernel(), scale=0.125))


def counted(transfers: Transfers, run: Callable[[], object]) -> Count:
    """What a rank counts while it runs something."""
    before = transfers.received.copy()
    run()
    return Counter({" ".join(key): size for key, size in (transfers.received - before).items()})


def run_move(rank: int, kind: str) -> Count:
    """One move over all ranks."""
    transfers = call_of(PLANS["ring"]).runtime.transfers
    made = MOVES[kind](rank, RANKS, SIZES)
    return counted(transfers, lambda: start(transfers, made, SIZES).wait())


_outputs: dict[Plan, Tensor] = {}


def run_forward(_rank: int, plan: Plan) -> Count:
    """A forward pass."""
    call = call_of(plan)
    q, k, v = (torch.ones(TOKENS, 1, heads, 64, requires_grad=True) for heads in (8, 4, 4))
    return counted(call.runtime.transfers, lambda: _outputs.update({plan: attend(q, k, v, call)}))


def run_backward(_rank: int, plan: Plan) -> Count:
    """The backward pass of the forward before it."""
    return counted(call_of(plan).runtime.transfers, lambda: _outputs.pop(plan).sum().backward())
