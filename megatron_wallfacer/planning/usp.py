"""USP's published training step against the simulator. Nothing here is fitted.

arXiv 2405.07719 reports 47 % MFU for Llama 3 8B with sequences of 208K tokens on two nodes of 8 A800. The cluster is
that of :mod:`megatron_wallfacer.planning.field`, which was written down before any result was seen. What the abstract
leaves open is assumed: all 16 ranks in one sequence-parallel group, heads divided in a node, a ring between the nodes,
the distributed optimizer, no tensor parallelism, masked pairs not counted as FLOPs. How much backward recomputes is not
said there either, so each choice is a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_wallfacer.planning.field import A800_8
from megatron_wallfacer.planning.layer import attention_job, step
from megatron_wallfacer.planning.model import RECOMPUTE, Recompute, model_named
from megatron_wallfacer.planning.parallel import Software, spread_over
from megatron_wallfacer.planning.search import Choice
from megatron_wallfacer.schedule.schemes import make_plan

#: Published MFU, of the peak of 312 TFLOP/s.
PUBLISHED_MFU = 0.47
TOKENS, NODES, HEAD_SIZE = 208 * 1024, 2, 8


@dataclass(frozen=True)
class UspStep:
    """A simulated training step.

    Attributes:
        recompute: what backward computes again.
        mfu: FLOPs that training needs, over the peak.
        seconds: time of the step.
        memory_gb: 1e9 bytes per rank.
        fits: whether a rank has so much memory.
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
    software = Software(recompute=recompute, accumulate_bytes=2, stand_ins=False, reduction_hidden=0.0)
    spread = spread_over(cluster)
    job = attention_job(model, cluster, TOKENS, spread, software=software)
    heads = {"q_heads": model.q_heads, "kv_heads": model.kv_heads}
    plan = make_plan("usp", spread.cp, head_size=HEAD_SIZE, placement="head-first", head_groups=1, **heads)
    found = step(model, Choice(job, plan), cluster, spread, software)
    return UspStep(recompute, found.mfu, found.seconds, found.memory_gb, found.fits)
