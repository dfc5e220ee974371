"""``wallfacer plan --scaling``: how the time of an attention layer and its best grid change with the cluster's size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_wallfacer.cli.table import figure, show_table

if TYPE_CHECKING:
    from megatron_wallfacer.planning.cluster import Cluster

#: Devices; each has so many tokens, so that 64 devices have 1M and 65,536 have 1G.
DEVICES, TOKENS_EACH = (64, 256, 1024, 4096, 16384, 65536), 16384
#: Query heads, and kv heads by the name of the line.
HEADS, KV_HEADS, HEAD_DIM = 32, {"MHA": 32, "GQA 8": 4}, 128


@dataclass(frozen=True)
class Point:
    """The best grid at one size.

    Attributes:
        line: ``MHA`` or ``GQA 8``.
        devices, tokens: of the cluster, of the sequence.
        seconds, kernel_s: of the layer, forward and backward, and of its kernels alone.
        grid, placement, bound_by: of the best plan.
    """

    line: str
    devices: int
    tokens: int
    seconds: float
    kernel_s: float
    grid: str
    placement: tuple[str, ...]
    bound_by: str


def points(cluster: Cluster, devices: Iterable[int] = DEVICES) -> Iterator[Point]:
    """The best grid of all devices, at each size and for both kinds of heads."""
    from megatron_wallfacer.planning.search import Job, search
    from megatron_wallfacer.schedule.volume import Shape

    for size in devices:
        there = replace(cluster, nodes=max(1, size // cluster.gpus_per_node))
        for line, kv_heads in KV_HEADS.items():
            best = search(Job(there, Shape(TOKENS_EACH, HEADS, kv_heads, HEAD_DIM), size)).best[0]
            yield Point(
                line,
                size,
                size * TOKENS_EACH,
                best.played.seconds,
                best.played.kernel_s,
                str(best.plan.grid),
                best.plan.grid.placement,
                best.bound.by,
            )


def show(found: Iterable[Point]) -> None:
    """One line a point."""
    headings = ("", ">devices", ">tokens", ">s", ">of kernels", "grid", "nearest first", "bound by")
    rows = (
        (
            point.line,
            str(point.devices),
            str(point.tokens),
            figure(point.seconds, 3),
            figure(point.seconds / point.kernel_s, 3),
            point.grid,
            ", ".join(point.placement),
            point.bound_by,
        )
        for point in found
    )
    show_table(headings, rows)
