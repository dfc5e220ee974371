"""The time of a training step and the memory of a rank: attention simulated, all other work in closed form.

Ranks are in Megatron's order: a tensor-parallel group is consecutive, then follow context, data and pipeline
parallelism. All work except attention takes its FLOPs over a fraction of the peak, or its bytes over a memory rate;
nothing is fitted here.
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

#: Collectives of a layer with tensor and sequence parallelism, each of all its tokens: two all-gathers and two
#: reduce-scatters.
_TP_COLLECTIVES = 4


@dataclass(frozen=True)
class StepEstimate:
    """The prediction of a training step. Times in seconds of the slowest rank, memory in 1e9 bytes.

    Attributes:
        attention_s: attention of one layer with its communication, forward and backward.
        kernel_s: attention kernels of one layer.
        matmul_s: matrices, norms and activation functions of one layer, forward and backward.
        tensor_s: tensor-parallel collectives of one layer, all of them exposed.
        head_s: LM head of one sequence.
        reduction_s: exposed part of the reduction of gradients and the gather of weights.
        overheads: time that memory-saving options cost in the whole step.
        seconds: time of the step.
        tokens_s: tokens per second of the whole job.
        mfu: model FLOPs over the peak.
        memory_gb: device memory per rank.
        host_gb: host memory per node.
        fits: whether the device has that memory.
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
        """Time of one layer of one sequence."""
        return self.attention_s + self.matmul_s + self.tensor_s

    @property
    def exposed_s(self) -> float:
        """Attention's time without its kernels, of one layer."""
        return self.attention_s - self.kernel_s


@dataclass(frozen=True)
class AttentionEstimate:
    """Attention of one layer on one rank.

    Attributes:
        seconds: both passes, and a second forward pass where backward recomputes it.
        kernel_s: kernels of both passes.
        forward_s: one forward pass.
        memory: memory that attention allocates and keeps.
    """

    seconds: float
    kernel_s: float
    forward_s: float
    memory: AttentionMemory


def attention_job(
    model: Model, cluster: Cluster, tokens: int, sizes: ParallelSizes, options: TrainingOptions, *, causal: bool = True
) -> AttentionJob:
    """Return attention of one layer on the ranks of one context-parallel group.

    Args:
        model: trained model.
        cluster: whole cluster.
        tokens: sequence length.
        sizes: sizes of the process groups.
        options: itemsize of accumulators in messages, and output proxies.
        causal: causal mask, else full attention.

    Raises:
        OptionError: the sequence or the heads do not divide.
    """
    if tokens < 1 or tokens % (2 * sizes.cp):
        raise OptionError("seq", tokens, f"a multiple of {2 * sizes.cp}: a rank holds two equal chunks")
    shape = model.shape(tokens // sizes.cp, tp=sizes.tp, accumulate_itemsize=options.accumulate_bytes)
    return AttentionJob(cluster_of_group(cluster, sizes.tp), shape, sizes.cp, causal, options.out_proxy)


def estimate_step(
    model: Model, choice: Choice, cluster: Cluster, sizes: ParallelSizes, options: TrainingOptions
) -> StepEstimate:
    """Return the prediction of a training step with simulated attention.

    Args:
        model: trained model.
        choice: plan of attention for a job of :func:`attention_job`.
        cluster: whole cluster.
        sizes: sizes of the process groups.
        options: options of the training program.

    Raises:
        OptionError: the stages do not divide the layers.
    """
    seconds, kernel_s = attention_seconds(choice, options)
    attention = AttentionEstimate(seconds, kernel_s, choice.simulation.pass_s[0], choice.memory)
    return estimate_step_around(model, choice.job, attention, cluster, sizes, options)


def estimate_step_around(
    model: Model,
    job: AttentionJob,
    attention: AttentionEstimate,
    cluster: Cluster,
    sizes: ParallelSizes,
    options: TrainingOptions,
) -> StepEstimate:
    """Return the prediction of a training step around given attention, in closed form.

    Args:
        model: trained model.
        job: attention layer, with the tokens per rank.
        attention: time and memory of attention.
        cluster: whole cluster.
        sizes: sizes of the process groups.
        options: options of the training program.

    Raises:
        OptionError: the stages do not divide the layers.
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


def attention_seconds(choice: Choice, options: TrainingOptions) -> tuple[float, float]:
    """Return (attention of one layer, its kernels), forward and backward, in seconds.

    The simulation uses all overlap that streams allow. For a program with less, a second simulation without kernel
    time gives the time in which kernels and transfers alternate.
    """
    result, repeated = choice.simulation, 0.0
    seconds, kernel_s = result.seconds, result.kernel_s
    if options.recompute == "full":
        repeated = result.pass_s[0]
    if options.overlap.attention < 1:
        device = replace(choice.job.cluster.device, tflops=float("inf"), kernels=None, call_us=0.0)
        bare = replace(choice, job=replace(choice.job, cluster=replace(choice.job.cluster, device=device)))
        alternating_s = bare.simulation.seconds + kernel_s
        # Kernels of a rank may fill a pause of its own transfers only if some of them overlap.
        exposed = (1 - options.overlap.attention) * max(0.0, alternating_s - seconds)
        repeated *= (seconds + exposed) / seconds
        seconds += exposed
    return seconds + repeated, kernel_s


def _matrix_seconds(model: Model, cluster: Cluster, tokens: float) -> tuple[float, float]:
    """Return (forward of one layer without attention, LM head of all passes) in seconds, given tokens / tp."""
    device = cluster.device
    rate = device.tflops * 1e12 * device.matmul
    pass_s = tokens * model.matmul_flops() / rate
    if device.memory_gbyte_s:
        pass_s += tokens * model.touched_bytes() / (device.memory_gbyte_s * 1e9)
    return pass_s, 3 * tokens * model.head_flops() / rate


def reduction_seconds(model: Model, cluster: Cluster, sizes: ParallelSizes, options: TrainingOptions) -> float:
    """Return the seconds of reducing gradients and gathering weights over data- and context-parallel ranks.

    Each goes around a ring of all these ranks once. Between nodes it uses all NICs of a node, which the
    tensor-parallel ranks share.
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
    """Return the seconds of one layer's tensor-parallel collectives: as many in backward as in each forward."""
    size = tokens * model.hidden * 2 * (tp - 1) / tp
    return (passes - 1) * _TP_COLLECTIVES * cluster.intra.seconds(size)


def cluster_of_group(cluster: Cluster, tp: int) -> Cluster:
    """Return the cluster as one of ``tp`` concurrent context-parallel groups uses it: its share of NICs and buses."""
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
