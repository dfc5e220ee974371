"""Options of a training program: parallel sizes, recomputation, optimizer, tiles, host memory, and overlap."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.model import Recompute

#: Division of the states of a parameter over ranks. ``zero-2`` divides gradients and Adam's states, as in the WallFacer
#: paper. ``distributed`` divides only Adam's states, as Megatron's distributed optimizer does.
States = Literal["zero-2", "distributed"]
#: Place and dtype of Adam's states. ``device`` is fp32 on the device. ``precision-aware`` stores the fp32 weight as the
#: bf16 weight and 16 more bits (``--use-precision-aware-optimizer``). ``host`` is host memory.
Adam = Literal["device", "precision-aware", "host"]


@dataclass(frozen=True)
class OverlapModel:
    """Fractions of communication that overlap with computation.

    Attributes:
        attention: overlap of attention's kernels and transfers, from 0 (they alternate) to 1 (as much as CUDA streams
            allow).
        reduction: fraction of the gradient reduction and the weight gather that overlaps with backward. With
            ``--overlap-grad-reduce`` and ``--overlap-param-gather`` only communication of the first and the last bucket
            is exposed.
    """

    attention: float = 1.0
    reduction: float = 0.9


@dataclass(frozen=True)
class TrainingOptions:
    """Options that determine the time and the memory of a training step.

    Attributes:
        recompute: activations that backward recomputes.
        gradient_bytes: bytes per element of a gradient while it is reduced.
        accumulate_bytes: bytes per element of dQ, dK, dV and partial outputs in messages.
        states: sharding over data- and context-parallel ranks. ``distributed`` shards Adam's states, and ``zero-2``
            also gradients.
        adam: dtype and place of Adam's states.
        loss_tiles: number of token tiles of LM head and loss. If it is above 1, backward recomputes each tile.
        mlp_tiles: number of token tiles of each MLP. If it is above 1, backward recomputes each tile.
        outputs_on_host: fraction of layers whose attention output and lse are kept in host memory.
        inputs_on_host: fraction of layers whose input is kept in host memory.
        out_proxy: whether backward replaces O by a tensor computed from dO and delta, except for local tensors.
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
        microbatches: number of micro-batches in a step, per data-parallel replica. A micro-batch has one sequence.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    microbatches: int = 1

    def __str__(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in asdict(self).items() if size > 1) or "one rank"


def parallel_sizes(
    cluster: Cluster, *, tp: int = 1, pp: int = 1, cp: int | None = None, microbatches: int = 1
) -> ParallelSizes:
    """Return the parallel sizes of a job that uses all ranks of a cluster. Remaining ranks are data parallel.

    Without ``cp`` the context-parallel size is the number of ranks / (``tp`` x ``pp``).

    Raises:
        OptionError: A size is not positive, or does not divide the ranks.
    """
    for name, size in (("tp", tp), ("pp", pp), ("cp", cp), ("microbatches", microbatches)):
        if size is not None and size < 1:
            raise OptionError(name, size, "a positive number")
    if cluster.gpus_per_node % tp:
        raise OptionError("tp", tp, f"a divisor of the {cluster.gpus_per_node} devices of a node")
    if cluster.ranks % (tp * pp):
        raise OptionError("pp", pp, f"a size for which {cluster.ranks} ranks are a multiple of tp x pp")
    left = cluster.ranks // (tp * pp)
    cp = left if cp is None else cp
    if left % cp:
        raise OptionError("cp", cp, f"a divisor of {left}, the ranks that tp {tp} and pp {pp} leave")
    return ParallelSizes(tp, pp, cp, left // cp, microbatches)
