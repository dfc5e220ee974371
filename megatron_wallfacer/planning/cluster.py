"""A cluster on paper: nodes, links, network cards, and what a rank's kernels and copies take."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

Transport = Literal["nccl", "gloo"]


@dataclass(frozen=True)
class Link:
    """One direction of a full-duplex link.

    Attributes:
        gbyte_s: 1e9 bytes a second that a message reaches; None where nothing limits it.
        latency_us: from the moment that both ends are ready until the first byte arrives.
    """

    gbyte_s: float | None
    latency_us: float = 0.0

    def seconds(self, size: float) -> float:
        """For so many bytes at the full rate."""
        return 0.0 if self.gbyte_s is None else size / (self.gbyte_s * 1e9)


@dataclass(frozen=True)
class Level:
    """A switch above the nodes: groups of nodes that share a link to the rest.

    Attributes:
        nodes: of a group.
        oversubscription: by how much the cards of a group outrun its link; 1 is a fat tree and limits nothing.
    """

    nodes: int
    oversubscription: float


@dataclass(frozen=True)
class Device:
    """What a rank computes on.

    Attributes:
        tflops: peak of the attention kernel's dtype, 1e12 operations a second.
        memory_gb: of the device, 1e9 bytes.
        memory_gbyte_s: what merging and copying reach.
        kernels: measured attention kernels, by name (:data:`megatron_wallfacer.planning.kernels.TABLES`). With them
            ``forward`` and ``backward`` have no meaning.
        forward, backward: parts of the peak that a large attention call reaches.
        call_us: device time of every attention call beside its kernel, however small.
        launch_us: device time of every other launch (copies, merges, sums) beside its bytes.
        host_forward_us, host_backward_us: host time of every attention call.
        host_launch_us: host time of every other launch.
        host_transfer_us: host time to start a transfer (sends and receives posted together).
        matmul: part of the peak that the other layers reach.
    """

    tflops: float
    memory_gb: float = float("inf")
    memory_gbyte_s: float | None = None
    forward: float = 1.0
    backward: float = 1.0
    call_us: float = 0.0
    kernels: str | None = None
    launch_us: float = 0.0
    host_forward_us: float = 0.0
    host_backward_us: float = 0.0
    host_launch_us: float = 0.0
    host_transfer_us: float = 0.0
    matmul: float = 0.5


@dataclass(frozen=True)
class MessageCost:
    """Processor time of a message of some size.

    Attributes:
        size: bytes.
        thread_us: in the thread of the rank that sends it, which does nothing else meanwhile.
        transport_us: of everything else that moves it, at both ends, while it flows.
    """

    size: float
    thread_us: float
    transport_us: float


@dataclass(frozen=True)
class Host:
    """Processors that the ranks of the *whole cluster* share: an emulated cluster is one machine.

    Attributes:
        cores: of them.
        copy_gbyte_s: bytes that one of them merges or copies in a second.
        messages: what messages of some sizes cost, the smallest first; none: nothing. Others lie on the lines between
            them, larger ones on the last line, and smaller ones cost what the smallest costs.
        pass_us: of every forward and backward.
        attend_us: of every operation of a schedule that calls kernels.
        operation_us: of the others; those that only name a tensor are free.
        late_us: that a thread waits for a processor when it wakes, where all are used; the mean. Modelled kernels are
            sleeps, and so are waits for messages.
    """

    cores: float
    copy_gbyte_s: float
    messages: tuple[MessageCost, ...] = ()
    pass_us: float = 0.0
    attend_us: float = 0.0
    operation_us: float = 0.0
    late_us: float = 0.0

    def message(self, size: float) -> MessageCost:
        """Of one of ``size`` bytes."""
        if not self.messages:
            return MessageCost(size, 0.0, 0.0)
        pairs = [*pairwise(self.messages)] or [(self.messages[0], self.messages[0])]
        below, above = next((pair for pair in pairs if size <= pair[1].size), pairs[-1])
        part = max(0.0, (size - below.size) / (above.size - below.size)) if above.size > below.size else 0.0
        thread_us = below.thread_us + part * (above.thread_us - below.thread_us)
        return MessageCost(size, thread_us, below.transport_us + part * (above.transport_us - below.transport_us))


@dataclass(frozen=True)
class Cluster:
    """All of it. Rank r of a job is on node r // gpus_per_node.

    Attributes:
        name: of its file.
        nodes, gpus_per_node: how many.
        intra: a device's port to the others of its node.
        inter: one network card.
        device: a device.
        nics: network cards of a node; its devices share them evenly.
        node_gbyte_s: what all ports of a node carry together where they share a bus (PCIe); None for a switch.
        levels: switches, the lowest first.
        transport: how messages behave: ``nccl`` runs the moves of a group one after the other, ``gloo`` all at once,
            and posts receives early.
        host: where processors are what is scarce.
        host_link: 1e9 bytes a second that each device copies to and from host memory, in one direction, while all
            devices of the node do. None: nothing is kept in host memory.
        host_memory_gb: host memory of a node, 1e9 bytes. None: nothing is kept there.
    """

    name: str
    nodes: int
    gpus_per_node: int
    intra: Link
    inter: Link
    device: Device
    nics: int = 1
    node_gbyte_s: float | None = None
    levels: tuple[Level, ...] = field(default=())
    transport: Transport = "nccl"
    host: Host | None = None
    host_link: float | None = None
    host_memory_gb: float | None = None

    @property
    def offers_host_memory(self) -> bool:
        """Whether tensors may be kept in host memory: both numbers are there."""
        return self.host_link is not None and self.host_memory_gb is not None

    @property
    def ranks(self) -> int:
        """All devices."""
        return self.nodes * self.gpus_per_node

    def with_gpus_per_node(self, count: int) -> Cluster:
        """Return the cluster with fewer devices per node. They keep their share of cards; the host memory stays."""
        return replace(self, gpus_per_node=count, nics=max(1, self.nics * count // self.gpus_per_node))

    def __str__(self) -> str:
        cards = "one network card" if self.nics == 1 else f"{self.nics} network cards"
        return f"{self.name}: {self.nodes} nodes x {self.gpus_per_node} devices, {cards} a node"
