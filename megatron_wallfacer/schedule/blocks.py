"""Where blocks are: whose queries and keys a rank has at each ring step, and whom it exchanges with.

Two arrangements exist. In the *native* one a rank's key block is that of its ``kv_team`` and nothing
is ever permuted. In the *published* one (paper, Algorithms 2 and 3) both blocks are those of the
team, and an initial permutation spreads the C copies of the rider's block over C team groups.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan, Rider

Peers = tuple[int, int]
"""(send to, receive from)."""


@dataclass(frozen=True)
class Blocks:
    """One rank's blocks and peers.

    Attributes:
        rank: index in the context-parallel group.
        rider: which side moves.
        team: ranks whose queries are gathered, and reduced over.
        kv_axis: the axis along which K, V are gathered and dK, dV reduced.
        kv_home: ranks along that axis.
        riders: ranks of the rider's block at each ring step.
        ring: peers of a ring hop.
        entry: peers of the permutation before the first step, if there is one.
        exit: peers of the hop that brings the rider's gradient home after the last step, if it travelled.
        exit_axis: the groups over which it goes.
        keeps_first: step 0's rider gradient is already home.
    """

    rank: int
    rider: Rider
    team: tuple[int, ...]
    kv_axis: str
    kv_home: tuple[int, ...]
    riders: tuple[tuple[int, ...], ...]
    ring: Peers
    entry: Peers | None
    exit: Peers | None
    exit_axis: str
    keeps_first: bool

    @property
    def rider_shards(self) -> int:
        """Shards in the block that moves."""
        return len(self.riders[0])

    def at(self, step: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(ranks whose queries, ranks whose keys) are at hand at a ring step."""
        rider = self.riders[step]
        return (self.team, rider) if self.rider == "kv" else (rider, self.kv_home)


def blocks_of(plan: Plan, rank: int, *, rider: Rider) -> Blocks:
    """Blocks and peers of ``rank`` when ``rider`` moves around the ring."""
    return (_published if plan.kv_order == "paper" else _native)(plan.grid, rank, rider)


def _ring_peers(grid: Grid, rank: int) -> tuple[tuple[int, ...], Peers]:
    """The ring in the order in which its blocks arrive here, and (next, previous)."""
    ring, position = grid.neighbours(rank, "ring"), grid.coordinates(rank)["ring"]
    arriving = tuple(ring[(position - step) % grid.ring] for step in range(grid.ring))
    return arriving, (ring[(position + 1) % grid.ring], ring[position - 1])


def _native(grid: Grid, rank: int, rider: Rider) -> Blocks:
    arriving, peers = _ring_peers(grid, rank)
    axis = "kv_team" if rider == "kv" else "team"
    return Blocks(
        rank=rank,
        rider=rider,
        team=grid.neighbours(rank, "team"),
        kv_axis="kv_team",
        kv_home=grid.neighbours(rank, "kv_team"),
        riders=tuple(grid.neighbours(member, axis) for member in arriving),
        ring=peers,
        entry=None,
        # The last holder of a block stands just before its home, so the way home is one more ring hop.
        exit=peers,
        exit_axis="ring",
        keeps_first=True,
    )


def _published(grid: Grid, rank: int, rider: Rider) -> Blocks:
    """Paper, Algorithms 2 and 3, with team t = kv_team * R + ring and member a = the team coordinate.

    There are C*R teams, in C groups of R = P / C^2. Member a of team t sends its copy of the team's block
    to group a, where it belongs to team t // C of the group, member t % C.
    """
    here = grid.coordinates(rank)

    def member(team: int, index: int) -> int:
        group, position = divmod(team, grid.ring)
        return grid.rank({"kv_team": group, "ring": position, "team": index})

    def block(team: int) -> tuple[int, ...]:
        return tuple(member(team, index) for index in range(grid.team))

    def team_at(step: int) -> int:
        return (here["ring"] - step) % grid.ring * grid.team + here["team"]

    own = here["kv_team"] * grid.ring + here["ring"]
    position, index = divmod(own, grid.team)
    target = grid.rank({"kv_team": here["team"], "ring": position, "team": index})
    # Where this rank's own block ends its turn: one position before its start on the target ring.
    last_holder = grid.rank({"kv_team": here["team"], "ring": (position - 1) % grid.ring, "team": index})
    return Blocks(
        rank=rank,
        rider=rider,
        team=block(own),
        kv_axis="team",
        kv_home=block(own),
        riders=tuple(block(team_at(step)) for step in range(grid.ring)),
        ring=_ring_peers(grid, rank)[1],
        entry=(target, member(team_at(0), here["kv_team"])),
        exit=(member(team_at(grid.ring - 1), here["kv_team"]), last_holder),
        exit_axis="cp",
        keeps_first=False,
    )
