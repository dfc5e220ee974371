"""USP's published training step, predicted. Nothing is fitted.

arXiv 2405.07719 reports 47 % MFU for Llama 3 8B with sequences of 208K tokens on two nodes of 8 A800. The cluster is
that of :mod:`benchmarks.paper.burst_engine`. The abstract leaves these open, so they are assumed: one sequence-parallel
group of 16 ranks, heads divided within a node, a ring between the nodes, the distributed optimizer, no tensor
parallelism, masked pairs not counted as FLOPs. Recomputation is not stated either: each choice is one row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.paper.burst_engine import A800_8
from megatron_wallfacer.planning.choice import Choice
from megatron_wallfacer.planning.model import RECOMPUTE, Recompute, model_named
from megatron_wallfacer.planning.training_options import OverlapModel, TrainingOptions, parallel_sizes
from megatron_wallfacer.planning.training_step import attention_job, estimate_step
from megatron_wallfacer.schedule.schemes import make_plan

#: Published MFU, of the peak of 312 TFLOP/s.
PUBLISHED_MFU = 0.47
TOKENS, NODES, HEAD_SIZE = 208 * 1024, 2, 8


@dataclass(frozen=True)
class UspStep:
    """A simulated training step.

    Attributes:
        recompute: activations that backward recomputes.
        mfu: model FLOPs over the peak.
        seconds: time of the step.
        memory_gb: 1e9 bytes per rank.
        fits: whether a rank has that much memory.
    """

    recompute: Recompute
    mfu: float
    seconds: float
    memory_gb: float
    fits: bool


def usp_steps() -> list[UspStep]:
    """Return the step with each kind of recomputation."""
    return [_step(recompute) for recompute in RECOMPUTE]


def _step(recompute: Recompute) -> UspStep:
    cluster, model = replace(A800_8, nodes=NODES), model_named("llama3-8b")
    options = TrainingOptions(
        recompute=recompute, accumulate_bytes=2, out_proxy=False, overlap=OverlapModel(reduction=0.0)
    )
    sizes = parallel_sizes(cluster)
    job = attention_job(model, cluster, TOKENS, sizes, options)
    heads = {"q_heads": model.q_heads, "kv_heads": model.kv_heads}
    plan = make_plan("usp", sizes.cp, head_size=HEAD_SIZE, placement="head-first", head_groups=1, **heads)
    predicted = estimate_step(model, Choice(job, plan), cluster, sizes, options)
    return UspStep(recompute, predicted.mfu, predicted.seconds, predicted.memory_gb, predicted.fits)
