"""A search over all sizes and options that determine the time and the memory of a training run.

First, formulas estimate time and memory for every tensor-parallel size and every combination of memory-saving flags
(:mod:`megatron_wallfacer.planning.flag_combinations`). The formulas leave out attention's communication time and its
buffers. For the tensor-parallel sizes with the best estimates, the search then simulates attention on many grids. Each
combination of flags gets the fastest grid that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning.attention_memory import AttentionMemory
from megatron_wallfacer.planning.choice import AttentionJob, Choice
from megatron_wallfacer.planning.configuration import Configuration, Request, fits_memory, not_dominated, ranked
from megatron_wallfacer.planning.flag_combinations import FlagCombination, flag_combinations, training_options
from megatron_wallfacer.planning.inventory import peak
from megatron_wallfacer.planning.search import MANY_RANKS, TIE, SearchResult, preferred, search
from megatron_wallfacer.planning.time_bound import kernel_seconds, pass_weights
from megatron_wallfacer.planning.training_options import ParallelSizes, TrainingOptions, parallel_sizes
from megatron_wallfacer.planning.training_step import (
    AttentionEstimate,
    StepEstimate,
    attention_job,
    estimate_step_around,
    simulated_attention,
)
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.heads import head_groups
from megatron_wallfacer.schedule.plan import Plan, shard_work

#: Number of tensor-parallel sizes whose grids are simulated, by the largest context-parallel size.
SIZES = {64: 4, MANY_RANKS: 2}
#: Numbers of head groups that are tried, number of grids for which they are tried, and largest number of ranks. More
#: head groups need less memory.
GROUPS, REGROUPED, MOST_RANKS_REGROUPED = (1, 2, 4, 8), 4, 64


@dataclass(frozen=True)
class PlanResult:
    """The result of a search over configurations.

    Attributes:
        best: configurations that fit, without those that :func:`not_dominated` removes. The preferred configuration
            (:func:`ranked`) is first. All other configurations are in the order of :func:`plain_first`.
        leanest: simulated configuration with the least device memory.
        grids: simulated grids of attention for the first configuration, fastest first.
        considered: number of combinations of sizes and flags whose time and memory the formulas estimated.
    """

    best: tuple[Configuration, ...]
    leanest: Configuration
    grids: SearchResult
    considered: int


def search_configurations(request: Request) -> PlanResult:
    """Search all sizes and options that the request does not fix.

    Raises:
        OptionError: A given size does not divide ranks, heads or tokens.
    """
    sizes = [(candidate, closed_forms(candidate)) for candidate in size_candidates(request)]
    fitting_sizes = [pair for pair in sizes if pair[1].fastest_s is not None]
    likely = fitting_sizes or [min(sizes, key=lambda pair: pair[1].least_gb)]
    likely.sort(key=lambda pair: pair[1].fastest_s or 0.0)
    most = next((count for ranks, count in SIZES.items() if sizes[0][0].job.cp_size <= ranks), 1)
    simulated: list[Configuration] = []
    grids: dict[ParallelSizes, SearchResult] = {}
    for candidate, forms in likely[:most]:
        grids[candidate.sizes], pool = grid_pool(candidate, forms.leanest)
        simulated += _best_without_regard_to_tiles(candidate, pool, forms.combinations)
    fitting = ranked(not_dominated([configuration for configuration in simulated if configuration.fits]))
    leanest = min(simulated, key=lambda configuration: configuration.step.memory_gb)
    first = (fitting or [leanest])[0]
    return PlanResult(tuple(fitting), leanest, grids[first.sizes], sum(len(forms.combinations) for _, forms in sizes))


@dataclass(frozen=True)
class SizeCandidate:
    """A tensor-parallel size, the other parallel sizes, and the attention layer of one context-parallel group."""

    request: Request
    sizes: ParallelSizes
    job: AttentionJob

    def with_tokens(self, tokens: int) -> SizeCandidate:
        """Return a copy of the candidate with another sequence length."""
        return _candidate(replace(self.request, tokens=tokens), self.sizes)

    def options(self, flags: FlagCombination, attention: AttentionEstimate) -> TrainingOptions:
        """Return the options of a training step with ``flags``.

        The number of tiles, and the fraction of layers in host memory, depend on ``attention``.
        """
        request = self.request
        workload = request.model, request.cluster, self.job.shape.tokens, attention.memory, self.sizes
        return training_options(flags, *workload, attention.forward_s)

    def step(self, flags: FlagCombination, attention: AttentionEstimate) -> StepEstimate:
        """Return the estimate of a training step with the given time and memory of attention."""
        request, options = self.request, self.options(flags, attention)
        return estimate_step_around(request.model, self.job, attention, request.cluster, self.sizes, options)

    def configuration(self, flags: FlagCombination, choice: Choice) -> Configuration:
        """Return the configuration with the given flags and the given grid."""
        return Configuration(self.request, self.sizes, self.options(flags, attention_of(choice, flags)), choice)


@dataclass(frozen=True)
class ClosedForms:
    """Estimates for one tensor-parallel size with all combinations of flags, computed without a simulation.

    Attributes:
        combinations: all combinations of flags.
        leanest: combination of flags that needs the least device memory.
        least_gb: device memory of that combination, in 1e9 bytes per rank.
        fastest_s: seconds of a step with the fastest combination that fits; None if none fits.
    """

    combinations: tuple[FlagCombination, ...]
    leanest: FlagCombination
    least_gb: float
    fastest_s: float | None


def size_candidates(request: Request, tokens_of: Callable[[ParallelSizes], int] | None = None) -> list[SizeCandidate]:
    """Return every tensor-parallel size that divides ranks, heads and tokens.

    ``tokens_of`` returns the sequence length for given sizes. Without ``tokens_of`` the sequence length is
    ``request.tokens``.

    Raises:
        OptionError: No tensor-parallel size divides ranks, heads and tokens.
    """
    per_node = request.cluster.gpus_per_node
    tp_sizes = [request.tp] if request.tp else [size for size in range(1, per_node + 1) if per_node % size == 0]
    candidates: list[SizeCandidate] = []
    errors: list[OptionError] = []
    for tp in tp_sizes:
        try:
            sizes = parallel_sizes(request.cluster, tp=tp, pp=request.pp, cp=request.cp)
            candidates.append(_candidate(replace(request, tokens=tokens_of(sizes)) if tokens_of else request, sizes))
        except OptionError as error:
            errors.append(error)
    if not candidates:
        raise errors[0]
    return candidates


def _candidate(request: Request, sizes: ParallelSizes) -> SizeCandidate:
    sequence = request.model, request.cluster, request.tokens
    job = attention_job(*sequence, sizes, TrainingOptions(), causal=request.causal)
    return SizeCandidate(request, sizes, replace(job, cuda_graphs=request.cuda_graphs))


def closed_forms(candidate: SizeCandidate) -> ClosedForms:
    """Return estimates for every combination of flags, with attention's kernel time but without its buffers."""
    request, job = candidate.request, candidate.job
    combinations = flag_combinations(request.cluster, job.cp_size, request.optimizers)
    steps = {flags: candidate.step(flags, _kernels_alone(job, flags)) for flags in combinations}
    leanest = min(steps, key=lambda flags: steps[flags].memory_gb)
    fitting = [step.seconds for step in steps.values() if fits_memory(step, request.cluster)]
    return ClosedForms(tuple(steps), leanest, steps[leanest].memory_gb, min(fitting, default=None))


