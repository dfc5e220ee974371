"""How long a training step takes, and how much memory a rank needs: attention played, the rest in closed form.

Ranks of a tensor-parallel group stand next to each other, then those of a context-parallel group, then data, then
pipeline: Megatron's order. Everything but attention is bound by a peak and an efficiency; nothing else is fitted here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.model import Model, Recompute
from megatron_wallfacer.planning.search import Choice, Job

#: Bytes of a parameter's states. ``zero-2``: weights whole, gradients and Adam's states divided (the paper's setting);
#: ``distributed``: Megatron's distributed optimizer, which divides only Adam's states.
States = Literal["zero-2", "distributed"]
_WEIGHT, _ADAM = 2, 12
#: Moves of one tensor-parallel layer with sequence parallelism, each of all its tokens: two gathers and two reductions.
_TP_MOVES = 4


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
    """

    attention_hidden: float = 1.0
    reduction_hidden: float = 0.9
    gradient_bytes: int = 4
    accumulate_bytes: int = 4
    recompute: Recompute = "keep-attention"
    states: States = "distributed"
    stand_ins: bool = True


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
        seconds: of the step.
        tokens_s: tokens a second, whole job.
        mfu: operations that training needs, over the peak.
        memory_gb: of a rank, 1e9 bytes.
        fits: it has that.
    """

    attention_s: float
    kernel_s: float
    matmul_s: float
    tensor_s: float
    head_s: float
    reduction_s: float
    seconds: float
    tokens_s: float
    mfu: float
    memory_gb: float
    fits: bool

    @property
    def layer_s(self) -> float:
        """One layer of one sequence."""
        return self.attention_s + self.matmul_s + self.tensor_s

    @property
    def exposed_s(self) -> float:
        """Attention's time that is not kernels, one layer."""
        return self.attention_s - self.kernel_s


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


def step(model: Model, choice: Choice, cluster: Cluster, spread: Spread, software: Software) -> Step:
    """What a step takes.

    Args:
        model: that is trained.
        choice: plan of attention, of the job that :func:`attention_job` made.
        cluster, spread, software: as there.

    Raises:
        OptionError: there are fewer layers than stages.
    """
    if model.layers % spread.pp:
        raise OptionError("pp", spread.pp, f"a divisor of {model.layers} layers")
    device, shape, tp = cluster.device, choice.job.shape, spread.tp
    passes = 3 if software.recompute == "none" else 4
    matmul_s = passes * shape.tokens * model.matmul_flops() / tp / (device.tflops * 1e12 * device.matmul)
    if device.memory_gbyte_s:
        matmul_s += passes * shape.tokens * model.touched_bytes() / tp / (device.memory_gbyte_s * 1e9)
    head_s = 3 * shape.tokens * model.head_flops() / tp / (device.tflops * 1e12 * device.matmul)
    attention_s, kernel_s = attention_seconds(choice, software)
    tensor_s = _tensor_seconds(model, cluster, shape.tokens, tp, passes)
    layers = model.layers // spread.pp
    stage_s = layers * (attention_s + matmul_s + tensor_s) + head_s
    reduction_s = (1 - software.reduction_hidden) * reduction_seconds(model, cluster, spread, software)
    seconds = stage_s * (spread.microbatches + spread.pp - 1) + reduction_s
    sequences = spread.dp * spread.microbatches
    tokens = shape.tokens * spread.cp
    needed = sequences * model.step_flops(tokens, causal=choice.job.causal)
    memory = memory_bytes(model, choice, spread, software) / 1e9
    return Step(
        attention_s=attention_s,
        kernel_s=kernel_s,
        matmul_s=matmul_s,
        tensor_s=tensor_s,
        head_s=head_s,
        reduction_s=reduction_s,
        seconds=seconds,
        tokens_s=sequences * tokens / seconds,
        mfu=needed / (seconds * cluster.ranks * device.tflops * 1e12),
        memory_gb=memory,
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
    mine = _parameters_of_rank(model, spread) * (software.gradient_bytes + _WEIGHT) * (ranks - 1) / ranks
    inside = cluster.intra.seconds(mine)
    if ranks * spread.tp <= cluster.gpus_per_node:
        return inside
    between = cluster.inter.seconds(mine * spread.tp / cluster.nics)
    return max(inside, between)


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at the worst moment of backward, attention's buffers left out. Fragmentation is not counted.

    Attributes:
        always: states, and what layers keep for as many microbatches as a stage has at once.
        layer: one layer at work.
        logits: of the last stage, where no layer is at work.
    """

    always: float
    layer: float
    logits: float


def memory_around(model: Model, job: Job, spread: Spread, software: Software) -> Memory:
    """What the rest of a rank needs, whichever way attention is cut."""
    parameters, ranks = _parameters_of_rank(model, spread), spread.dp * spread.cp
    if software.states == "zero-2":
        states = parameters * (_WEIGHT + (_WEIGHT + _ADAM) / ranks)
    else:
        states = parameters * (_WEIGHT + software.gradient_bytes + _ADAM / ranks)
    tokens = job.shape.tokens / spread.tp
    kept = _kept_layers(model, spread) * tokens * model.kept_bytes(software.recompute)
    # In bf16 and, for the loss, in fp32.
    logits = tokens * model.vocabulary * (2 + 4)
    return Memory(states + kept, tokens * model.kept_bytes("none"), logits)


def memory_bytes(model: Model, choice: Choice, spread: Spread, software: Software) -> float:
    """Of a rank at the worst moment of backward, with attention's buffers and the queries that are kept for it."""
    around = memory_around(model, choice.job, spread, software)
    queries = (choice.plan.grid.team - 1) * choice.job.shape.bytes("q") if choice.q_kept else 0.0
    kept = _kept_layers(model, spread) * queries
    return around.always + kept + max(around.layer + choice.buffer_bytes, around.logits)


def _kept_layers(model: Model, spread: Spread) -> float:
    """Of a stage, for each microbatch that it has at once: as many as there are stages."""
    return model.layers / spread.pp * min(spread.pp, spread.microbatches)


def _parameters_of_rank(model: Model, spread: Spread) -> float:
    """Of the fullest stage; embedding and LM head are on different ones, if there are several."""
    layers = model.layers * model.layer_parameters / spread.pp
    return (layers + model.vocabulary_parameters / (1 if spread.pp == 1 or model.tied else 2)) / spread.tp


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
