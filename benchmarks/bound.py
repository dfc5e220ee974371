"""The time below which no overlap can bring a scheme: max(compute alone, busiest link)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.cluster.counters import LinkBytes
from benchmarks.cluster.topology import Topology
from benchmarks.contender import Contender
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.volume import Shape, rows_bytes

Flows = Counter[tuple[int, int]]
"""Bytes by (sending rank, receiving rank)."""


@dataclass(frozen=True)
class Traffic:
    """What a scheme sends.

    Attributes:
        sent: bytes by rank.
        inter_sent: of these, bytes that leave the node.
        link_s: seconds that the busiest direction of any link is in use at its full rate; 0 where all are unlimited.
    """

    sent: tuple[float, ...]
    inter_sent: tuple[float, ...]
    link_s: float


def planned_traffic(contender: Contender, topology: Topology, shape: Shape) -> Traffic | None:
    """Traffic by the schedules of all ranks, forward + backward; None for what has none."""
    flows: Flows = Counter()
    for rank in range(topology.ranks):
        schedules = contender.schedules(rank, shape)
        if schedules is None:
            return None
        for schedule in schedules:
            flows.update(_flows(schedule, shape))
    return _traffic(flows, topology)


def counted_traffic(counted: Sequence[LinkBytes], topology: Topology) -> Traffic:
    """Traffic by the counters of each rank, headers included."""
    inter = [max(_pair) for _pair in _per_card(counted, topology)]
    intra = [max(one.intra_sent, one.intra_received) for one in counted]
    link_s = max(_seconds(inter, topology.inter_mbit), _seconds(intra, topology.intra_mbit))
    return Traffic(tuple(one.sent for one in counted), tuple(one.inter_sent for one in counted), link_s)


def _per_card(counted: Sequence[LinkBytes], topology: Topology) -> list[tuple[int, int]]:
    """(sent, received) by network card."""
    ranks = 1 if topology.nic == "rank" else topology.ranks_per_node
    cards = [counted[first : first + ranks] for first in range(0, len(counted), ranks)]
    return [(sum(one.inter_sent for one in card), sum(one.inter_received for one in card)) for card in cards]


def _flows(schedule: Schedule, shape: Shape) -> Flows:
    """What the rank of a schedule sends."""
    flows: Flows = Counter()
    for move in schedule.transfers:
        for message in move.sends:
            flows[schedule.rank, message.peer] += rows_bytes(schedule, shape, move.payload, len(message.chunks))
    return flows


def _traffic(flows: Flows, topology: Topology) -> Traffic:
    ranks, node = range(topology.ranks), topology.node_of
    sent: Counter[int] = Counter()
    inter_sent: Counter[int] = Counter()
    cards: Counter[tuple[int, str]] = Counter()
    links: Counter[tuple[int, str]] = Counter()
    for (source, target), size in flows.items():
        sent[source] += size
        if node(source) == node(target):
            links[source, "out"] += size
            links[target, "in"] += size
            continue
        inter_sent[source] += size
        per_rank = topology.nic == "rank"
        cards[source if per_rank else node(source), "out"] += size
        cards[target if per_rank else node(target), "in"] += size
    link_s = max(_seconds(cards.values(), topology.inter_mbit), _seconds(links.values(), topology.intra_mbit))
    return Traffic(tuple(sent[rank] for rank in ranks), tuple(inter_sent[rank] for rank in ranks), link_s)


def _seconds(sizes: Iterable[float], mbit: float | None) -> float:
    return 0.0 if mbit is None else max(sizes, default=0) * 8 / (mbit * 1e6)
