"""Where the ranks of a job are."""

from __future__ import annotations

from collections.abc import Sequence
from socket import gethostname

import torch.distributed as dist

from megatron_wallfacer.errors import WallfacerError


def hosts_of_job() -> list[str]:
    """The machine of each rank."""
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, gethostname())
    return hosts


def nodes_of(hosts: Sequence[str]) -> tuple[int, int]:
    """(nodes, ranks of each).

    Raises:
        WallfacerError: ranks of a machine do not follow each other, or machines have different numbers of them.
    """
    in_order = list(dict.fromkeys(hosts))
    each = len(hosts) // len(in_order)
    if [host for host in in_order for _ in range(each)] != list(hosts):
        counts = ", ".join(f"{host} {hosts.count(host)}" for host in in_order)
        raise WallfacerError(f"ranks by machine ({counts}): must be as many on each, and follow each other")
    return len(in_order), each
