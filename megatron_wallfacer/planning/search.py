"""A search for the fastest grid of an attention layer on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, permutations, product
from operator import attrgetter

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning.choice import AttentionJob, Choice
from megatron_wallfacer.planning.time_bound import estimated_kernel_seconds
from megatron_wallfacer.schedule.grid import Grid, factorisations
from megatron_wallfacer.schedule.heads import check_heads, head_groups
from megatron_wallfacer.schedule.plan import RING_VARIANTS, Plan, shard_work
from megatron_wallfacer.schedule.schemes import SCHEMES, make_plan, total_volume
from megatron_wallfacer.schedule.volume import Shape

#: Axes of the search. A kv_team is never better than a team and a ring, so only named schemes have one.
AXES = ("head", "ring_inner", "team", "ring_outer")
#: Plans that are simulated first; rounds in which neighbours of the best plan follow; neighbours per round.
FIRST, ROUNDS, EACH_ROUND = 16, 4, 8
#: Plans whose kernels are estimated from their tiles, where kernels are measured.
ESTIMATED = 1000
#: Ratio up to which two times are equal: the search is no closer to the fastest plan, nor the simulator to a
#: measurement. Of equal plans the one with the least traffic is preferred, because real networks vary.
TIE = 1.02
#: Ranks above which schedules are long, so that half as many plans are estimated and simulated.
MANY_RANKS = 4096


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        best: simulated choices: the preferred one, see :func:`preferred`, then the others, fastest first.
        legal: number of choices that the model allows.
        too_large: number of choices that were tried and do not fit the memory.
    """

    best: tuple[Choice, ...]
    legal: int
    too_large: int


