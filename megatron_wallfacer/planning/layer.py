"""How long a training step takes, and how much memory a rank needs: attention played, the rest in closed form.

Ranks of a tensor-parallel group stand next to each other, then those of a context-parallel group, then data, then
pipeline: Megatron's order. Everything but attention is bound by a peak and an efficiency; nothing else is fitted here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning.attention_memory import AttentionMemory
from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.inventory import peak
from megatron_wallfacer.planning.model import Model
from megatron_wallfacer.planning.parallel import Software, Spread
from megatron_wallfacer.planning.rank_memory import activations, host_bytes, rank_buffers
from megatron_wallfacer.planning.search import Choice, Job
from megatron_wallfacer.planning.states import WEIGHT, parameters_of_rank
from megatron_wallfacer.planning.step_extras import StepExtras, exposed_copies_s, host_adam_s, tile_extras

#: Moves of one tensor-parallel layer with sequence parallelism, each of all its tokens: two gathers and two reductions.
_TP_MOVES = 4


@dataclass(frozen=True)
class Step:
    """One step. Times are of the slowest rank.

    Attributes:
        attention_s: attention of one layer, forward and backward, communication among it.
        kernel_s: its kernels.
        matmul_s: matrices, norms and activations of one layer, forward and backward.
        tensor_s: tensor-parallel moves of one layer, none of them hidden.
        head_s: LM head of one sequence.
        reduction_s: gradients and weights, what is not hidden of it.
        extras: what less memory costs, the whole step.
        seconds: of the step.
        tokens_s: tokens a second, whole job.
        mfu: operations that training needs, over the peak.
        memory_gb: of a rank, 1e9 bytes.
        host_gb: of the host memory of a node, 1e9 bytes.
        fits: the device has that.
    """

    attention_s: float
    kernel_s: float
    matmul_s: float
    tensor_s: float
    head_s: float
    reduction_s: float
    extras: StepExtras
    seconds: float
    tokens_s: float
    mfu: float
    memory_gb: float
    host_gb: float
    fits: bool

    @property
    def layer_s(self) -> float:
        """One layer of one sequence."""
        return self.attention_s + self.matmul_s + self.tensor_s

    @property
    def exposed_s(self) -> float:
        """Attention's time that is not kernels, one layer."""
        return self.attention_s - self.kernel_s


