"""A plan: a grid, plus the choices that a grid leaves open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import Grid

RingOperand = Literal["kv", "q"]
Order = Literal["native", "paper", "permuted"]


@dataclass(frozen=True)
class Plan:
    """All choices that determine the schedule of every rank.

    Attributes:
        grid: sizes of the axes, and placement.
        scheme: name of the scheme, for messages only.
        kv_order: order of the first block of the ring operand. ``native``: the block of the team of the rank, without
            permutation. ``paper``: blocks are gathered in the *team*, then whole blocks are permuted (Algorithm 2 of
            the paper). ``permuted``: the same blocks, but single shards are permuted first and gathered afterwards,
            with about half the volume. The last two need ``team == kv_team``.
        forward: ring operand of the forward pass. ``kv`` (pass-KV): K and V are passed around the ring. ``q`` (pass-Q):
            Q is, and its partial outputs are returned to the origin directly.
        backward: ring operand of the backward pass. ``kv``: K, V and their gradients are passed around the ring.
            ``q``: Q, dO and dQ are.
        bidirectional: whether blocks of a single ring are sent half way around in each direction.
        head_groups: number of head groups, whose schedules are interleaved so that kernels of one hide transfers of
            another. There are fewer if the heads do not divide (:func:`megatron_wallfacer.schedule.heads.head_groups`).
        shard_work: work of one query shard against one key shard (:func:`shard_work`), if sizes are known. It decides
            which small calls are merged (:mod:`megatron_wallfacer.schedule.merging`).

    Raises:
        OptionError: No schedule exists for the combination.
    """

    grid: Grid
    scheme: str = "grid"
    kv_order: Order = "native"
    forward: RingOperand = "kv"
    backward: RingOperand = "kv"
    bidirectional: bool = False
    head_groups: int = 1
    shard_work: int | None = None

    def __post_init__(self) -> None:
        grid = self.grid
        if not isinstance(grid, Grid):
            raise OptionError("grid", grid, "a Grid")
        for name, names in (
            ("kv_order", get_args(Order)),
            ("forward", get_args(RingOperand)),
            ("backward", get_args(RingOperand)),
        ):
            if getattr(self, name) not in names:
                raise OptionError(name, getattr(self, name), f"one of {', '.join(names)}")
        if self.kv_order != "native" and grid.team != grid.kv_team:
            raise OptionError(
                "kv_team_size", grid.kv_team, f"the team size {grid.team}: the published blocks need team = kv_team"
            )
        if self.bidirectional and grid.ring_inner > 1 and grid.ring_outer > 1:
            raise OptionError("bidirectional", grid, "a single ring: ring_inner or ring_outer must be 1")
        if not isinstance(self.head_groups, int) or self.head_groups < 1:
            raise OptionError("head_groups", self.head_groups, "a positive number")


def shard_work(tokens: int, q_heads: int) -> int:
    """Return the work of one query shard against one key shard, of all heads.

    Args:
        tokens: tokens per rank.
        q_heads: query heads per rank after tensor parallelism.
    """
    return tokens * tokens * q_heads
