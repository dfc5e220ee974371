"""The links that a message uses, given its source and its target rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_wallfacer.planning.cluster import Cluster

Direction = Literal["out", "in"]


@dataclass(frozen=True)
class SharedLink:
    """One direction of a link, or a bus, with the ranks that share it.

    Attributes:
        kind: ``port`` (device to node), ``bus`` (of a node), ``nic``, or ``level0``, ``level1``... (switches).
        first: first rank that shares the link.
        ranks: number of consecutive ranks that share the link.
        direction: direction as seen from these ranks; always ``out`` for a bus.
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
        if self._same_node(source, target):
            yield from self._within_node(source, target)
        elif self.cluster.inter.gbyte_s is not None:
            yield self._nic(source, "out")
            yield self._nic(target, "in")
            yield from self._switches(source, target, self.cluster.inter.gbyte_s)

    def _within_node(self, source: int, target: int) -> Iterator[SharedLink]:
        cluster, per_node = self.cluster, self.cluster.gpus_per_node
        if cluster.intra.gbyte_s is not None:
            yield SharedLink("port", source, 1, "out", cluster.intra.gbyte_s)
            yield SharedLink("port", target, 1, "in", cluster.intra.gbyte_s)
        if cluster.node_gbyte_s is not None:
            yield SharedLink("bus", source // per_node * per_node, per_node, "out", cluster.node_gbyte_s)

    def _switches(self, source: int, target: int, gbyte_s: float) -> Iterator[SharedLink]:
        for number, level in enumerate(self.cluster.levels):
            ranks = level.nodes * self.cluster.gpus_per_node
            if source // ranks != target // ranks:
                capacity = gbyte_s * self.cluster.nics * level.nodes / level.oversubscription
                yield SharedLink(f"level{number}", source // ranks * ranks, ranks, "out", capacity)
                yield SharedLink(f"level{number}", target // ranks * ranks, ranks, "in", capacity)

    @property
    def unit_sizes(self) -> tuple[int, ...]:
        """Return the sizes of the units that share a link (NIC, node, switch), in ranks, ascending."""
        per_node = self.cluster.gpus_per_node
        sizes = {self._ranks_per_nic, per_node, *(level.nodes * per_node for level in self.cluster.levels)}
        return tuple(sorted(sizes))

    @property
    def _ranks_per_nic(self) -> int:
        return max(1, self.cluster.gpus_per_node // self.cluster.nics)

    def _nic(self, rank: int, direction: Direction) -> SharedLink:
        first = rank // self._ranks_per_nic * self._ranks_per_nic
        # If a node has more NICs than devices, each device uses several NICs.
        nics = max(1.0, self.cluster.nics / self.cluster.gpus_per_node)
        return SharedLink("nic", first, self._ranks_per_nic, direction, (self.cluster.inter.gbyte_s or 0.0) * nics)

    def _same_node(self, source: int, target: int) -> bool:
        return source // self.cluster.gpus_per_node == target // self.cluster.gpus_per_node
