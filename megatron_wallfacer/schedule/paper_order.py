"""The arrangement of blocks in the WallFacer paper: the team of each rank, and the destinations of a team's block.

Source: arXiv 2407.00611, Algorithms 2 and 3. The P / C teams of C ranks are divided into C groups of R = P / C^2 teams.
Every member of a team gathers the block of the team. Member i of team t then sends the block to group i. In this group
the receiver is member t % C of team t // C. Afterwards, blocks move around C^2 rings of R ranks.
"""

from __future__ import annotations

from megatron_wallfacer.schedule.grid import Grid


def team_of(grid: Grid, rank: int) -> tuple[int, ...]:
    """Return the ranks in the team of ``rank``, by member number."""
    return _team(grid, rank, _team_number(grid, rank))


def entering(grid: Grid, rank: int) -> tuple[int, tuple[int, ...]]:
    """Return the rank that sends ``rank`` its first block, and the team whose rows this block contains."""
    here = grid.coordinates(rank)
    team = _team(grid, rank, _position(grid, rank) * grid.team + here["team"])
    return team[here["kv_team"]], team


def target(grid: Grid, rank: int) -> int:
    """Return the rank to which ``rank`` sends its team's block."""
    position, index = divmod(_team_number(grid, rank), grid.team)
    return _rank(grid, rank, grid.coordinates(rank)["team"], position, index)


def _position(grid: Grid, rank: int) -> int:
    here = grid.coordinates(rank)
    return here["ring_outer"] * grid.ring_inner + here["ring_inner"]


def _team_number(grid: Grid, rank: int) -> int:
    """Return t, the number of the team of a rank."""
    return grid.coordinates(rank)["kv_team"] * grid.ring + _position(grid, rank)


def _team(grid: Grid, like: int, number: int) -> tuple[int, ...]:
    group, position = divmod(number, grid.ring)
    return tuple(_rank(grid, like, group, position, index) for index in range(grid.team))


def _rank(grid: Grid, like: int, kv_team: int, position: int, team: int) -> int:
    """Return the rank with the given coordinates and the same heads as the rank ``like``."""
    outer, inner = divmod(position, grid.ring_inner)
    coordinates = {"kv_team": kv_team, "ring_outer": outer, "ring_inner": inner, "team": team}
    return grid.rank({**grid.coordinates(like), **coordinates})
