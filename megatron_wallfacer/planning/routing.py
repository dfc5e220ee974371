"""The links that a message uses, given its source and its target rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_wallfacer.planning.cluster import Cluster

Direction = Literal["out", "in"]


@dataclass(frozen=True)
class SharedLink:
    """A bus, or one direction of a link, and the ranks that share this bus or link.

    Attributes:
        kind: ``port`` (device to node), ``bus`` (of a node), ``nic``, or ``level0``, ``level1``... (switches).
        first: first rank that shares the link.
        ranks: number of consecutive ranks that share the link.
        direction: ``out`` if the ranks send over the link, ``in`` if they receive; always ``out`` for a bus.
        gbyte_s: capacity in 1e9 bytes per second.
    """

    kind: str
    first: int
    ranks: int
    direction: Direction
    gbyte_s: float


class Routing:
    """Routes between the ranks of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def latency_s(self, source: int, target: int) -> float:
        """Return the latency of a message between two ranks in seconds."""
        link = self.cluster.intra if self._same_node(source, target) else self.cluster.inter
        return link.latency_us * 1e-6

    def route(self, source: int, target: int) -> Iterator[SharedLink]:
        """Yield every link that limits the rate of a message between two ranks."""
        if source == target:
            return
        cluster, per_node = self.cluster, self.cluster.gpus_per_node
        if self._same_node(source, target):
            if cluster.intra.gbyte_s is not None:
                yield from _both_ends("port", source, target, 1, cluster.intra.gbyte_s)
            if cluster.node_gbyte_s is not None:
                yield SharedLink("bus", source // per_node * per_node, per_node, "out", cluster.node_gbyte_s)
        elif cluster.inter.gbyte_s is not None:
            # If a node has more NICs than devices, each device uses several NICs.
            capacity = cluster.inter.gbyte_s * max(1.0, cluster.nics / per_node)
            yield from _both_ends("nic", source, target, self._ranks_per_nic, capacity)
            for number, level in enumerate(cluster.levels):
                ranks = level.nodes * per_node
                if source // ranks != target // ranks:
                    capacity = cluster.inter.gbyte_s * cluster.nics * level.nodes / level.oversubscription
                    yield from _both_ends(f"level{number}", source, target, ranks, capacity)

    @property
    def unit_sizes(self) -> tuple[int, ...]:
        """Return the distinct sizes of groups of consecutive ranks that share a NIC, a node or a switch, ascending."""
        per_node = self.cluster.gpus_per_node
        sizes = {self._ranks_per_nic, per_node, *(level.nodes * per_node for level in self.cluster.levels)}
        return tuple(sorted(sizes))

    @property
    def _ranks_per_nic(self) -> int:
        return max(1, self.cluster.gpus_per_node // self.cluster.nics)

    def _same_node(self, source: int, target: int) -> bool:
        return source // self.cluster.gpus_per_node == target // self.cluster.gpus_per_node


def _both_ends(kind: str, source: int, target: int, ranks: int, gbyte_s: float) -> Iterator[SharedLink]:
    yield SharedLink(kind, source // ranks * ranks, ranks, "out", gbyte_s)
    yield SharedLink(kind, target // ranks * ranks, ranks, "in", gbyte_s)
