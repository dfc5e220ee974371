"""Measure the cluster of a job for the planner: links, kernels and host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from socket import gethostname
from typing import Any

import torch
import torch.distributed as dist

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.kernels import select_kernel
from megatron_wallfacer.planning.cluster import Cluster, LinkSpeed
from megatron_wallfacer.schedule.volume import Shape
from megatron_wallfacer.tuning.device_rates import measure_device
from megatron_wallfacer.tuning.links import measure_host_memory, measure_link, measure_nics


def measure_cluster(shape: Shape, dtype: torch.dtype, device: torch.device, kernel: str) -> Cluster:
    """Measure the nodes of this job. All ranks must call this function, which returns the same cluster on all ranks.

    Kernels are measured for the shape of one rank's shard.

    Raises:
        WallfacerError: Nodes have different numbers of ranks, or no kernel supports the shape.
    """
    hosts = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, gethostname())
    nodes, per_node = count_nodes(hosts)
    pairs = [(rank, rank + 1) for rank in range(0, per_node - 1, 2)]
    intra = measure_link(pairs, device) if pairs else (float("inf"), 0.0)
    nic_gbyte_s, nic_latency_us, nics = measure_nics(nodes, per_node, device)
    selected = select_kernel(kernel, device=device, dtype=dtype, head_dim=shape.head_dim)
    rates = measure_device(selected, shape, dtype, device)
    host_link, host_memory_gb = measure_host_memory(device)
    return Cluster(
        "this job",
        nodes,
        per_node,
        _link(*intra),
        _link(nic_gbyte_s, nic_latency_us),
        rates,
        nics=nics,
        transport="nccl" if device.type == "cuda" else "gloo",
        host_link=host_link,
        host_memory_gb=host_memory_gb,
    )


def count_nodes(hosts: Sequence[str]) -> tuple[int, int]:
    """Return the number of nodes and the number of ranks per node.

    Raises:
        WallfacerError: The ranks of a node are not consecutive, or nodes have different numbers of ranks.
    """
    nodes = list(dict.fromkeys(hosts))
    per_node = len(hosts) // len(nodes)
    if [host for host in nodes for _ in range(per_node)] != list(hosts):
        counts = ", ".join(f"{host} {hosts.count(host)}" for host in nodes)
        raise WallfacerError(f"ranks by node ({counts}): must be consecutive, and the same number on each node")
    return len(nodes), per_node


def cluster_entries(cluster: Cluster) -> dict[str, Any]:
    """Return the entries of a cluster file."""
    entries = {name: value for name, value in asdict(cluster).items() if name not in ("name", "levels")}
    entries["device"] = {name: value for name, value in entries["device"].items() if value != float("inf")}
    return {name: value for name, value in entries.items() if value is not None}


def _link(gbyte_s: float, latency_us: float) -> LinkSpeed:
    return LinkSpeed(None if gbyte_s == float("inf") else gbyte_s, latency_us)