def _kernels_alone(job: AttentionJob, flags: FlagCombination) -> AttentionEstimate:
    kernel_s = kernel_seconds(job.cp_size, job.cluster, job.shape, causal=job.causal)
    forward, backward = pass_weights(job.cluster.device)
    forward_s = kernel_s * forward / (forward + backward)
    seconds = kernel_s + forward_s * (flags.recompute == "full")
    return AttentionEstimate(seconds, kernel_s, forward_s, AttentionMemory())


def grid_pool(candidate: SizeCandidate, leanest: FlagCombination) -> tuple[SearchResult, list[Choice]]:
    """Simulate grids, and return the search result and the candidate grids.

    Candidates are the simulated grids whose training step fits in memory with the flags ``leanest``. If no grid fits,
    all simulated grids are candidates. With at most :data:`MOST_RANKS_REGROUPED` ranks, candidates also have other
    numbers of head groups (:data:`GROUPS`). These are copies of the best grids and of one ring of all ranks.
    """
    job = candidate.job
    try:
        result = search(
            job,
            memory_bytes=candidate.request.cluster.device.memory_gb * 1e9,
            needs=lambda choice: peak(candidate.configuration(leanest, choice).buffers)[1],
        )
    except OptionError:
        result = search(job)
    pool = list(result.best)
    if job.cp_size <= MOST_RANKS_REGROUPED:
        work = shard_work(job.shape.tokens, job.shape.q_heads)
        ring = Choice(job, Plan(Grid(ring_outer=job.cp_size), "team-ring", shard_work=work))
        pool += _regrouped([*pool[:REGROUPED], ring])
    return result, pool


