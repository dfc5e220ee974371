"""Which interfaces, addresses, routes and limits make a topology: lines for ``ip -batch`` and ``tc -batch``.

One namespace a rank, and one for the switches, so that nothing is ever made in the machine's own namespace and
whatever is made goes away with the namespaces.

* ``nic`` (10.2.0.(r+1)) leads to the fabric, the bridge between nodes. With one network card a node, the cards of its
  ranks meet in a bridge first, and the card is the link from there to the fabric.
* ``nv`` (10.1.node.(r+1)) leads to the bridge of the node. Routes send what is meant for a rank of the same node that
  way, so torch.distributed sees one address a rank.

A link is limited at both ends: a token bucket delays what leaves an interface, never what arrives.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cluster.topology import Topology

#: Bytes that may leave at once. One segmentation-offload packet (64 KiB) has to fit; much more flatters small messages.
BURST = 68 * 1024
#: Bytes that may wait at a link before packets are dropped. Drops would measure TCP's recovery.
QUEUE = 32 * 1024 * 1024
NIC, NODE_LINK = "nic", "nv"
_FABRIC = "fab"


@dataclass(frozen=True)
class Wiring:
    """Names and commands of one cluster; ``prefix`` begins the name of each of its namespaces."""

    topology: Topology
    prefix: str

    @property
    def switch(self) -> str:
        """Namespace of the bridges."""
        return f"{self.prefix}sw"

    def namespace(self, rank: int) -> str:
        """Namespace of a rank."""
        return f"{self.prefix}r{rank}"

    @property
    def namespaces(self) -> list[str]:
        """All namespaces."""
        return [self.switch, *(self.namespace(rank) for rank in range(self.topology.ranks))]

    def address(self, rank: int) -> str:
        """The address by which others know a rank."""
        return f"10.2.{(rank + 1) // 256}.{(rank + 1) % 256}"

    def switch_links(self) -> list[str]:
        """``ip`` lines for the namespace of the switches. They also make the interfaces of the ranks."""
        topology = self.topology
        lines = [*_bridge(_FABRIC), "link set lo up"]
        for node in range(topology.nodes):
            lines += _bridge(f"node{node}")
            if topology.nic == "node":
                lines += [*_bridge(f"card{node}"), f"link add up{node} type veth peer name down{node}"]
                lines += [*_attach(f"up{node}", f"card{node}"), *_attach(f"down{node}", _FABRIC)]
        for rank in range(topology.ranks):
            node = topology.node_of(rank)
            fabric = f"card{node}" if topology.nic == "node" else _FABRIC
            lines += self._cable(rank, NIC, f"n{rank}", fabric)
            if topology.ranks_per_node > 1:
                lines += self._cable(rank, NODE_LINK, f"v{rank}", f"node{node}")
        return lines

    def _cable(self, rank: int, inside: str, port: str, bridge: str) -> list[str]:
        made = f"link add {port} type veth peer name {inside} netns {self.namespace(rank)}"
        return [made, *_attach(port, bridge)]

    def rank_links(self, rank: int) -> list[str]:
        """``ip`` lines for the namespace of a rank."""
        node = self.topology.node_of(rank)
        lines = ["link set lo up", f"addr add {self.address(rank)}/16 dev {NIC}", f"link set {NIC} up"]
        if self.topology.ranks_per_node > 1:
            lines += [f"addr add {self._node_address(node, rank)}/24 dev {NODE_LINK}", f"link set {NODE_LINK} up"]
        for mate in self.topology.mates_of(rank):
            via = self._node_address(node, mate)
            lines.append(f"route add {self.address(mate)}/32 via {via} dev {NODE_LINK} src {self.address(rank)}")
        return lines

    def _node_address(self, node: int, rank: int) -> str:
        return f"10.1.{node}.{rank - node * self.topology.ranks_per_node + 1}"

    def switch_limits(self) -> list[str]:
        """``tc`` lines for the namespace of the switches: what arrives at a rank or a node."""
        topology = self.topology
        if topology.nic == "node":
            cards = [port for node in range(topology.nodes) for port in (f"up{node}", f"down{node}")]
        else:
            cards = [f"n{rank}" for rank in range(topology.ranks)]
        links = [f"v{rank}" for rank in range(topology.ranks)] if topology.ranks_per_node > 1 else []
        return [*_limits(cards, topology.inter_mbit), *_limits(links, topology.intra_mbit)]

    def rank_limits(self) -> list[str]:
        """``tc`` lines for the namespace of a rank: what leaves it."""
        topology = self.topology
        cards = [NIC] if topology.nic == "rank" else []
        links = [NODE_LINK] if topology.ranks_per_node > 1 else []
        return [*_limits(cards, topology.inter_mbit), *_limits(links, topology.intra_mbit)]


def _bridge(name: str) -> list[str]:
    return [f"link add {name} type bridge stp_state 0 forward_delay 0", f"link set {name} up"]


def _attach(port: str, bridge: str) -> list[str]:
    return [f"link set {port} master {bridge}", f"link set {port} up"]


def _limits(interfaces: list[str], mbit: float | None) -> list[str]:
    if mbit is None:
        return []
    bucket = f"tbf rate {round(mbit * 1e6)}bit burst {BURST} limit {QUEUE}"
    return [f"qdisc add dev {interface} root {bucket}" for interface in interfaces]
