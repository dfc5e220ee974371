"""Attention of other systems as they published it, against a cluster of data sheets. Nothing here is fitted.

The cluster and its efficiencies were written down before the first result was seen, and stay.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from megatron_wallfacer.planning.cluster import Cluster, Device, Link
from megatron_wallfacer.planning.search import Choice, Job
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape

DATA = Path(__file__).with_name("data") / "attention_a800.csv"
#: A800: 312 TFLOP/s, of which FlashAttention 2 reaches 70 % forward and 60 % backward; NVLink 400 GB/s both ways and a
#: card of 200 Gbit/s for each device, of which NCCL reaches 80 and 90 %; memory 2 TB/s, of which copies reach 80 %.
A800_8 = Cluster(
    "A800_8",
    nodes=4,
    gpus_per_node=8,
    intra=Link(160, 10),
    inter=Link(22.5, 20),
    device=Device(312, 80, 1600, forward=0.7, backward=0.6, call_us=20),
    nics=8,
)
HEADS, HEAD_DIM = 40, 128
#: How the systems are written in :func:`make_plan`. Inner rings and head groups are a node, as theirs were.
SCHEMES = {
    "ring": {"scheme": "ring"},
    "double-ring": {"scheme": "double-ring", "ring_window": 8},
    "burst": {"scheme": "burst", "ring_window": 8},
    "usp-head-first": {"scheme": "usp", "head_size": 8, "placement": "head-first"},
    "usp-ring-first": {"scheme": "usp", "head_size": 8, "placement": "ring-first"},
}


@dataclass(frozen=True)
class Measured:
    """One scheme at one length.

    Attributes:
        tokens: of the sequence.
        scheme: of :data:`SCHEMES`.
        published, predicted: 1e12 operations a second of a device, forward and backward; masked pairs count nothing.
    """

    tokens: int
    scheme: str
    published: float
    predicted: float


def replay_field() -> list[Measured]:
    """Every published figure, played."""
    rows = csv.DictReader(line for line in DATA.read_text().splitlines() if not line.startswith("#"))
    return [
        Measured(tokens, row["scheme"], float(row["tflops"]), attention_tflops(tokens, row["scheme"]))
        for row in rows
        for tokens in (int(row["sequence"]),)
    ]


def attention_tflops(tokens: int, scheme: str) -> float:
    """Of a device; sums travel in bf16, and no heads are pipelined."""
    ranks = A800_8.ranks
    shape = Shape(tokens // ranks, HEADS, HEADS, HEAD_DIM, accumulate_itemsize=2)
    plan = make_plan(cp_size=ranks, q_heads=HEADS, kv_heads=HEADS, head_groups=1, **SCHEMES[scheme])
    # Seven products of two operations each for half of all pairs.
    flops = 14 * 0.5 * tokens * tokens * HEADS * HEAD_DIM
    return flops / ranks / Choice(Job(A800_8, shape, ranks, stand_ins=False), plan).played.seconds / 1e12


def pairs_in_order(found: Sequence[Measured], tie: float = 0.03) -> tuple[int, int]:
    """(pairs of schemes at the same length whose order comes out, all such pairs). Published ties count as right."""
    pairs = [(a, b) for a, b in combinations(found, 2) if a.tokens == b.tokens]
    right = sum(
        abs(a.published / b.published - 1) <= tie or (a.published > b.published) == (a.predicted > b.predicted)
        for a, b in pairs
    )
    return right, len(pairs)
