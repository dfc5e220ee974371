"""Derive the rings, the teams and the permutation of blocks in a plot from the transfers of the schedules."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_wallfacer.plots.palette import Colour, hues, ramp, tints
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.ops import Schedule, Transfer

#: Largest cp size for which the plot shows each rank's chunks, and largest cp size with the complete permutation.
MAX_WITH_CHUNKS, MAX_PERMUTED = 16, 8


def is_double(grid: Grid) -> bool:
    """Return whether a grid has an inner and an outer ring."""
    return grid.ring_inner > 1 and grid.ring_outer > 1


def step_axis(grid: Grid) -> str:
    """Return the axis along which blocks hop in every ring step: the inner ring of a double ring, or the only ring."""
    return "ring_inner" if grid.ring_inner > 1 else "ring_outer"


def hops(schedule: Schedule, axis: str) -> tuple[Transfer, ...]:
    """Return the transfers of the tensors that move around a ring."""
    return tuple(move for move in schedule.transfers if move.channel == (axis, "inputs"))


def next_rank(schedule: Schedule, axis: str) -> int:
    """Return the next rank of a ring, or the rank itself if the rank sends nothing along the ring."""
    transfers = hops(schedule, axis)
    return transfers[0].sends[0].peer if transfers else schedule.rank


def rings(schedules: Sequence[Schedule], axis: str) -> list[tuple[int, ...]]:
    """Return the ranks of each ring in the order of the hops. A rank that sends nothing gets a ring of its own."""
    following = {schedule.rank: next_rank(schedule, axis) for schedule in schedules}
    result: list[tuple[int, ...]] = []
    while following:
        ring, rank = [], min(following)
        while rank in following:
            ring.append(rank)
            rank = following.pop(rank)
        result.append(tuple(ring))
    return result


def is_bidirectional(schedule: Schedule, axis: str) -> bool:
    """Return whether a rank sends in both directions of a ring."""
    return len({message.peer for move in hops(schedule, axis) for message in move.sends}) > 1


def rank_colours(grid: Grid, schedules: Sequence[Schedule]) -> list[Colour]:
    """Return a colour for each rank: one hue per ring, one tint per position on the ring."""
    all_rings = rings(schedules, step_axis(grid))
    colours: dict[int, Colour] = {}
    for hue, ring in zip(hues(len(all_rings)), all_rings, strict=True):
        # A single ring uses the complete range of colours.
        shades = ramp(len(ring)) if len(all_rings) == 1 else tints(hue, len(ring))
        colours |= dict(zip(ring, shades, strict=True))
    return [colours[rank] for rank in range(len(schedules))]


def gathered(schedule: Schedule, axis: str) -> tuple[str, ...]:
    """Return the tensors among q, k and v that are gathered along an axis."""
    tensors = {tensor for move in schedule.transfers if move.axis == axis for tensor in move.payload}
    return tuple(tensor for tensor in ("q", "k", "v") if tensor in tensors)


def kv_team_of(schedule: Schedule) -> tuple[int, ...]:
    """Return all ranks of the schedule's ``kv_team``, or no ranks if the grid has no ``kv_team``."""
    transfers = [move for move in schedule.transfers if move.channel == ("kv_team", "inputs")]
    peers = {message.peer for move in transfers for message in move.receives}
    return tuple(sorted(peers | {schedule.rank} if transfers else ()))


def permutation_target(schedule: Schedule) -> int | None:
    """Return the rank that receives a rank's tensors before the first ring step (Algorithm 2), or None."""
    transfers = (move for move in schedule.transfers if move.channel == ("cp", "inputs"))
    return next((move.sends[0].peer for move in transfers), None)


def permutation_shown(grid: Grid) -> set[int]:
    """Return the ranks whose permuted blocks the plot shows: all ranks of a small grid, two teams of a large grid."""
    teams = list(dict.fromkeys(grid.neighbours(rank, "team") for rank in range(grid.cp_size)))
    return {rank for team in (teams if grid.cp_size <= MAX_PERMUTED else teams[:2]) for rank in team}
