"""The WallFacer paper's published throughputs, and one calibration for each of its clusters.

``docs/paper.md`` lists what is calibrated, to which figures, and what does not fit.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from megatron_wallfacer.planning.cluster import Cluster, Device, LinkSpeed
from megatron_wallfacer.planning.model import MODELS, Model
from megatron_wallfacer.planning.training_options import OverlapModel, TrainingOptions

DATA = Path(__file__).with_name("data") / "wallfacer_throughput.csv"

#: The program that the paper measured, for all of its results. The baseline's time is linear plus quadratic in the
#: sequence length, and WallFacer has the same quadratic part. So about a third of the communication is hidden.
#: Accumulators travel in bf16. Gradients are reduced in fp32 and weights gathered in bf16, both exposed because
#: attention fills the links (section 4.6, ZeRO-2).
PROGRAM = TrainingOptions(
    recompute="keep-attention",
    gradient_bytes=4,
    accumulate_bytes=2,
    states="zero-2",
    out_proxy=False,
    overlap=OverlapModel(attention=0.35, reduction=0.0),
)
#: The paper does not state the mask. With all pairs unmasked, attention kernels reach 18 % of an H100's peak; with a
#: causal mask they would reach 9 %.
CAUSAL = False

# Fractions of the peak that large calls reach. Kernels written for an A100 are not much faster on an H100.
_A100 = Device(312, 40, 1300, forward=0.4, backward=0.4, call_us=20, matmul=0.5)
_H100 = Device(989, 80, 2000, forward=0.18, backward=0.18, call_us=20, matmul=0.4)
# NCCL over sockets reaches a fifth of 100 Gbit/s Ethernet. InfiniBand reaches nine tenths of a 400 Gbit/s NIC.
_ETHERNET, _INFINIBAND = LinkSpeed(2.5, 100), LinkSpeed(45, 20)

A100_16 = Cluster("A100_16", 2, 16, LinkSpeed(240, 10), _ETHERNET, _A100, nics=1)
A100_8 = replace(A100_16, name="A100_8", nodes=4, gpus_per_node=8)
H100_8 = Cluster("H100_8", 4, 8, LinkSpeed(300, 10), _INFINIBAND, _H100, nics=8)
CLUSTERS = {cluster.name: cluster for cluster in (A100_16, A100_8, H100_8)}
_MODELS = {"3B": MODELS["gpt-3b"], "7B": MODELS["gpt-7b"]}


@dataclass(frozen=True)
class PublishedThroughput:
    """One bar of figure 7, or one point of figure 9.

    Attributes:
        figure: 7 or 9.
        cluster: calibrated cluster with the number of nodes that was measured.
        model: trained model.
        tokens: sequence length.
        scheme: ``ring``, ``wallfacer-2``, ``wallfacer-4`` or ``wallfacer-best``.
        k_tokens_s: throughput of all devices, 1000 tokens per second.
    """

    figure: int
    cluster: Cluster
    model: Model
    tokens: int
    scheme: str
    k_tokens_s: float


def published(figure: int) -> list[PublishedThroughput]:
    """Return the throughputs of figure 7 or 9, in the order of the paper."""
    return [
        PublishedThroughput(
            figure,
            replace(CLUSTERS[row["cluster"]], nodes=int(row["nodes"])),
            _MODELS[row["model"]],
            int(row["sequence"]),
            row["scheme"],
            float(row["value"]),
        )
        for row in read_table(DATA)
        if row["figure"] == str(figure) and row["quantity"] == "k_tokens_per_s"
    ]


@cache
def read_table(path: Path) -> tuple[dict[str, str], ...]:
    """Return the rows of a CSV file whose comment lines begin with ``#``."""
    return tuple(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))
