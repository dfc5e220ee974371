"""The published arrangement: which team a rank is in, and where its copy of the team's block goes.

Paper (arXiv 2407.00611), Algorithms 2 and 3. There are C * R teams of C ranks, in C groups of R = P / C^2 teams. Member
a of team t sends its copy of the team's block to group a, where it belongs to team t // C of the group, member t % C.
Then C^2 rings of R ranks turn.
"""

from __future__ import annotations

from megatron_wallfacer.schedule.grid import Grid


def team_of(grid: Grid, rank: int) -> tuple[int, ...]:
    """The ranks whose queries, keys and values a rank's team gathers."""
    return _block(grid, rank, _number(grid, rank))


def entering(grid: Grid, rank: int) -> tuple[int, tuple[int, ...]]:
    """(the rank whose copy of a block comes to ``rank`` before the first visit, the team whose block it is)."""
    here = grid.coordinates(rank)
    team = _block(grid, rank, _position(grid, rank) * grid.team + here["team"])
    return team[here["kv_team"]], team


def target(grid: Grid, rank: int) -> int:
    """The rank to which this rank's copy of its team's block goes."""
    position, index = divmod(_number(grid, rank), grid.team)
    return _rank(grid, rank, grid.coordinates(rank)["team"], position, index)


def _position(grid: Grid, rank: int) -> int:
    here = grid.coordinates(rank)
    return here["ring_outer"] * grid.ring_inner + here["ring_inner"]


def _number(grid: Grid, rank: int) -> int:
    """t, the team of a rank."""
    return grid.coordinates(rank)["kv_team"] * grid.ring + _position(grid, rank)


def _block(grid: Grid, beside: int, team: int) -> tuple[int, ...]:
    group, position = divmod(team, grid.ring)
    return tuple(_rank(grid, beside, group, position, index) for index in range(grid.team))


def _rank(grid: Grid, beside: int, kv_team: int, position: int, team: int) -> int:
    """A rank by its place in the arrangement, with the heads of the rank ``beside``."""
    outer, inner = divmod(position, grid.ring_inner)
    here = {"kv_team": kv_team, "ring_outer": outer, "ring_inner": inner, "team": team}
    return grid.rank({**grid.coordinates(beside), **here})
