"""An attention layer on a cluster, and a plan for the layer with its time bound, simulation and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_wallfacer.planning.attention_memory import AttentionMemory, attention_memory
from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.costs import CostModel
from megatron_wallfacer.planning.routing import Routing
from megatron_wallfacer.planning.simulator import SimulationResult, Span, simulate
from megatron_wallfacer.planning.symmetry import Symmetry
from megatron_wallfacer.planning.time_bound import TimeBound, time_bound
from megatron_wallfacer.schedule.heads import head_groups
from megatron_wallfacer.schedule.memory import graphed_peak_bytes, peak_bytes
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.schemes import total_volume
from megatron_wallfacer.schedule.volume import Shape

#: Largest number of ranks for plans whose ranks differ in their schedules, because each rank is then simulated.
MOST_RANKS_UNALIKE = 64
#: Largest axis size that is simulated. Simulations of larger axes take long, and their grids are never the fastest.
LONGEST_AXIS = 256


@dataclass(frozen=True)
class AttentionJob:
    """One attention layer on a cluster.

    Attributes:
        cluster: modelled cluster. Ranks 0 to ``cp_size - 1`` are a context-parallel group.
        shape: sizes of a rank's shard, with heads after tensor parallelism.
        cp_size: context-parallel size P.
        causal: whether the mask is causal; otherwise attention is full.
        out_proxy: whether backward computes a replacement for attention's output O from dO and delta. This project's
            engine does so for rows that are not local. A program that sends O does not need the replacement.
        cuda_graphs: whether memory is predicted for passes in CUDA graphs. Times are always predicted for eager passes.
    """

    cluster: Cluster
    shape: Shape
    cp_size: int
    causal: bool = True
    out_proxy: bool = True
    cuda_graphs: bool = False

    @property
    def costs(self) -> CostModel:
        """Return the costs of the layer's operations."""
        return CostModel(self.cluster, self.shape, out_proxy=self.out_proxy)


@dataclass(frozen=True)
class Choice:
    """A plan for an attention layer, with its prediction. ``name`` is the name of the plan's scheme, or None.

    With ``keep_gathered_q`` gathered queries are kept from forward to backward.
    """

    job: AttentionJob
    plan: Plan
    keep_gathered_q: bool = False
    name: str | None = None

    @cached_property
    def bound(self) -> TimeBound:
        """Return the lower bound of the time, with complete overlap of computation and communication."""
        job = self.job
        return time_bound(self.plan, job.cluster, job.shape, causal=job.causal, keep_gathered_q=self.keep_gathered_q)

    @property
    def volume(self) -> float:
        """Return the communication volume of both passes: elements received per rank, in units of one query shard."""
        return total_volume(self.plan, self.job.shape.kappa, kv_heads=self.job.shape.kv_heads)

    @property
    def simulation(self) -> SimulationResult:
        """Return the predicted times of both passes."""
        return self._predicted[0]

    @property
    def buffer_bytes(self) -> float:
        """Return the peak bytes of attention's buffers and results: of one pass, or of both passes with CUDA graphs."""
        return self._predicted[1]

    @property
    def memory(self) -> AttentionMemory:
        """Return the memory that attention allocates and keeps."""
        return self._predicted[2]

    @cached_property
    def _predicted(self) -> tuple[SimulationResult, float, AttentionMemory]:
        # Schedules of many ranks are large, so the schedules of rank 0 are built only once for all three results.
        first, shape, graphs = self.schedules(0), self.job.shape, self.job.cuda_graphs
        result = self.simulate(lambda rank: first if rank == 0 else self.schedules(rank))
        nbytes = graphed_peak_bytes(first, shape) if graphs else max(peak_bytes(each, shape) for each in first)
        return result, nbytes, attention_memory(self.plan, first, shape, cuda_graphs=graphs)

    def spans(self) -> tuple[Span, ...]:
        """Return the simulated timelines."""
        return self.simulate(self.schedules, spans=True).spans

    def simulate(
        self, schedules: Callable[[int], Sequence[Schedule]], *, every_rank: bool = False, **options: Any
    ) -> SimulationResult:
        """Simulate one rank of each symmetry class.

        Every rank is simulated if ``every_rank`` is True, or if the plan's ``kv_order`` is not ``native``.
        """
        every_rank = every_rank or self.plan.kv_order != "native"
        symmetry = Symmetry(self.plan.grid, Routing(self.job.cluster).unit_sizes, every_rank=every_rank)
        return simulate(self.job.costs, schedules, symmetry, **options)

    def schedules(self, rank: int) -> tuple[Schedule, Schedule]:
        """Return the forward and the backward schedule of a rank."""
        shape = self.job.shape
        options = {
            "causal": self.job.causal,
            "groups": head_groups(self.plan, shape.q_heads, shape.kv_heads),
            "keep_gathered_q": self.keep_gathered_q,
        }
        return forward_schedule(self.plan, rank, **options), backward_schedule(self.plan, rank, **options)

    @property
    def can_be_simulated(self) -> bool:
        """Return whether a simulation takes seconds instead of minutes."""
        grid = self.plan.grid
        few = self.plan.kv_order == "native" or grid.cp_size <= MOST_RANKS_UNALIKE
        return few and max(grid.ring, grid.team, grid.kv_team, grid.head) <= LONGEST_AXIS
