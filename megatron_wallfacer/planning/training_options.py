"""Options of a training program: parallel sizes, recomputation, optimizer, tiles, host memory, and its overlap."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.model import Recompute

#: How the states of a parameter are divided over ranks. ``zero-2``: gradients and Adam's states (the paper's setting).
#: ``distributed``: Adam's states only (Megatron's distributed optimizer).
States = Literal["zero-2", "distributed"]
#: Adam's states. ``device``: in fp32 on the device. ``precision-aware``: the fp32 weight is the bf16 weight and 16 more
#: bits (``--use-precision-aware-optimizer``). ``host``: in host memory (``--optimizer-cpu-offload``).
Adam = Literal["device", "precision-aware", "host"]


@dataclass(frozen=True)
class OverlapModel:
    """Overlap of communication and computation.

    Attributes:
        attention: part of attention's overlap that the program uses. 1: all that streams allow. 0: kernels and
            transfers alternate.
        reduction: part of the reduction of gradients and the gather of weights that overlaps with backward. With
            ``--overlap-grad-reduce`` and ``--overlap-param-gather`` it is all but the last bucket and the first.
    """

    attention: float = 1.0
    reduction: float = 0.9


@dataclass(frozen=True)
class TrainingOptions:
    """Options that decide the time and the memory of a training step.

    Attributes:
        recompute: activations that backward recomputes.
        gradient_bytes: bytes per element of a gradient while it is reduced.
        accumulate_bytes: bytes per element of dQ, dK, dV and partial outputs in messages.
        states: how the states of a parameter are divided.
        adam: dtype and place of Adam's states.
        loss_tiles: tiles of tokens of head and loss, recomputed in backward; 1 for all tokens at once.
        mlp_tiles: the same for each MLP.
        outputs_on_host: part of the layers whose attention output and lse are kept in host memory.
        inputs_on_host: part of the layers whose input is kept in host memory.
        out_proxy: attention computes output proxies in backward, as this project's engine does.
        overlap: overlap of communication and computation.
    """

    recompute: Recompute = "keep-attention"
    gradient_bytes: int = 4
    accumulate_bytes: int = 4
    states: States = "distributed"
    adam: Adam = "device"
    loss_tiles: int = 1
    mlp_tiles: int = 1
    outputs_on_host: float = 0.0
    inputs_on_host: float = 0.0
    out_proxy: bool = True
    overlap: OverlapModel = field(default_factory=OverlapModel)


@dataclass(frozen=True)
class ParallelSizes:
    """Sizes of a job's process groups.

    Attributes:
        tp, pp, cp, dp: tensor-, pipeline-, context- and data-parallel size.
        microbatches: sequences per data-parallel replica and step.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    microbatches: int = 1

    def __str__(self) -> str:
        sizes = {"tp": self.tp, "pp": self.pp, "cp": self.cp, "dp": self.dp, "microbatches": self.microbatches}
        return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one rank"


def parallel_sizes(
    cluster: Cluster, *, tp: int = 1, pp: int = 1, cp: int | None = None, microbatches: int = 1
) -> ParallelSizes:
    """Return the sizes of a job on all ranks of a cluster. Remaining ranks are data parallel.

    Args:
        cluster: modelled cluster.
        tp: tensor-parallel size.
        pp: pipeline stages.
        cp: context-parallel size; None for all remaining ranks.
        microbatches: sequences per data-parallel replica and step.

    Raises:
        OptionError: a size is not positive or does not divide.
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
    return ParallelSizes(tp, pp, cp, left // cp, microbatches)
