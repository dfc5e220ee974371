"""Which links a message uses, by the ranks at its ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_wallfacer.planning.cluster import Cluster

Direction = Literal["out", "in"]


@dataclass(frozen=True)
class Resource:
    """One direction of a link, or a bus.

    Attributes:
        kind: ``port``, ``bus``, ``nic`` or ``level0``, ``level1``...
        first, ranks: those that share it are ``first`` and the following.
        direction: seen from them; a bus has one for both.
        gbyte_s: capacity.
    """

    kind: str
    first: int
    ranks: int
    direction: Direction
    gbyte_s: float


class Network:
    """The links of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def latency_s(self, source: int, target: int) -> float:
        """Of a message between two ranks."""
        link = self.cluster.intra if self._same_node(source, target) else self.cluster.inter
        return link.latency_us * 1e-6

    def route(self, source: int, target: int) -> Iterator[Resource]:
        """Every link that limits a message."""
        cluster, per_node = self.cluster, self.cluster.gpus_per_node
        if source == target:
            return
        if self._same_node(source, target):
            if cluster.intra.gbyte_s is not None:
                yield Resource("port", source, 1, "out", cluster.intra.gbyte_s)
                yield Resource("port", target, 1, "in", cluster.intra.gbyte_s)
            if cluster.node_gbyte_s is not None:
                yield Resource("bus", source // per_node * per_node, per_node, "out", cluster.node_gbyte_s)
            return
        if cluster.inter.gbyte_s is None:
            return
        yield self._card(source, "out")
        yield self._card(target, "in")
        for number, level in enumerate(cluster.levels):
            ranks = level.nodes * per_node
            if source // ranks != target // ranks:
                capacity = cluster.inter.gbyte_s * cluster.nics * level.nodes / level.oversubscription
                yield Resource(f"level{number}", source // ranks * ranks, ranks, "out", capacity)
                yield Resource(f"level{number}", target // ranks * ranks, ranks, "in", capacity)

    @property
    def unit_sizes(self) -> tuple[int, ...]:
        """Ranks of what shares something, each size once: cards, nodes, switches."""
        per_node = self.cluster.gpus_per_node
        sizes = {self._per_card, per_node, *(level.nodes * per_node for level in self.cluster.levels)}
        return tuple(sorted(sizes))

    @property
    def _per_card(self) -> int:
        return max(1, self.cluster.gpus_per_node // self.cluster.nics)

    def _card(self, rank: int, direction: Direction) -> Resource:
        first = rank // self._per_card * self._per_card
        # More cards than devices: each device has several.
        cards = max(1.0, self.cluster.nics / self.cluster.gpus_per_node)
        return Resource("nic", first, self._per_card, direction, (self.cluster.inter.gbyte_s or 0.0) * cards)

    def _same_node(self, one: int, other: int) -> bool:
        return one // self.cluster.gpus_per_node == other // self.cluster.gpus_per_node
