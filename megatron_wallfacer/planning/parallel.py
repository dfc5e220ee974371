"""How a training program divides its ranks, and what it does with their time and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.model import Recompute

#: How a parameter's states are divided. ``zero-2``: weights whole, gradients and Adam's states divided (the paper's
#: setting); ``distributed``: Megatron's distributed optimizer, which divides only Adam's states.
States = Literal["zero-2", "distributed"]
#: Where Adam's states are. ``device``: in fp32. ``precision-aware``: the fp32 weight is the bf16 weight and 16 more
#: bits (``--use-precision-aware-optimizer``). ``host``: in host memory (``--optimizer-cpu-offload``).
Adam = Literal["device", "precision-aware", "host"]


@dataclass(frozen=True)
class Software:
    """What a training program does with a cluster; every part is between 0 and 1.

    Attributes:
        attention_hidden: part of the communication that could run beside attention kernels and does. 1: all of it, as
            streams allow; 0: kernels and moves take turns.
        reduction_hidden: part of the reduction of gradients and the gather of weights that runs beside backward. With
            ``--overlap-grad-reduce`` and ``--overlap-param-gather`` all but the last bucket and the first do.
        gradient_bytes: of a gradient as it is reduced.
        accumulate_bytes: of an element of dQ, dK, dV and partial outputs as they travel.
        recompute: what backward computes again.
        states: how a parameter's states are divided.
        stand_ins: attention makes stand-ins for outputs in backward, as our engine does.
        adam: where Adam's states are.
        loss_tiles, mlp_tiles: tiles of tokens of the head and of each MLP, recomputed in backward; 1: all at once.
        outputs_on_host: part of the layers whose attention output and lse are kept in host memory.
        inputs_on_host: part of the layers whose input is kept in host memory.
    """

    attention_hidden: float = 1.0
    reduction_hidden: float = 0.9
    gradient_bytes: int = 4
    accumulate_bytes: int = 4
    recompute: Recompute = "keep-attention"
    states: States = "distributed"
    stand_ins: bool = True
    adam: Adam = "device"
    loss_tiles: int = 1
    mlp_tiles: int = 1
    outputs_on_host: float = 0.0
    inputs_on_host: float = 0.0


@dataclass(frozen=True)
class Spread:
    """How a job's ranks are divided.

    Attributes:
        tp, pp, cp, dp: sizes of the groups.
        microbatches: sequences of a step that each data-parallel replica computes.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    microbatches: int = 1

    def __str__(self) -> str:
        sizes = {"tp": self.tp, "pp": self.pp, "cp": self.cp, "dp": self.dp, "microbatches": self.microbatches}
        return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one rank"


def spread_over(cluster: Cluster, *, tp: int = 1, pp: int = 1, cp: int | None = None, microbatches: int = 1) -> Spread:
    """Divide a cluster; what tensor, pipeline and context parallelism leave over is data parallel.

    Args:
        cluster: all of whose ranks are used.
        tp, pp: sizes.
        cp: size; by default all that is left.
        microbatches: of a replica.

    Raises:
        OptionError: a size that does not divide.
    """
    for name, size in (("tp", tp), ("pp", pp), ("cp", cp), ("microbatches", microbatches)):
        if size is not None and size < 1:
            raise OptionError(name, size, "a positive number")
    if cluster.gpus_per_node % tp:
        raise OptionError("tp", tp, f"a divisor of the {cluster.gpus_per_node} devices of a node")
    if cluster.ranks % (tp * pp):
        raise OptionError("pp", pp, f"so that tp x pp divides {cluster.ranks} ranks")
    left = cluster.ranks // (tp * pp)
    cp = left if cp is None else cp
    if left % cp:
        raise OptionError("cp", cp, f"a divisor of {left}, the ranks that tp {tp} and pp {pp} leave")
    return Spread(tp, pp, cp, left // cp, microbatches)
