"""A plan: a grid and the choices that the grid does not determine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import Grid

RingOperand = Literal["kv", "q"]
#: Variants of ring attention (arXiv 2411.01783), by the operand that is passed around the ring.
RingVariant = Literal["pass-kv", "pass-q"]
RING_VARIANTS: tuple[RingVariant, ...] = get_args(RingVariant)
Order = Literal["native", "paper", "permuted"]


@dataclass(frozen=True)
class Plan:
    """All choices that determine the schedule of every rank.

    Attributes:
        grid: sizes of the axes, and placement.
        scheme: name of the scheme, only for texts such as errors.
        kv_order: which block of the ring operand each rank starts with. ``native``: the block of the rank's own team.
            ``paper``: each team gathers a block, and then ranks exchange whole blocks (WallFacer, Algorithm 2).
            ``permuted``: ranks start with the same blocks as with ``paper``, but exchange single shards before they
            gather. This exchange and the gather together have about half the volume that they have with ``paper``.
            ``paper`` and ``permuted`` need ``team == kv_team``.
        forward: ring variant of the forward pass. ``pass-kv`` passes K and V around the ring. ``pass-q`` passes Q
            around the ring, and returns partial outputs to the origin rank directly.
        backward: ring variant of the backward pass. ``pass-kv`` passes K, V and their gradients around the ring.
            ``pass-q`` passes Q, dO and dQ around the ring.
        bidirectional: whether each block moves in both directions of a single ring, half way around in each.
        head_groups: largest number of head groups. Schedules of head groups are interleaved, so that kernels of one
            group hide transfers of another group. The actual number is smaller if the heads do not divide
            (:func:`megatron_wallfacer.schedule.heads.head_groups`).
        shard_work: work of one query shard against one key shard (:func:`shard_work`); None if unknown. Calls with
            little work are merged (:mod:`megatron_wallfacer.schedule.merging`).

    Raises:
        OptionError: No schedule exists for the given values.
    """

    grid: Grid
    scheme: str = "grid"
    kv_order: Order = "native"
    forward: RingVariant = "pass-kv"
    backward: RingVariant = "pass-kv"
    bidirectional: bool = False
    head_groups: int = 1
    shard_work: int | None = None

    def __post_init__(self) -> None:
        grid = self.grid
        if not isinstance(grid, Grid):
            raise OptionError("grid", grid, "a Grid")
        for name, values in (("kv_order", get_args(Order)), ("forward", RING_VARIANTS), ("backward", RING_VARIANTS)):
            if getattr(self, name) not in values:
                raise OptionError(name, getattr(self, name), f"one of {', '.join(values)}")
        if self.kv_order != "native" and grid.team != grid.kv_team:
            raise OptionError("kv_team_size", grid.kv_team, f"the team size {grid.team} with kv_order {self.kv_order}")
        if self.bidirectional and grid.ring_inner > 1 and grid.ring_outer > 1:
            raise OptionError("bidirectional", grid, "used with a single ring: ring_inner or ring_outer must be 1")
        if not isinstance(self.head_groups, int) or self.head_groups < 1:
            raise OptionError("head_groups", self.head_groups, "a positive number")

    def ring_operand(self, *, backward: bool) -> RingOperand:
        """Return the operand that is passed around the ring in the forward pass, or in the backward pass."""
        return "kv" if (self.backward if backward else self.forward) == "pass-kv" else "q"


def shard_work(tokens: int, q_heads: int) -> int:
    """Return the work of one query shard against one key shard: query rows x key rows x query heads of a rank."""
    return tokens * tokens * q_heads
