"""Compute the number of layers with tensors in host memory: a given fraction, or as many as memory and links allow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.flags import Fraction
from megatron_wallfacer.offload.host import Left, gigabytes
from megatron_wallfacer.planning.inventory import layers_on_host

#: Fraction of the free host memory that ``auto`` leaves to data loaders, checkpoints and the file system.
RESERVE = 0.1


@dataclass(frozen=True)
class Wanted:
    """Tensors of one kind that a flag moves to host memory, on one rank.

    Attributes:
        flag: command-line flag that moves the tensors to host memory.
        fraction: value of the flag: a fraction of the layers, or ``auto``.
        bytes_by_count: element N is the bytes in host memory if N layers have tensors there.
        layer_bytes: bytes copied to the host after the forward pass of a layer.
    """

    flag: str
    fraction: Fraction
    bytes_by_count: tuple[int, ...]
    layer_bytes: int = 0

    def count(self, fraction: float) -> int:
        """Return the number of layers with tensors in host memory. These are the first layers of the rank."""
        return layers_on_host(len(self.bytes_by_count) - 1, fraction)

    def nbytes(self, auto: float) -> int:
        """Return the bytes in host memory. The argument ``auto`` is the fraction if the flag's value is ``auto``."""
        return self.bytes_by_count[self.count(auto if self.fraction == "auto" else self.fraction)]


@dataclass(frozen=True)
class RankNeeds:
    """The host memory that a rank needs for each kind of tensors, and the memory that its node has left."""

    node: str
    left: Left
    wanted: tuple[Wanted, ...]


@dataclass(frozen=True)
class Node:
    """A node: the memory needs of its ranks, and the least free host memory that one of its ranks reports."""

    name: str
    left: Left
    ranks: tuple[RankNeeds, ...]

    def nbytes(self, auto: float) -> int:
        """Return the bytes that all ranks of the node need."""
        return sum(wanted.nbytes(auto) for rank in self.ranks for wanted in rank.wanted)


def nodes_of(ranks: Sequence[RankNeeds]) -> list[Node]:
    """Return the nodes of a job."""
    found: defaultdict[str, list[RankNeeds]] = defaultdict(list)
    for rank in ranks:
        found[rank.node].append(rank)
    return [Node(name, min(rank.left for rank in members), tuple(members)) for name, members in found.items()]


def auto_fraction(ranks: Sequence[RankNeeds], overlapped_bytes: float | None = None) -> float:
    """Return the fraction of layers for ``auto``: the largest that every node's memory and the copy rate allow.

    Args:
        ranks: host-memory needs of each rank of the job.
        overlapped_bytes: largest number of bytes that a device can copy to the host during the forward pass of one
            layer. If the link's rate is unknown (None), only host memory limits the number of layers.
    """
    nodes = nodes_of(ranks)
    per_layer = max((sum(wanted.layer_bytes for wanted in rank.wanted) for rank in ranks), default=0)
    overlapped = 1.0 if overlapped_bytes is None or not per_layer else overlapped_bytes / per_layer
    # Fractions at which the number of layers in host memory changes on some rank.
    sizes = {len(wanted.bytes_by_count) - 1 for rank in ranks for wanted in rank.wanted}
    fractions = {count / layers for layers in sizes for count in range(1, layers + 1)}
    fitting = (
        fraction
        for fraction in sorted(fractions, reverse=True)
        if fraction <= overlapped and all(node.nbytes(fraction) <= (1 - RESERVE) * node.left.nbytes for node in nodes)
    )
    return next(fitting, 0.0)


def check_room(ranks: Sequence[RankNeeds], auto: float) -> None:
    """Check that every node has enough host memory.

    Args:
        ranks: host-memory needs of each rank of the job.
        auto: fraction of layers for flags whose value is ``auto``.

    Raises:
        WallfacerError: A node has too little host memory, or the fraction of a flag selects no layer of a rank. All
            ranks raise the same error.
    """
    for wanted in (wanted for rank in ranks for wanted in rank.wanted):
        layers = len(wanted.bytes_by_count) - 1
        if wanted.fraction != "auto" and layers and wanted.count(wanted.fraction) == 0:
            raise WallfacerError(
                f"{wanted.flag} {wanted.fraction}: must be at least {1 / layers:.3g} to select one of {layers} layers"
            )
    for node in nodes_of(ranks):
        needed = node.nbytes(auto)
        if needed > node.left.nbytes:
            given = {(wanted.flag, wanted.fraction) for rank in node.ranks for wanted in rank.wanted}
            flags = " ".join(f"{flag} {fraction}" for flag, fraction in sorted(given))
            raise WallfacerError(
                f"{flags}: needs {gigabytes(needed)} of host memory for the {len(node.ranks)} ranks on {node.name}, "
                f"which has {gigabytes(node.left.nbytes)} left ({node.left.limit}): use a smaller fraction, or auto"
            )
