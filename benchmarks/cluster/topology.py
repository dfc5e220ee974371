"""What the cluster looks like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Topology:
    """Nodes, ranks and links. Every link is full duplex and has its rate in each direction.

    Attributes:
        nodes: number of nodes.
        ranks_per_node: ranks on each; rank r is on node r // ranks_per_node.
        nic: what has a network card of its own, each rank or each node. It decides what a scheme can gain by spreading
            its traffic over the ranks of a node.
        inter_mbit: rate of a network card, Mbit/s; None for unlimited.
        intra_mbit: rate of a rank's link to the other ranks of its node, Mbit/s; None for unlimited.
    """

    nodes: int
    ranks_per_node: int
    nic: Literal["rank", "node"] = "rank"
    inter_mbit: float | None = None
    intra_mbit: float | None = None

    @property
    def ranks(self) -> int:
        """All ranks, P."""
        return self.nodes * self.ranks_per_node

    def node_of(self, rank: int) -> int:
        """Node on which a rank is."""
        return rank // self.ranks_per_node

    def mates_of(self, rank: int) -> list[int]:
        """The other ranks of a rank's node."""
        first = self.node_of(rank) * self.ranks_per_node
        return [mate for mate in range(first, first + self.ranks_per_node) if mate != rank]

    def __str__(self) -> str:
        inter, intra = (
            "unlimited" if rate is None else f"{rate:g} Mbit/s" for rate in (self.inter_mbit, self.intra_mbit)
        )
        return f"{self.nodes} nodes x {self.ranks_per_node} ranks, a NIC a {self.nic}: {inter}, within a node: {intra}"
