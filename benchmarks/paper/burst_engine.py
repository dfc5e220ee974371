"""Attention throughputs that BurstEngine published, predicted on a cluster of data sheets. Nothing is fitted.

The cluster and its efficiencies were fixed before the first result was computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from benchmarks.paper.published import read_table
from megatron_wallfacer.planning.choice import AttentionJob, Choice
from megatron_wallfacer.planning.cluster import Cluster, Device, LinkSpeed
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape

DATA = Path(__file__).with_name("data") / "attention_a800.csv"
#: A800: 312 TFLOP/s, of which FlashAttention 2 reaches 70 % forward and 60 % backward. NVLink has 400 GB/s in both
#: directions together, each device a NIC of 200 Gbit/s; NCCL reaches 80 and 90 %. Memory has 2 TB/s; copies reach 80 %.
A800_8 = Cluster(
    "A800_8",
    nodes=4,
    gpus_per_node=8,
    intra=LinkSpeed(160, 10),
    inter=LinkSpeed(22.5, 20),
    device=Device(312, 80, 1600, forward=0.7, backward=0.6, call_us=20),
    nics=8,
)
HEADS, HEAD_DIM = 40, 128
#: Arguments of :func:`make_plan` by published scheme. Inner rings and head groups have the size of a node.
SCHEMES = {
    "ring": {"scheme": "ring"},
    "double-ring": {"scheme": "double-ring", "ring_inner_size": 8},
    "burst": {"scheme": "burst", "ring_inner_size": 8},
    "usp-head-first": {"scheme": "usp", "head_size": 8, "placement": "head-first"},
    "usp-ring-first": {"scheme": "usp", "head_size": 8, "placement": "ring-first"},
}


@dataclass(frozen=True)
class AttentionRate:
    """Rate of one scheme at one length.

    Attributes:
        tokens: sequence length.
        scheme: key of :data:`SCHEMES`.
        published, predicted: TFLOP/s per device, forward and backward; masked pairs are not counted.
    """

    tokens: int
    scheme: str
    published: float
    predicted: float


def attention_rates() -> list[AttentionRate]:
    """Return every published rate with its prediction."""
    return [
        AttentionRate(tokens, row["scheme"], float(row["tflops"]), predicted_tflops(tokens, row["scheme"]))
        for row in read_table(DATA)
        for tokens in (int(row["sequence"]),)
    ]


def predicted_tflops(tokens: int, scheme: str) -> float:
    """Return TFLOP/s per device. Accumulators travel in bf16, and heads are not pipelined."""
    ranks = A800_8.ranks
    shape = Shape(tokens // ranks, HEADS, HEADS, HEAD_DIM, accumulate_itemsize=2)
    plan = make_plan(cp_size=ranks, q_heads=HEADS, kv_heads=HEADS, head_groups=1, **SCHEMES[scheme])
    # Seven matrix products of two operations each, for half of all pairs.
    flops = 14 * 0.5 * tokens * tokens * HEADS * HEAD_DIM
    return flops / ranks / Choice(AttentionJob(A800_8, shape, ranks, out_proxy=False), plan).simulation.seconds / 1e12


def pairs_in_order(rates: Sequence[AttentionRate], tie: float = 0.03) -> tuple[int, int]:
    """Return (pairs of schemes at one length in the published order, all pairs). Published ties are in order."""
    pairs = [(a, b) for a, b in combinations(rates, 2) if a.tokens == b.tokens]
    right = sum(
        abs(a.published / b.published - 1) <= tie or (a.published > b.published) == (a.predicted > b.predicted)
        for a, b in pairs
    )
    return right, len(pairs)
