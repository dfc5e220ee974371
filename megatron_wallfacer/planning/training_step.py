"""Prediction of a training step's time and memory, with simulated attention and formulas for all other work.

Ranks are in Megatron's order: tensor parallelism varies fastest, then context, data and pipeline parallelism. Formulas
divide FLOPs by a fraction of the peak, or bytes by a memory rate, without fitted constants.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning.attention_memory import AttentionMemory
from megatron_wallfacer.planning.choice import AttentionJob, Choice
from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.inventory import peak
from megatron_wallfacer.planning.model import Model
from megatron_wallfacer.planning.rank_memory import WEIGHT, activations, host_bytes, parameters_of_rank, rank_buffers
from megatron_wallfacer.planning.step_overheads import StepOverheads, exposed_copies_s, host_adam_s, tile_overheads
from megatron_wallfacer.planning.training_options import ParallelSizes, TrainingOptions

#: Collectives per layer with tensor and sequence parallelism, each over all tokens of the layer: two all-gathers and
#: two reduce-scatters.
_TP_COLLECTIVES = 4


@dataclass(frozen=True)
class StepEstimate:
    """The prediction of a training step. Times are seconds of the slowest rank. Memory is in 1e9 bytes.

    Attributes:
        attention_s: seconds of attention of one layer with its communication, forward and backward.
        kernel_s: seconds of the attention kernels of one layer.
        matmul_s: seconds of one layer's matrix products, norms and activation functions, forward and backward.
        tensor_s: seconds of one layer's tensor-parallel collectives, none of which overlaps with computation.
        head_s: seconds of the LM head for one sequence.
        reduction_s: exposed seconds of the gradient reduction and the weight gather.
        overheads: seconds that memory-saving options cost in the whole step.
        seconds: seconds of the step.
        tokens_s: tokens per second of the whole job.
        mfu: model FLOPs per second, relative to the peak.
        memory_gb: device memory per rank in 1e9 bytes.
        host_gb: host memory per node in 1e9 bytes.
        fits: whether the device has at least ``memory_gb`` of memory.
    """

    attention_s: float
    kernel_s: float
    matmul_s: float
    tensor_s: float
    head_s: float
    reduction_s: float
    overheads: StepOverheads
    seconds: float
    tokens_s: float
    mfu: float
    memory_gb: float
    host_gb: float
    fits: bool

    @property
    def layer_s(self) -> float:
        """Return the seconds of one layer for one sequence."""
        return self.attention_s + self.matmul_s + self.tensor_s

    @property
    def exposed_s(self) -> float:
        """Return the seconds of attention in one layer apart from its kernels, such as waits, copies and merges."""
        return self.attention_s - self.kernel_s


@dataclass(frozen=True)
class AttentionEstimate:
    """The time and the memory of attention of one layer on one rank.

    Attributes:
        seconds: seconds of both passes, and of a second forward pass if backward recomputes attention.
        kernel_s: seconds of the kernels of both passes.
        forward_s: seconds of one forward pass.
        memory: memory that attention allocates and keeps.
    """

    seconds: float
    kernel_s: float
    forward_s: float
    memory: AttentionMemory


def attention_job(
    model: Model, cluster: Cluster, tokens: int, sizes: ParallelSizes, options: TrainingOptions, *, causal: bool = True
) -> AttentionJob:
    """Return the attention layer of one context-parallel group, for a sequence of ``tokens`` tokens.

    Raises:
        OptionError: 2 x cp does not divide the sequence, or tp does not divide the heads.
    """
    if tokens < 1 or tokens % (2 * sizes.cp):
        raise OptionError("seq", tokens, f"a multiple of {2 * sizes.cp}: a rank holds two equal chunks")
    shape = model.shape(tokens // sizes.cp, tp=sizes.tp, accumulate_itemsize=options.accumulate_bytes)
    return AttentionJob(cluster_of_group(cluster, sizes.tp), shape, sizes.cp, causal, options.out_proxy)


def estimate_step(
    model: Model, choice: Choice, cluster: Cluster, sizes: ParallelSizes, options: TrainingOptions
) -> StepEstimate:
    """Return the prediction of a training step with simulated attention. ``cluster`` is the whole cluster.

    Raises:
        OptionError: The number of stages does not divide the number of layers.
    """
    return estimate_step_around(model, choice.job, simulated_attention(choice, options), cluster, sizes, options)


def estimate_step_around(
    model: Model,
    job: AttentionJob,
    attention: AttentionEstimate,
    cluster: Cluster,
    sizes: ParallelSizes,
    options: TrainingOptions,
) -> StepEstimate:
    """Predict a training step with formulas, from the given time and memory of attention.

    Raises:
        OptionError: The number of stages does not divide the number of layers.
    """
    if model.layers % sizes.pp:
        raise OptionError("pp", sizes.pp, f"a divisor of {model.layers} layers")
    device, tokens = cluster.device, job.shape.tokens
    passes, layers = 3 if options.recompute == "none" else 4, model.layers // sizes.pp
    pass_s, head_s = _matrix_seconds(model, cluster, tokens / sizes.tp)
    tensor_s = _tensor_seconds(model, cluster, tokens, sizes.tp, passes)
    layer_s = attention.seconds + passes * pass_s + tensor_s
    forward_s = attention.forward_s + pass_s + tensor_s / (passes - 1)
    slots = sizes.microbatches + sizes.pp - 1
    work = activations(model, tokens, attention.memory, sizes, options)
    overheads = replace(
        tile_overheads(model, cluster, tokens, sizes, options).times(slots),
        copies_s=exposed_copies_s(work, cluster, forward_s, layer_s - forward_s) * slots,
        adam_s=host_adam_s(model, cluster, sizes, options),
    )
    reduction_s = (1 - options.overlap.reduction) * reduction_seconds(model, cluster, sizes, options)
    seconds = (layers * layer_s + head_s) * slots + overheads.seconds + reduction_s
    sequences, length = sizes.dp * sizes.microbatches, tokens * sizes.cp
    flops = sequences * model.step_flops(length, causal=job.causal)
    memory_gb = peak(rank_buffers(model, tokens, attention.memory, sizes, options))[1] / 1e9
    return StepEstimate(
        attention_s=attention.seconds,
        kernel_s=attention.kernel_s,
        matmul_s=passes * pass_s,
        tensor_s=tensor_s,
        head_s=head_s,
        reduction_s=reduction_s,
        overheads=overheads,
        seconds=seconds,
        tokens_s=sequences * length / seconds,
        mfu=flops / (seconds * cluster.ranks * device.tflops * 1e12),
        memory_gb=memory_gb,
        host_gb=cluster.gpus_per_node * host_bytes(model, tokens, attention.memory, sizes, options) / 1e9,
        fits=memory_gb <= device.memory_gb,
    )


def simulated_attention(choice: Choice, options: TrainingOptions) -> AttentionEstimate:
    """Return the time and the memory of simulated attention.

    In a simulation, kernels and transfers overlap as far as CUDA streams allow. A second simulation without kernel time
    gives the time of all other work. Without overlap, the time is the kernel time plus the time of all other work. With
    partial overlap, the time is interpolated between full overlap and no overlap.
    """
    result = choice.simulation
    seconds, forward_s = result.seconds, result.pass_s[0]
    repeated = forward_s if options.recompute == "full" else 0.0
    if options.overlap.attention < 1:
        device = replace(choice.job.cluster.device, tflops=float("inf"), kernels=None, call_us=0.0)
        bare = replace(choice, job=replace(choice.job, cluster=replace(choice.job.cluster, device=device)))
        alternating_s = bare.simulation.seconds + result.kernel_s
        # Kernels of a rank can fill pauses of its own transfers only if kernels and transfers overlap.
        exposed = (1 - options.overlap.attention) * max(0.0, alternating_s - seconds)
        repeated *= (seconds + exposed) / seconds
        seconds += exposed
    return AttentionEstimate(seconds + repeated, result.kernel_s, forward_s, choice.memory)


def _matrix_seconds(model: Model, cluster: Cluster, tokens: float) -> tuple[float, float]:
    """Return two times in seconds: of one layer's forward pass without attention, and of all passes of the LM head.

    ``tokens`` is the number of tokens per tensor-parallel rank.
    """
    device = cluster.device
    rate = device.tflops * 1e12 * device.matmul
    pass_s = tokens * model.matmul_flops() / rate
    if device.memory_gbyte_s:
        pass_s += tokens * model.touched_bytes() / (device.memory_gbyte_s * 1e9)
    return pass_s, 3 * tokens * model.head_flops() / rate


def reduction_seconds(model: Model, cluster: Cluster, sizes: ParallelSizes, options: TrainingOptions) -> float:
    """Return the seconds of reducing gradients and gathering weights over data- and context-parallel ranks.

    Gradients and weights move once each around a ring of all data- and context-parallel ranks. Between nodes the ring
    uses all NICs of a node, which the tensor-parallel ranks share.
    """
    ranks = sizes.dp * sizes.cp
    if ranks == 1:
        return 0.0
    nbytes = parameters_of_rank(model, sizes) * (options.gradient_bytes + WEIGHT) * (ranks - 1) / ranks
    inside = cluster.intra.seconds(nbytes)
    if ranks * sizes.tp <= cluster.gpus_per_node:
        return inside
    between = cluster.inter.seconds(nbytes * sizes.tp / cluster.nics)
    return max(inside, between)


def _tensor_seconds(model: Model, cluster: Cluster, tokens: int, tp: int, passes: int) -> float:
    """Return the seconds of one layer's tensor-parallel collectives. Each pass has the same number of collectives."""
    size = tokens * model.hidden * 2 * (tp - 1) / tp
    return (passes - 1) * _TP_COLLECTIVES * cluster.intra.seconds(size)


def cluster_of_group(cluster: Cluster, tp: int) -> Cluster:
    """Return the part of a cluster that one context-parallel group uses.

    Each of ``tp`` groups gets 1/tp of each node's devices, of the total rate of its NICs, and of its bus rate.
    """
    if tp == 1:
        return cluster
    nics = max(1, cluster.nics // tp)
    rate = cluster.inter.gbyte_s
    share = None if rate is None else rate * cluster.nics / tp / nics
    return replace(
        cluster,
        gpus_per_node=cluster.gpus_per_node // tp,
        nics=nics,
        inter=replace(cluster.inter, gbyte_s=share),
        node_gbyte_s=None if cluster.node_gbyte_s is None else cluster.node_gbyte_s / tp,
    )
