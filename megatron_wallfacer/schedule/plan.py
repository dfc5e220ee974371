"""A plan: a grid, plus the choices that a grid leaves open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import Grid

Rider = Literal["kv", "q"]


@dataclass(frozen=True)
class Plan:
    """Everything that decides the schedule of every rank.

    Attributes:
        grid: axes and placement.
        scheme: the name under which it was asked for; for messages only.
        kv_order: ``native`` gathers K, V along ``kv_team``. ``paper`` gathers them in the *team* and then
            permutes the blocks (Algorithm 2), which needs ``team == kv_team``.
        backward: what rides the ring in backward, K, V and their gradients or Q, dO and dQ.

    Raises:
        OptionError: a combination for which no schedule exists.
    """

    grid: Grid
    scheme: str = "grid"
    kv_order: Literal["native", "paper"] = "native"
    backward: Rider = "kv"

    def __post_init__(self) -> None:
        grid = self.grid
        if self.kv_order == "paper" and grid.team != grid.kv_team:
            raise OptionError(
                "kv_team_size", grid.kv_team, f"the team size {grid.team}: the published scheme has team = kv_team"
            )
        built: Rider = "q" if self.kv_order == "paper" else "kv"
        if self.backward != built:
            raise OptionError(
                "backward",
                self.backward,
                f"{built} or auto with scheme {self.scheme}; the other payload is not built yet",
            )
