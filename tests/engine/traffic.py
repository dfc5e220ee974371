"""What :mod:`tests.engine.wire` measures: single moves and whole passes of a few MB. Runs on workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from megatron_wallfacer.engine.autograd import Call, attend
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.runtime import Runtime
from megatron_wallfacer.engine.transfers import Pending, Transfers
from megatron_wallfacer.kernels import select_kernel
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.moves import Combine, Gather, Hop, Reduce
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schemes import make_plan

RANKS = 8
SHARD = torch.ones(2, 2**17)  # 1 MiB
TOKENS = 256  # of a rank in a pass

Count = Counter[str]
"""Bytes received by one rank, by axis and tensor."""
Job = tuple[Callable[..., Count], tuple[object, ...]]

PLANS = {
    "ring": make_plan("ring", RANKS),
    "all-gather": make_plan("all-gather", RANKS),
    "team-ring": make_plan("team-ring", RANKS, team_size=4),
    "mesh": make_plan("team-ring", RANKS, team_size=4, kv_team_size=2),
    "wallfacer": make_plan("wallfacer", RANKS, team_size=2),
}


def cases() -> dict[str, dict[str, Job]]:
    """Jobs by case and part."""
    moves = {kind: {"": (run_move, (kind,))} for kind in ("gather", "exchange", "reduce", "hop")}
    passes = {
        name: {"forward": (run_forward, (plan,)), "backward": (run_backward, (plan,))} for name, plan in PLANS.items()
    }
    return moves | passes


@cache
def call_of(plan: Plan) -> Call:
    """The groups of a plan, made once."""
    kernel = select_kernel("torch", device=torch.device("cpu"), dtype=torch.float32, head_dim=64)
    return Call(plan, Runtime(Transfers(connect(None, plan.grid)), kernel, scale=0.125))


def counted(transfers: Transfers, run: Callable[[], object]) -> Count:
    """What a rank counts while it runs something."""
    before = transfers.received.copy()
    run()
    return Counter({" ".join(key): size for key, size in (transfers.received - before).items()})


def run_move(rank: int, kind: str) -> Count:
    """One move over all ranks."""
    transfers = call_of(Plan(Grid(ring=RANKS))).runtime.transfers
    return counted(transfers, lambda: _start(transfers, kind, rank).wait())


def _start(transfers: Transfers, kind: str, rank: int) -> Pending:
    everyone, block = tuple(range(RANKS)), SHARD.repeat(RANKS, 1)
    if kind == "gather":
        return transfers.gather(Gather("cp", ("q",), everyone), (SHARD,))
    if kind == "exchange":
        return transfers.exchange(Combine("cp", everyone, payload=("out",)), (block,))
    if kind == "reduce":
        return transfers.reduce(Reduce("cp", ("dq",), everyone), (block,))
    return transfers.hop(Hop("cp", ("k",), (rank + 1) % RANKS, (rank - 1) % RANKS, shards=1), (SHARD,))


_outputs: dict[Plan, Tensor] = {}


def run_forward(_rank: int, plan: Plan) -> Count:
    """A forward pass."""
    call = call_of(plan)
    q, k, v = (torch.ones(TOKENS, 1, heads, 64, requires_grad=True) for heads in (4, 2, 2))
    return counted(call.runtime.transfers, lambda: _outputs.update({plan: attend(q, k, v, call)}))


def run_backward(_rank: int, plan: Plan) -> Count:
    """The backward pass of the forward before it."""
    return counted(call_of(plan).runtime.transfers, lambda: _outputs.pop(plan).sum().backward())
