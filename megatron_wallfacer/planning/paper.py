"""The paper's evaluation on paper: its published numbers, and one calibration for each of its clusters.

What is calibrated, to what, and what does not fit: ``docs/paper.md``.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from megatron_wallfacer.planning.cluster import Cluster, Device, Link
from megatron_wallfacer.planning.model import MODELS, Model
from megatron_wallfacer.planning.parallel import Software

DATA = Path(__file__).with_name("data") / "wallfacer_paper.csv"

#: The implementation that the paper measured, everywhere. Its baseline's time is linear plus quadratic in the length,
#: with the quadratic part of WallFacer's, so little is hidden: a third. Sums travel in bf16; gradients are reduced in
#: fp32 and weights gathered in bf16 beside nothing, since attention fills the links (section 4.6, ZeRO-2).
SOFTWARE = Software(
    attention_hidden=0.35,
    reduction_hidden=0.0,
    gradient_bytes=4,
    accumulate_bytes=2,
    recompute="keep-attention",
    states="zero-2",
    stand_ins=False,
)
#: Whether half of the pairs are masked is not said. All live is the reading in which attention kernels reach 18 % of an
#: H100's peak; in the other it would be 9 %.
CAUSAL = False

# Large calls reach these parts of the peak. Kernels written for an A100 are not much faster on an H100.
_A100 = Device(312, 40, 1300, forward=0.4, backward=0.4, call_us=20, matmul=0.5)
_H100 = Device(989, 80, 2000, forward=0.18, backward=0.18, call_us=20, matmul=0.4)
# Of 100 Gbit/s Ethernet, NCCL over sockets reaches a fifth; of a 400 Gbit/s card InfiniBand reaches nine tenths.
_ETHERNET, _INFINIBAND = Link(2.5, 100), Link(45, 20)

A100_16 = Cluster("A100_16", 2, 16, Link(240, 10), _ETHERNET, _A100, nics=1)
A100_8 = replace(A100_16, name="A100_8", nodes=4, gpus_per_node=8)
H100_8 = Cluster("H100_8", 4, 8, Link(300, 10), _INFINIBAND, _H100, nics=8)
CLUSTERS = {cluster.name: cluster for cluster in (A100_16, A100_8, H100_8)}
#: The reading ``cluster`` of :mod:`megatron_wallfacer.planning.figures`: what fits best. C = 4 is as fast in both.
PLACEMENT = {"A100_16": "teams-adjacent", "A100_8": "teams-adjacent", "H100_8": "rings-adjacent"}
_MODELS = {"3B": MODELS["gpt-3b"], "7B": MODELS["gpt-7b"]}


@dataclass(frozen=True)
class Point:
    """One bar of figure 7, or one point of figure 9.

    Attributes:
        figure: 7 or 9.
        cluster: with the point's number of nodes.
        model: that was trained.
        tokens: of the sequence.
        scheme: ``ring``, ``wallfacer-2``, ``wallfacer-4`` or ``wallfacer-best``.
        k_tokens_s: 1000 tokens a second, all devices together.
    """

    figure: int
    cluster: Cluster
    model: Model
    tokens: int
    scheme: str
    k_tokens_s: float


def published(figure: int) -> list[Point]:
    """The points of a figure, in the order of the paper."""
    return [
        Point(
            figure,
            replace(CLUSTERS[row["cluster"]], nodes=int(row["nodes"])),
            _MODELS[row["model"]],
            int(row["sequence"]),
            row["scheme"],
            float(row["value"]),
        )
        for row in _rows()
        if row["figure"] == str(figure) and row["quantity"] == "k_tokens_per_s"
    ]


@cache
def _rows() -> tuple[dict[str, str], ...]:
    return tuple(csv.DictReader(_without_comments()))


def _without_comments() -> Iterator[str]:
    for line in DATA.read_text().splitlines():
        if not line.startswith("#"):
            yield line
