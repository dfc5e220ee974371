"""The schedule: what one rank does, step by step, as plain data.

The engine runs it, the counters count it, the pictures draw it, and the property tests prove it, so
there is no second description of an algorithm anywhere. Building the schedule of one rank costs
O(ring + block) and needs no other rank.

One side of the square, the *rider*, moves around the ring; the other, the *resident*, stays. In
forward K and V ride. In backward either K, V and their gradients ride, or Q, dO and dQ do.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_wallfacer.schedule import moves
from megatron_wallfacer.schedule.blocks import Blocks, blocks_of
from megatron_wallfacer.schedule.layout import block_chunks
from megatron_wallfacer.schedule.moves import Combine, Gather, Hop, Move, Reduce
from megatron_wallfacer.schedule.plan import Plan, Rider
from megatron_wallfacer.schedule.tiles import Tile, tiles


@dataclass(frozen=True)
class Step:
    """One ring step: tiles to compute, and what moves meanwhile.

    Attributes:
        q_ranks: whose queries are at hand.
        kv_ranks: whose keys and values are at hand.
        tiles: kernel calls, in chunks of the two sorted blocks.
        hop: sends the rider's block on and receives that of the next step; in flight while the tiles run.
        grad_hop: sends the rider's gradient of the *previous* step's block on and receives what the ranks
            before this one have summed for this step's block; in flight while the tiles run, added after.
    """

    q_ranks: tuple[int, ...]
    kv_ranks: tuple[int, ...]
    tiles: tuple[Tile, ...]
    hop: Hop | None = None
    grad_hop: Hop | None = None


@dataclass(frozen=True)
class Schedule:
    """The program of one rank for one pass.

    Attributes:
        rank: index in the context-parallel group.
        backward: this is the gradient pass.
        rider: which side moves around the ring.
        prologue: what brings the first blocks together.
        steps: the turn of the ring.
        epilogue: what brings results home, in order.
        keeps_first: the rider's gradient of step 0 belongs to this rank and waits here for the rest.
    """

    rank: int
    backward: bool
    rider: Rider
    prologue: tuple[Move, ...]
    steps: tuple[Step, ...]
    epilogue: tuple[Move, ...]
    keeps_first: bool = False

    @property
    def moves(self) -> tuple[Move, ...]:
        """Every move in program order."""
        turning = [hop for step in self.steps for hop in (step.hop, step.grad_hop) if hop is not None]
        return (*self.prologue, *turning, *self.epilogue)


def forward_schedule(plan: Plan, rank: int, *, causal: bool = True) -> Schedule:
    """Schedule of the forward pass for one rank.

    Args:
        plan: grid and choices.
        rank: index in the context-parallel group.
        causal: causal mask, else full attention.

    Returns:
        Gathers of Q and K, V; the paper's initial permutation where it applies (Algorithm 2); ring steps
        (Algorithm 3); the lse-weighted combine along the team.
    """
    blocks = blocks_of(plan, rank, rider="kv")
    return Schedule(
        rank=rank,
        backward=False,
        rider="kv",
        prologue=_present(
            _gather("team", moves.Q, blocks.team),
            _gather(blocks.kv_axis, moves.KV, blocks.kv_home),
            _hop("cp", moves.KV, blocks, blocks.entry),
        ),
        steps=tuple(_step(plan, blocks, index, moves.KV, (), causal) for index in range(plan.grid.ring)),
        epilogue=(Combine("team", blocks.team),) if len(blocks.team) > 1 else (),
    )


def backward_schedule(plan: Plan, rank: int, *, causal: bool = True, q_kept: bool = False) -> Schedule:
    """Schedule of the backward pass for one rank.

    Args:
        plan: grid and choices; ``plan.backward`` says what rides.
        rank: index in the context-parallel group.
        causal: causal mask, else full attention.
        q_kept: the gathered queries were kept from forward and need no second gather.

    Returns:
        Gathers; ring steps in which the rider's gradient travels just behind its block; the hop that
        brings it home; reductions along team and kv_team.
    """
    blocks = blocks_of(plan, rank, rider=plan.backward)
    payload, grads = (moves.KV, moves.DKV) if plan.backward == "kv" else (moves.Q_BACKWARD, moves.DQ)
    return Schedule(
        rank=rank,
        backward=True,
        rider=plan.backward,
        prologue=_present(
            _gather("team", moves.Q_BACKWARD[1:] if q_kept else moves.Q_BACKWARD, blocks.team),
            _gather(blocks.kv_axis, moves.KV, blocks.kv_home),
            _hop("cp", payload, blocks, blocks.entry),
        ),
        steps=tuple(_step(plan, blocks, index, payload, grads, causal) for index in range(plan.grid.ring)),
        epilogue=_present(
            _hop(blocks.exit_axis, grads, blocks, blocks.exit),
            _reduce(blocks.kv_axis, moves.DKV, blocks.kv_home),
            _reduce("team", moves.DQ, blocks.team),
        ),
        keeps_first=blocks.keeps_first,
    )


def _step(
    plan: Plan, blocks: Blocks, index: int, payload: tuple[str, ...], grads: tuple[str, ...], causal: bool
) -> Step:
    cp_size, last = plan.grid.cp_size, plan.grid.ring - 1
    q_ranks, kv_ranks = blocks.at(index)
    # A rider that leaves its first gradient at home starts its accumulator one step later.
    first_arrival = 2 if blocks.keeps_first else 1
    return Step(
        q_ranks=q_ranks,
        kv_ranks=kv_ranks,
        tiles=tiles(block_chunks(q_ranks, cp_size), block_chunks(kv_ranks, cp_size), causal=causal),
        hop=_hop("ring", payload, blocks, blocks.ring) if index < last else None,
        grad_hop=_hop("ring", grads, blocks, blocks.ring) if grads and index >= first_arrival else None,
    )


def _present(*maybe: Move | None) -> tuple[Move, ...]:
    return tuple(move for move in maybe if move is not None)


def _gather(axis: str, payload: tuple[str, ...], ranks: tuple[int, ...]) -> Gather | None:
    return Gather(axis, payload, ranks) if len(ranks) > 1 else None


def _reduce(axis: str, payload: tuple[str, ...], ranks: tuple[int, ...]) -> Reduce | None:
    return Reduce(axis, payload, ranks) if len(ranks) > 1 else None


def _hop(axis: str, payload: tuple[str, ...], blocks: Blocks, peers: tuple[int, int] | None) -> Hop | None:
    """A hop to and from these peers; none where the block stays where it is."""
    if peers is None or peers[0] == blocks.rank:
        return None
    return Hop(axis, payload, *peers, shards=blocks.rider_shards)
