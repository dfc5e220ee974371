"""A plan: a grid, plus the choices that a grid leaves open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import Grid

Rider = Literal["kv", "q"]
Order = Literal["native", "paper", "permuted"]


@dataclass(frozen=True)
class Plan:
    """Everything that decides the schedule of every rank.

    Attributes:
        grid: axes and placement.
        scheme: the name under which it was asked for; for messages only.
        kv_order: how the rider's first block comes together. ``native``: it is that of the rank's own team along the
            rider's axis, and nothing is permuted. ``paper``: gathered in the *team*, then whole blocks are permuted
            (Algorithm 2). ``permuted``: the same blocks, but single shards are permuted and gathered after, which
            moves about half. The last two need ``team == kv_team``.
        forward, backward: what rides the ring, K and V (in backward with their gradients) or Q (in forward its partial
            output goes straight home, in backward dO and dQ ride with it).
        bidirectional: blocks leave home in both directions and each goes half way round. A single ring only.
        head_groups: groups of heads whose schedules are interleaved, so that the moves of one hide behind the kernels
            of another; fewer where the heads do not divide (:func:`megatron_wallfacer.schedule.heads.head_groups`).
        shard_work: work of one query shard against one key shard where sizes are known
            (:func:`shard_work`). Small calls are merged (:mod:`megatron_wallfacer.schedule.merging`).

    Raises:
        OptionError: a combination for which no schedule exists.
    """

    grid: Grid
    scheme: str = "grid"
    kv_order: Order = "native"
    forward: Rider = "kv"
    backward: Rider = "kv"
    bidirectional: bool = False
    head_groups: int = 1
    shard_work: int | None = None

    def __post_init__(self) -> None:
        grid = self.grid
        if not isinstance(grid, Grid):
            raise OptionError("grid", grid, "a Grid")
        for name, names in (("kv_order", get_args(Order)), ("forward", get_args(Rider)), ("backward", get_args(Rider))):
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
        q_heads: query heads at hand, after tensor parallelism.
    """
    return tokens * tokens * q_heads