def search(
    job: AttentionJob,
    *,
    memory_bytes: float = float("inf"),
    needs: Callable[[Choice], float] = attrgetter("buffer_bytes"),
) -> SearchResult:
    """Return the fastest choices. Those with the lowest estimates are simulated first, then neighbours of the best.

    Args:
        job: attention layer and cluster.
        memory_bytes: bytes that a choice may need.
        needs: function from a choice to the bytes that it needs; attention's buffers by default.

    Raises:
        OptionError: no choice fits the memory; with the bytes of the smallest that was tried.
    """
    tried, effort = _Tried(memory_bytes, needs), 1 if job.cp_size <= MANY_RANKS else 2
    waiting = _by_estimate([choice for choice in candidates(job) if choice.can_be_simulated], ESTIMATED // effort)
    for choice in waiting:
        if len(tried.fitting) == FIRST // effort:
            break
        tried.add(choice)
    if not tried.fitting:
        least = min(tried.too_large, key=needs)
        allowed = f"at least {needs(least) / 1e9:.2f} GB, for {least.plan.grid}"
        raise OptionError("memory", f"{memory_bytes / 1e9:.2f} GB", allowed)
    for _ in range(ROUNDS // effort):
        best = tried.fastest
        grid = best.plan.grid
        near = (other for other in waiting if _are_neighbours(grid, other.plan.grid) and other not in tried)
        for choice in islice(near, EACH_ROUND // effort):
            tried.add(choice)
        if best is tried.fastest:
            break
    ranked = sorted(tried.fitting, key=lambda choice: choice.simulation.seconds)
    first = ranked.pop(preferred([(choice.simulation.seconds, choice.volume) for choice in ranked]))
    return SearchResult((first, *ranked), len(waiting), len(tried.too_large))


def preferred(times: Sequence[tuple[float, float]]) -> int:
    """Return the index of the choice with the least traffic of those within :data:`TIE` of the fastest.

    Args:
        times: (seconds, communication volume) of each choice.
    """
    fastest = min(seconds for seconds, _ in times)
    equal = [index for index, (seconds, _) in enumerate(times) if seconds <= TIE * fastest]
    return min(equal, key=lambda index: (times[index][1], times[index][0]))


class _Tried:
    """Choices that were tried, each once."""

    def __init__(self, memory_bytes: float, needs: Callable[[Choice], float]) -> None:
        self._memory_bytes, self._needs, self._seen = memory_bytes, needs, set[int]()
        self.fitting: list[Choice] = []
        self.too_large: list[Choice] = []

    @property
    def fastest(self) -> Choice:
        return min(self.fitting, key=lambda choice: choice.simulation.seconds)

    def __contains__(self, choice: Choice) -> bool:
        return id(choice) in self._seen

    def add(self, choice: Choice) -> None:
        self._seen.add(id(choice))
        (self.too_large if self._needs(choice) > self._memory_bytes else self.fitting).append(choice)


def _are_neighbours(grid: Grid, other: Grid) -> bool:
    """Return whether grids differ by a factor that moves from one axis to another, in the same placement order."""
    changed = [axis for axis in AXES if grid.size_of(axis) != other.size_of(axis)]
    if len(changed) > 2:
        return False
    shared = [axis for axis in grid.placement if axis in other.placement]
    return shared == [axis for axis in other.placement if axis in grid.placement]


def candidates(job: AttentionJob) -> Iterator[Choice]:
    """Yield every grid of :data:`AXES` that divides the heads, in every placement, with the least traffic in the ring.

    Raises:
        OptionError: the heads allow no grid.
    """
    is_empty, shape = True, job.shape
    for sizes in factorisations(job.cp_size, AXES):
        plan = Plan(Grid(**sizes), "team-ring", shard_work=shard_work(shape.tokens, shape.q_heads))
        if not _divides_heads(plan, shape) or (sizes["ring_inner"] > 1 and sizes["ring_outer"] == 1):
            continue
        plan = _with_cheapest_variants(plan, shape)
        is_empty = False
        for grid in _placements(plan.grid):
            yield from _choices(job, replace(plan, grid=grid))
    if is_empty:
        raise OptionError("cp_size", job.cp_size, f"a size that {shape.q_heads} query heads allow a grid of")


def named_choices(job: AttentionJob, names: Sequence[str] = SCHEMES) -> Iterator[Choice]:
    """Yield each scheme by name in its placement with the lowest estimate; those that do not fit are left out."""
    for name in names:
        if name in ("auto", "lss", "team-ring"):
            continue
        shape = job.shape
        try:
            plan = make_plan(name, job.cp_size, q_heads=shape.q_heads, kv_heads=shape.kv_heads)
        except OptionError:
            continue
        plan = replace(plan, shard_work=shard_work(shape.tokens, shape.q_heads))
        placed = [Choice(job, replace(plan, grid=grid), name=name) for grid in _placements(plan.grid)]
        yield min(placed, key=_estimate_s)


def _by_estimate(choices: list[Choice], most: int) -> list[Choice]:
    """Return choices by estimated time. Measured kernels are estimated for the ``most`` likely at the best rate."""
    if not choices or choices[0].job.cluster.device.kernels is None:
        return sorted(choices, key=_estimate_s)
    rough = sorted(choices, key=lambda choice: choice.bound.estimate_s(choice.plan.head_groups, choice.bound.kernel_s))
    return sorted(rough[:most], key=_estimate_s) + rough[most:]


def _estimate_s(choice: Choice) -> float:
    job = choice.job
    kernel_s = estimated_kernel_seconds(choice.plan, job.cluster, job.shape, causal=job.causal)
    return choice.bound.estimate_s(choice.plan.head_groups, kernel_s)


def _divides_heads(plan: Plan, shape: Shape) -> bool:
    try:
        check_heads(plan, shape.q_heads, shape.kv_heads)
    except OptionError:
        return False
    return True


def _with_cheapest_variants(plan: Plan, shape: Shape) -> Plan:
    """Return the plan with the ring variants that have the least volume, both passes together."""
    variants = product(RING_VARIANTS, repeat=2)
    plans = [replace(plan, forward=forward, backward=backward) for forward, backward in variants]
    return min(plans, key=partial(total_volume, kappa=shape.kappa, kv_heads=shape.kv_heads))


def _placements(grid: Grid) -> list[Grid]:
    """Return the grid in every order of its axes with more than one rank."""
    return [replace(grid, placement=order) for order in permutations(grid.placement)]


def _choices(job: AttentionJob, plan: Plan) -> Iterator[Choice]:
    """Yield a plan in two head groups if it gathers, and with gathered queries kept if there are any.

    With measured kernels, smaller tiles may cost more than two groups overlap. So one group is a choice too.
    """
    gathers = plan.grid.head > 1 or plan.grid.team > 1
    yield Choice(job, replace(plan, head_groups=2 if gathers else 1), keep_gathered_q=plan.grid.team > 1)
    if gathers and job.cluster.device.kernels is not None:
        two = replace(plan, head_groups=2)
        if head_groups(two, job.shape.q_heads, job.shape.kv_heads) > 1:
            yield Choice(job, replace(plan, head_groups=1), keep_gathered_q=plan.grid.team > 1)
