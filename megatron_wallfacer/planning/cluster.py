"""A modelled cluster: nodes, links, NICs, and the time of a rank's kernels and copies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

Transport = Literal["nccl", "gloo"]


@dataclass(frozen=True)
class LinkSpeed:
    """One direction of a full-duplex link.

    Attributes:
        gbyte_s: rate of one message in 1e9 bytes per second; None for no limit.
        latency_us: microseconds from the moment when both ends are ready until the first byte arrives.
    """

    gbyte_s: float | None
    latency_us: float = 0.0

    def seconds(self, nbytes: float) -> float:
        """Return the seconds that ``nbytes`` take at the full rate, without latency."""
        return 0.0 if self.gbyte_s is None else nbytes / (self.gbyte_s * 1e9)


@dataclass(frozen=True)
class SwitchLevel:
    """A level of switches above the nodes. All nodes of a group share one link to the nodes outside the group.

    Attributes:
        nodes: number of nodes in a group.
        oversubscription: summed rate of the group's NICs, divided by the rate of the group's link; 1 for a non-blocking
            fat tree.
    """

    nodes: int
    oversubscription: float


@dataclass(frozen=True)
class Device:
    """The device of a rank.

    Attributes:
        tflops: peak for the dtype of attention, in 1e12 operations per second.
        memory_gb: device memory in 1e9 bytes.
        memory_gbyte_s: memory rate of merging and copying, in 1e9 bytes per second.
        kernels: table of measured attention kernels in :data:`megatron_wallfacer.planning.measured_kernels.TABLES`. The
            table replaces ``forward`` and ``backward``.
        forward, backward: rate of large attention calls as a fraction of the peak.
        call_us: device time of an attention call in addition to its kernel, in microseconds.
        launch_us: fixed device time of one copy, merge or sum in microseconds, without the time to move its bytes.
        host_forward_us, host_backward_us: host time of an attention call in microseconds.
        host_launch_us: host time to launch one copy, merge or sum, in microseconds.
        host_transfer_us: host time to post the sends and receives of one transfer, in microseconds.
        matmul: rate of matrix products outside attention as a fraction of the peak.
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
    """Processor time of one message.

    Attributes:
        size: size of the message in bytes.
        thread_us: microseconds for which the message keeps the sending rank's main thread busy.
        transport_us: processor microseconds of the operating system and of background threads for the message, at
            sender and receiver together.
    """

    size: float
    thread_us: float
    transport_us: float


@dataclass(frozen=True)
class HostProcessors:
    """CPU cores of an emulated cluster. All emulated ranks run on one real node and share its cores.

    Attributes:
        cores: number of CPU cores that are free for the ranks; need not be a whole number.
        copy_gbyte_s: rate at which one CPU core merges or copies, in 1e9 bytes per second.
        messages: costs of messages by ascending size; empty if messages cost no CPU time. Costs between two sizes, and
            above the largest size, are linear in the size. Below the smallest size the costs are constant.
        pass_us: CPU microseconds of each pass in addition to its operations.
        attend_us: processor microseconds of each operation that calls attention kernels.
        operation_us: processor microseconds of each operation except views and attention.
        wake_up_us: mean delay of a waking thread in microseconds if all processors are in use. Ranks of an
            emulated cluster sleep instead of running kernels. They also sleep while they wait for messages.
    """

    cores: float
    copy_gbyte_s: float
    messages: tuple[MessageCost, ...] = ()
    pass_us: float = 0.0
    attend_us: float = 0.0
    operation_us: float = 0.0
    wake_up_us: float = 0.0

    def message(self, size: float) -> MessageCost:
        """Return the cost of a message of ``size`` bytes."""
        if not self.messages:
            return MessageCost(size, 0.0, 0.0)
        pairs = [*pairwise(self.messages)] or [(self.messages[0], self.messages[0])]
        below, above = next((pair for pair in pairs if size <= pair[1].size), pairs[-1])
        part = max(0.0, (size - below.size) / (above.size - below.size)) if above.size > below.size else 0.0
        thread_us = below.thread_us + part * (above.thread_us - below.thread_us)
        return MessageCost(size, thread_us, below.transport_us + part * (above.transport_us - below.transport_us))


@dataclass(frozen=True)
class Cluster:
    """A modelled cluster. Rank r of a job runs on node r // gpus_per_node.

    Attributes:
        name: name of the cluster file.
        nodes: number of nodes.
        gpus_per_node: devices per node.
        intra: link of a device to the other devices of its node.
        inter: link of one NIC.
        device: device of each rank.
        nics: NICs per node, which the devices of the node share evenly.
        node_gbyte_s: total rate of all device links of a node if they share a bus (PCIe), in 1e9 bytes per second; None
            for a switch.
        levels: switches above the nodes, lowest first.
        transport: ``nccl`` runs the transfers of a process group one after the other. ``gloo`` runs transfers
            concurrently, and posts receives early.
        host: shared processors of an emulated cluster; None if processors are no limit.
        host_link: rate of copies in one direction between one device and host memory, in 1e9 bytes per second, while
            all devices of the node copy; None if no tensors may be kept in host memory.
        host_memory_gb: host memory per node in 1e9 bytes; None if no tensors may be kept in host memory.
    """

    name: str
    nodes: int
    gpus_per_node: int
    intra: LinkSpeed
    inter: LinkSpeed
    device: Device
    nics: int = 1
    node_gbyte_s: float | None = None
    levels: tuple[SwitchLevel, ...] = ()
    transport: Transport = "nccl"
    host: HostProcessors | None = None
    host_link: float | None = None
    host_memory_gb: float | None = None

    @property
    def offers_host_memory(self) -> bool:
        """Return whether tensors may be kept in host memory. This needs ``host_link`` and ``host_memory_gb``."""
        return self.host_link is not None and self.host_memory_gb is not None

    @property
    def ranks(self) -> int:
        """Return the number of devices of all nodes."""
        return self.nodes * self.gpus_per_node

    def with_gpus_per_node(self, count: int) -> Cluster:
        """Return the cluster with fewer devices per node and proportionally fewer NICs, but equal host memory."""
        return replace(self, gpus_per_node=count, nics=max(1, self.nics * count // self.gpus_per_node))

    def __str__(self) -> str:
        nics = "one NIC" if self.nics == 1 else f"{self.nics} NICs"
        return f"{self.name}: {self.nodes} nodes x {self.gpus_per_node} devices, {nics} per node"
