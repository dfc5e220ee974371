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
from megatron_wallfacer.schedule.heads import divides_heads, head_groups
from megatron_wallfacer.schedule.plan import RING_VARIANTS, Plan, shard_work
from megatron_wallfacer.schedule.schemes import SCHEMES, make_plan, total_volume
from megatron_wallfacer.schedule.volume import Shape

#: Axes of the search. A kv_team is never faster than a team with a ring, so only named schemes have a kv_team.
AXES = ("head", "ring_inner", "team", "ring_outer")
#: Number of plans that are simulated first, then number of rounds, and neighbours of the best plan per round.
FIRST, ROUNDS, EACH_ROUND = 16, 4, 8
#: Number of plans whose kernel time is estimated from their tiles, if kernels are measured.
ESTIMATED = 1000
#: Ratio up to which two times count as equal, because neither the search nor the simulator is more accurate. Among
#: equal plans the plan with the least traffic is preferred, because rates of real networks vary.
TIE = 1.02
#: Number of ranks above which half as many plans are estimated and simulated, because their schedules are long.
MANY_RANKS = 4096


@dataclass(frozen=True)
class SearchResult:
    """The result of a search for grids.

    Attributes:
        best: simulated choices that fit. The preferred choice (see :func:`preferred`) is first, then all others by
            time.
        legal: number of choices that are not too large to simulate.
        too_large: number of choices that were tried and do not fit in memory.
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
    """Simulate choices with the lowest estimates, then neighbours of the best choice, and return the fastest choices.

    A choice fits if it needs at most ``memory_bytes``. ``needs`` is a function that returns the bytes of a
    :class:`Choice`, by default the bytes of attention's buffers.

    Raises:
        OptionError: No choice fits in memory. The message states the least memory that a choice needs.
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
    """Return the index of the choice with the least traffic, among choices within :data:`TIE` of the shortest time.

    Each choice is given as (seconds, communication volume).
    """
    fastest = min(seconds for seconds, _ in times)
    equal = [index for index, (seconds, _) in enumerate(times) if seconds <= TIE * fastest]
    return min(equal, key=lambda index: (times[index][1], times[index][0]))


class _Tried:
    """Choices that the search has tried so far."""

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
    """Return whether two grids have the same order of axes, and differ in the sizes of at most two axes."""
    changed = [axis for axis in AXES if grid.size_of(axis) != other.size_of(axis)]
    if len(changed) > 2:
        return False
    shared = [axis for axis in grid.placement if axis in other.placement]
    return shared == [axis for axis in other.placement if axis in grid.placement]


def candidates(job: AttentionJob) -> Iterator[Choice]:
    """Yield every grid in every placement. A grid has the axes :data:`AXES`, and its head axis divides the heads.

    For each grid, pass-KV or pass-Q is chosen by communication volume, in forward and in backward.

    Raises:
        OptionError: No size of the head axis divides the number of heads.
    """
    is_empty, shape = True, job.shape
    for sizes in factorisations(job.cp_size, AXES):
        plan = Plan(Grid(**sizes), "team-ring", shard_work=shard_work(shape.tokens, shape.q_heads))
        fits = divides_heads(plan.grid.head, shape.q_heads, shape.kv_heads)
        if not fits or (sizes["ring_inner"] > 1 and sizes["ring_outer"] == 1):
            continue
        plan = _with_cheapest_variants(plan, shape)
        is_empty = False
        for grid in _placements(plan.grid):
            yield from _choices(job, replace(plan, grid=grid))
    if is_empty:
        raise OptionError(
            "cp_size", job.cp_size, f"another size: no grid of {job.cp_size} ranks fits {shape.q_heads} query heads"
        )


def named_choices(job: AttentionJob, names: Sequence[str] = SCHEMES) -> Iterator[Choice]:
    """Yield each named scheme, in the placement with the lowest estimated time.

    Schemes whose head axis does not divide the heads are left out, and so are ``auto``, ``lss`` and ``team-ring``.
    """
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
    """Return choices in the order of their estimated times."""
    # Measured kernels make an estimate slow, so only the choices with the best rough estimates get it.
    if not choices or choices[0].job.cluster.device.kernels is None:
        return sorted(choices, key=_estimate_s)
    rough = sorted(choices, key=lambda choice: choice.bound.estimate_s(choice.plan.head_groups, choice.bound.kernel_s))
    return sorted(rough[:most], key=_estimate_s) + rough[most:]


def _estimate_s(choice: Choice) -> float:
    job = choice.job
    kernel_s = estimated_kernel_seconds(choice.plan, job.cluster, job.shape, causal=job.causal)
    return choice.bound.estimate_s(choice.plan.head_groups, kernel_s)


def _with_cheapest_variants(plan: Plan, shape: Shape) -> Plan:
    variants = product(RING_VARIANTS, repeat=2)
    plans = [replace(plan, forward=forward, backward=backward) for forward, backward in variants]
    return min(plans, key=partial(total_volume, kappa=shape.kappa, kv_heads=shape.kv_heads))


def _placements(grid: Grid) -> list[Grid]:
    return [replace(grid, placement=order) for order in permutations(grid.placement)]


def _choices(job: AttentionJob, plan: Plan) -> Iterator[Choice]:
    """Yield a plan with two head groups if an axis gathers tensors, else with one. Gathered queries are kept.

    With measured kernels the plan with one head group is also yielded. Two head groups have smaller kernel calls, which
    may cost more time than the overlap saves.
    """
    gathers = plan.grid.head > 1 or plan.grid.team > 1
    yield Choice(job, replace(plan, head_groups=2 if gathers else 1), keep_gathered_q=plan.grid.team > 1)
    if gathers and job.cluster.device.kernels is not None:
        two = replace(plan, head_groups=2)
        if head_groups(two, job.shape.q_heads, job.shape.kv_heads) > 1:
            yield Choice(job, replace(plan, head_groups=1), keep_gathered_q=plan.grid.team > 1)
