"""What is counted."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_wallfacer.planning.inventory import Activations
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
