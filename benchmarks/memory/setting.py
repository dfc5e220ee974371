"""What is counted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron_wallfacer.planning.attention_memory import busiest_rank_memory
from megatron_wallfacer.planning.inventory import Activations
from megatron_wallfacer.planning.model import Model
from megatron_wallfacer.schedule.plan import Plan


@dataclass(frozen=True)
class Setting:
    """One step of one rank.

    Attributes:
        work: model, tokens per rank, tensor-parallel size, layers, recomputation and tiles.
        plan: grid of attention.
    """

    work: Activations
    plan: Plan


def step_setting(model: Model, plan: Plan, tokens: int, **options: Any) -> Setting:
    """Return the step of the rank whose attention needs most memory.

    Args:
        model: model that is trained.
        plan: grid of attention.
        tokens: tokens per context-parallel rank.
        options: other fields of :class:`Activations`.
    """
    work = Activations(model, tokens, fused_gradients=False, **options)
    attention = busiest_rank_memory(plan, model.shape(tokens, tp=work.tp))
    return Setting(replace(work, attention=attention), plan)