def attention_job(
    model: Model, cluster: Cluster, tokens: int, spread: Spread, *, causal: bool = True, software: Software
) -> Job:
    """Attention of one layer, as the ranks of one context-parallel group see it.

    Args:
        model: its heads.
        cluster: all of it.
        tokens: of a sequence.
        spread: how it is divided.
        causal: causal mask, else full attention.
        software: in which dtype sums travel.

    Raises:
        OptionError: the sequence or the heads do not divide.
    """
    if tokens < 1 or tokens % (2 * spread.cp):
        raise OptionError("seq", tokens, f"a multiple of {2 * spread.cp}: a rank holds two equal chunks")
    shape = model.shape(tokens // spread.cp, tp=spread.tp, accumulate_itemsize=software.accumulate_bytes)
    return Job(seen_by_group(cluster, spread.tp), shape, spread.cp, causal, software.stand_ins)


@dataclass(frozen=True)
class Attention:
    """Attention of one layer on one rank.

    Attributes:
        seconds: both passes; the forward pass twice where backward recomputes it.
        kernel_s: its kernels, both passes.
        forward_s: one forward pass.
        memory: what it allocates and keeps.
    """

    seconds: float
    kernel_s: float
    forward_s: float
    memory: AttentionMemory


def step(model: Model, choice: Choice, cluster: Cluster, spread: Spread, software: Software) -> Step:
    """What a step takes.

    Args:
        model: that is trained.
        choice: plan of attention, of the job that :func:`attention_job` made.
        cluster, spread, software: as there.

    Raises:
        OptionError: there are fewer layers than stages.
    """
    seconds, kernel_s = attention_seconds(choice, software)
    attention = Attention(seconds, kernel_s, choice.played.pass_s[0], choice.attention)
    return step_around(model, choice.job, attention, cluster, spread, software)


def step_around(
    model: Model, job: Job, attention: Attention, cluster: Cluster, spread: Spread, software: Software
) -> Step:
    """The same around attention whose time and memory are known. In closed form.

    Args:
        model: that is trained.
        job: of attention, which has the tokens per rank.
        attention: its time and memory.
        cluster, spread, software: as for :func:`attention_job`.

    Raises:
        OptionError: there are fewer layers than stages.
    """
    if model.layers % spread.pp:
        raise OptionError("pp", spread.pp, f"a divisor of {model.layers} layers")
    device, tokens, tp = cluster.device, job.shape.tokens, spread.tp
    passes = 3 if software.recompute == "none" else 4
    rate, layers = device.tflops * 1e12 * device.matmul, model.layers // spread.pp
    pass_s = tokens * model.matmul_flops() / tp / rate
    if device.memory_gbyte_s:
        pass_s += tokens * model.touched_bytes() / tp / (device.memory_gbyte_s * 1e9)
    head_s = 3 * tokens * model.head_flops() / tp / rate
    tensor_s = _tensor_seconds(model, cluster, tokens, tp, passes)
    layer_s = attention.seconds + passes * pass_s + tensor_s
    forward_s = attention.forward_s + pass_s + tensor_s / (passes - 1)
    extras = tile_extras(model, cluster, tokens, spread, software)
    work = activations(model, tokens, attention.memory, spread, software)
    slots = spread.microbatches + spread.pp - 1
    copies_s = exposed_copies_s(work, cluster, forward_s, layer_s - forward_s)
    extras = replace(
        extras.times(slots), copies_s=copies_s * slots, adam_s=host_adam_s(model, cluster, spread, software)
    )
    reduction_s = (1 - software.reduction_hidden) * reduction_seconds(model, cluster, spread, software)
    seconds = (layers * layer_s + head_s) * slots + extras.seconds + reduction_s
    sequences, whole = spread.dp * spread.microbatches, tokens * spread.cp
    memory = peak(rank_buffers(model, tokens, attention.memory, spread, software))[1] / 1e9
    return Step(
        attention_s=attention.seconds,
        kernel_s=attention.kernel_s,
        matmul_s=passes * pass_s,
        tensor_s=tensor_s,
        head_s=head_s,
        reduction_s=reduction_s,
        extras=extras,
        seconds=seconds,
        tokens_s=sequences * whole / seconds,
        mfu=sequences * model.step_flops(whole, causal=job.causal) / (seconds * cluster.ranks * device.tflops * 1e12),
        memory_gb=memory,
        host_gb=cluster.gpus_per_node * host_bytes(model, tokens, attention.memory, spread, software) / 1e9,
        fits=memory <= device.memory_gb,
    )


def attention_seconds(choice: Choice, software: Software) -> tuple[float, float]:
    """(attention of one layer, its kernels), forward and backward, in seconds.

    Hidden is what playing the schedule hides; what a program leaves of that is told by playing it with kernels that
    take no time, and adding them after.
    """
    played, repeated = choice.played, 0.0
    seconds, kernel_s = played.seconds, played.kernel_s
    if software.recompute == "full":
        repeated = played.pass_s[0]
    if software.attention_hidden < 1:
        device = replace(choice.job.cluster.device, tflops=float("inf"), kernels=None, call_us=0.0)
        bare = replace(choice, job=replace(choice.job, cluster=replace(choice.job.cluster, device=device)))
        taking_turns = bare.played.seconds + kernel_s
        # Kernels of a rank may fill a pause of its own moves only if something is hidden.
        exposed = (1 - software.attention_hidden) * max(0.0, taking_turns - seconds)
        repeated *= (seconds + exposed) / seconds
        seconds += exposed
    return seconds + repeated, kernel_s


def reduction_seconds(model: Model, cluster: Cluster, spread: Spread, software: Software) -> float:
    """Reduce-scatter of the gradients and all-gather of the weights over data and context parallel ranks, unhidden.

    Each goes round a ring through every rank once; between nodes on all cards of a node, which its tensor-parallel
    ranks share.
    """
    ranks = spread.dp * spread.cp
    if ranks == 1:
        return 0.0
    mine = parameters_of_rank(model, spread) * (software.gradient_bytes + WEIGHT) * (ranks - 1) / ranks
    inside = cluster.intra.seconds(mine)
    if ranks * spread.tp <= cluster.gpus_per_node:
        return inside
    between = cluster.inter.seconds(mine * spread.tp / cluster.nics)
    return max(inside, between)


def _tensor_seconds(model: Model, cluster: Cluster, tokens: int, tp: int, passes: int) -> float:
    """Of one layer: as many moves in backward as in forward, and again where forward is repeated."""
    size = tokens * model.hidden * 2 * (tp - 1) / tp
    return (passes - 1) * _TP_MOVES * cluster.intra.seconds(size)


def seen_by_group(cluster: Cluster, tp: int) -> Cluster:
    """The cluster that is left to one of ``tp`` context-parallel groups which run side by side."""
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