def _regrouped(choices: Sequence[Choice]) -> Iterator[Choice]:
    """Yield copies of each choice, one for each number of head groups in :data:`GROUPS` that the heads allow.

    A copy is left out if it equals one of ``choices[:-1]`` or an earlier copy.
    """
    seen: set[tuple[Plan, bool]] = {(choice.plan, choice.keep_gathered_q) for choice in choices[:-1]}
    for choice in choices:
        for count in GROUPS:
            plan, shape = replace(choice.plan, head_groups=count), choice.job.shape
            if head_groups(plan, shape.q_heads, shape.kv_heads) == count and (plan, choice.keep_gathered_q) not in seen:
                seen.add((plan, choice.keep_gathered_q))
                yield replace(choice, plan=plan)


def _best_without_regard_to_tiles(
    candidate: SizeCandidate, pool: Sequence[Choice], combinations: Sequence[FlagCombination]
) -> Iterator[Configuration]:
    """Compare flag combinations that differ only in token tiles, and yield the best configuration.

    Each result is the fastest configuration that fits; if none fits, the configuration that needs the least memory.
    """
    ordered = sorted(pool, key=lambda choice: choice.simulation.seconds)
    fast_s = TIE * ordered[0].simulation.seconds
    for _, alike in groupby(combinations, key=lambda flags: flags.without_tiles):
        options = [_with_best_grid(candidate, ordered, next(alike))]
        # The first combination has no tiles. If it has one of the fastest grids, no other combination is faster.
        if not options[0].fits or options[0].choice.simulation.seconds > fast_s:
            options += [_with_best_grid(candidate, ordered, flags) for flags in alike]
        yield min(options, key=lambda one: (not one.fits, one.step.seconds if one.fits else one.step.memory_gb))


def _with_best_grid(candidate: SizeCandidate, ordered: Sequence[Choice], flags: FlagCombination) -> Configuration:
    """Return the configuration with the fastest grid that fits.

    If no grid fits, return the configuration with the least memory. Among equally fast grids the grid
    with the least traffic is preferred.
    """
    fitting: list[Configuration] = []
    others: list[Configuration] = []
    for choice in ordered:
        if fitting and choice.simulation.seconds > TIE * fitting[0].choice.simulation.seconds:
            break
        option = candidate.configuration(flags, choice)
        (fitting if option.fits else others).append(option)
    if fitting:
        return fitting[preferred([(option.step.seconds, option.choice.volume) for option in fitting])]
    return min(others, key=lambda option: option.step.memory_gb)


def attention_of(choice: Choice, flags: FlagCombination) -> AttentionEstimate:
    """Return time and memory of simulated attention. Kernels and transfers overlap as far as CUDA streams allow."""
    return simulated_attention(choice, TrainingOptions(recompute=flags.recompute))
