"""Every grid that a model allows on a cluster, and which of them is fastest there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, permutations, product
from operator import attrgetter

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning.attention_memory import AttentionMemory, attention_memory
from megatron_wallfacer.planning.bounds import Bound, bound
from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.costs import Costs
from megatron_wallfacer.planning.estimate import estimated_kernel_seconds
from megatron_wallfacer.planning.network import Network
from megatron_wallfacer.planning.play import Played, Span, play
from megatron_wallfacer.planning.symmetry import Symmetry
from megatron_wallfacer.schedule.formulas import backward_words, forward_words
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.heads import check_heads, head_groups
from megatron_wallfacer.schedule.memory import graphed_peak_bytes, peak_bytes
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.plan import Plan, shard_work
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.schemes import RIDERS, SCHEMES, factorisations, make_plan, total_words
from megatron_wallfacer.schedule.volume import Shape

#: What is searched. K and V teams are never better than teams of queries and a ring, and stay for the named schemes.
AXES = ("head", "ring_inner", "team", "ring_outer")
#: Schedules whose ranks are not alike are played rank by rank, up to so many.
MOST_RANKS_UNFOLDED = 64
#: Longer rings and larger teams take long to write and to play, and are not the fastest of as many ranks.
LONGEST_AXIS = 256
#: Plans that are played first; how often the search then looks beside the best one, and at how many plans each time.
FIRST, ROUNDS, EACH_ROUND = 16, 4, 8
#: Plans whose kernels are estimated from their tiles, where kernels are measured.
ESTIMATED = 1000
#: Played times this close are as good as equal: neither does the search come nearer to the fastest, nor the player to
#: what is measured. Of equals that which moves the fewest words is taken, for on a real network it is words that vary.
TIE = 1.02
#: Above so many ranks schedules are long, and half as many are estimated and played.
MANY_RANKS = 4096


@dataclass(frozen=True)
class Job:
    """One attention layer on a cluster.

    Attributes:
        cluster: whose ranks ``0 .. cp_size * spread - 1`` a context-parallel group is of.
        shape: of a rank's shard, heads after tensor parallelism.
        cp_size: P.
        causal: causal mask, else full attention.
        stand_ins: count the stand-ins that our engine makes for outputs in backward; others send what they stand for.
        cuda_graphs: count the memory of passes as CUDA graphs. Their times are those of eager passes.
    """

    cluster: Cluster
    shape: Shape
    cp_size: int
    causal: bool = True
    stand_ins: bool = True
    cuda_graphs: bool = False

    @property
    def costs(self) -> Costs:
        """Of its operations."""
        return Costs(self.cluster, self.shape, stand_ins=self.stand_ins)


@dataclass(frozen=True)
class Choice:
    """A plan on a job.

    Attributes:
        job: on which.
        plan: grid and choices.
        q_kept: the team's queries are kept from forward to backward.
        name: of the scheme, if it is one with a name.
    """

    job: Job
    plan: Plan
    q_kept: bool = False
    name: str | None = None

    @cached_property
    def bound(self) -> Bound:
        """What no overlap can bring it below."""
        return bound(self.plan, self.job.cluster, self.job.shape, causal=self.job.causal, q_kept=self.q_kept)

    @property
    def words(self) -> float:
        """That a rank receives in both passes, in units of n * H."""
        return total_words(self.plan, self.job.shape.kappa, kv_heads=self.job.shape.kv_heads)

    @property
    def played(self) -> Played:
        """What it takes."""
        return self._tried[0]

    @property
    def buffer_bytes(self) -> float:
        """Most bytes that attention holds: buffers and results of one pass, or of both where they are CUDA graphs."""
        return self._tried[1]

    @property
    def attention(self) -> AttentionMemory:
        """What attention allocates and keeps, for the inventory."""
        return self._tried[2]

    @cached_property
    def _tried(self) -> tuple[Played, float, AttentionMemory]:
        # Schedules of many ranks are large: written once, used for all, and let go of.
        first, job = self.schedules(0), self.job
        memory = attention_memory(self.plan, first, job.shape, cuda_graphs=job.cuda_graphs)
        return self._play(lambda rank: first if rank == 0 else self.schedules(rank)), self._peak(first), memory

    def _peak(self, schedules: Sequence[Schedule]) -> int:
        shape = self.job.shape
        if self.job.cuda_graphs:
            return graphed_peak_bytes(schedules, shape)
        return max(peak_bytes(schedule, shape) for schedule in schedules)

    def spans(self) -> tuple[Span, ...]:
        """What happens when."""
        return self._play(self.schedules, spans=True).spans

    def play_every_rank(self, draw: int = 0) -> Played:
        """The same without folding; one of many possible runs, see :func:`~megatron_wallfacer.planning.play.play`."""
        return self._play(self.schedules, folded=False, draw=draw)

    def _play(
        self, schedules: Callable[[int], Sequence[Schedule]], *, spans: bool = False, folded: bool = True, draw: int = 0
    ) -> Played:
        alike = folded and self.plan.kv_order == "native"
        symmetry = Symmetry(self.plan.grid, Network(self.job.cluster).unit_sizes, folded=alike)
        return play(self.job.costs, schedules, symmetry, spans=spans, draw=draw)

    def schedules(self, rank: int) -> tuple[Schedule, Schedule]:
        """Forward and backward of a rank."""
        shape = self.job.shape
        options = {
            "causal": self.job.causal,
            "groups": head_groups(self.plan, shape.q_heads, shape.kv_heads),
            "q_kept": self.q_kept,
        }
        return forward_schedule(self.plan, rank, **options), backward_schedule(self.plan, rank, **options)

    @property
    def can_be_played(self) -> bool:
        """Whether that takes seconds."""
        grid = self.plan.grid
        few = self.plan.kv_order == "native" or grid.cp_size <= MOST_RANKS_UNFOLDED
        return few and max(grid.ring, grid.team, grid.kv_team, grid.head) <= LONGEST_AXIS


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        best: the choices that were played: the one to take, see :func:`taken`, then the others, fastest first.
        legal: choices that there are.
        too_large: of those tried, how many do not fit the memory.
    """

    best: tuple[Choice, ...]
    legal: int
    too_large: int


def search(
    job: Job, *, memory_bytes: float = float("inf"), needs: Callable[[Choice], float] = attrgetter("buffer_bytes")
) -> Found:
    """The fastest choices. The likeliest are played first, then what lies beside the best of them, again and again.

    Args:
        job: what for.
        memory_bytes: what a choice may need.
        needs: bytes of a choice that count; by default attention's buffers.

    Raises:
        OptionError: no plan fits the memory; says what the least of those tried needs.
    """
    found, effort = _Tried(memory_bytes, needs), 1 if job.cp_size <= MANY_RANKS else 2
    waiting = _likeliest_first([one for one in candidates(job) if one.can_be_played], ESTIMATED // effort)
    for choice in waiting:
        if len(found.played) == FIRST // effort:
            break
        found.take(choice)
    if not found.played:
        least = min(found.too_large, key=needs)
        allowed = f"at least {needs(least) / 1e9:.2f} GB, for {least.plan.grid}"
        raise OptionError("memory", f"{memory_bytes / 1e9:.2f} GB", allowed)
    for _ in range(ROUNDS // effort):
        best = found.best
        beside = (one for one in waiting if _beside(best.plan.grid, one.plan.grid) and not found.has(one))
        for choice in islice(beside, EACH_ROUND // effort):
            found.take(choice)
        if best is found.best:
            break
    ranked = sorted(found.played, key=lambda one: one.played.seconds)
    first = ranked.pop(taken([(one.played.seconds, one.words) for one in ranked]))
    return Found((first, *ranked), len(waiting), len(found.too_large))


def taken(played: Sequence[tuple[float, float]]) -> int:
    """Which of some choices to take: the fastest, or of those within :data:`TIE` of it that with the fewest words.

    Args:
        played: (seconds, words) of each.
    """
    fastest = min(seconds for seconds, _ in played)
    equal = [index for index, (seconds, _) in enumerate(played) if seconds <= TIE * fastest]
    return min(equal, key=lambda index: (played[index][1], played[index][0]))


class _Tried:
    """Choices that have been looked at, each once."""

    def __init__(self, memory_bytes: float, needs: Callable[[Choice], float]) -> None:
        self._memory_bytes, self._needs, self._seen = memory_bytes, needs, set[int]()
        self.played: list[Choice] = []
        self.too_large: list[Choice] = []

    @property
    def best(self) -> Choice:
        return min(self.played, key=lambda one: one.played.seconds)

    def has(self, choice: Choice) -> bool:
        return id(choice) in self._seen

    def take(self, choice: Choice) -> None:
        self._seen.add(id(choice))
        (self.too_large if self._needs(choice) > self._memory_bytes else self.played).append(choice)


def _beside(grid: Grid, other: Grid) -> bool:
    """Whether one is the other with part of an axis given to another axis, placed in the same order."""
    changed = [axis for axis in AXES if grid.size_of(axis) != other.size_of(axis)]
    if len(changed) > 2:
        return False
    shared = [axis for axis in grid.placement if axis in other.placement]
    return shared == [axis for axis in other.placement if axis in grid.placement]


def candidates(job: Job) -> Iterator[Choice]:
    """Every grid of :data:`AXES` that divides the heads, in every placement, with the riders that move fewest bytes.

    Raises:
        OptionError: there is none.
    """
    found, shape = False, job.shape
    for sizes in factorisations(job.cp_size, AXES):
        plan = Plan(Grid(**sizes), "team-ring", shard_work=shard_work(shape.tokens, shape.q_heads))
        if not _fits(plan, shape) or (sizes["ring_inner"] > 1 and sizes["ring_outer"] == 1):
            continue
        plan = _with_riders(plan, shape)
        found = True
        for grid in _placements(plan.grid):
            yield from _choices(job, replace(plan, grid=grid))
    if not found:
        raise OptionError("cp_size", job.cp_size, f"a size that {shape.q_heads} query heads allow a grid of")


def named(job: Job, names: Sequence[str] = SCHEMES) -> Iterator[Choice]:
    """Each scheme by its name, in the placement that its bound likes best; those that do not fit are left out."""
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
        yield min(placed, key=_by_guess)


def _likeliest_first(choices: list[Choice], most: int) -> list[Choice]:
    """By guess. Where kernels are measured, ``most`` of them are estimated: the likeliest with kernels at best rate."""
    if not choices or choices[0].job.cluster.device.kernels is None:
        return sorted(choices, key=_by_guess)
    rough = sorted(choices, key=lambda one: one.bound.guess_s(one.plan.head_groups, one.bound.kernel_s))
    return sorted(rough[:most], key=_by_guess) + rough[most:]


def _by_guess(choice: Choice) -> float:
    job = choice.job
    kernel_s = estimated_kernel_seconds(choice.plan, job.cluster, job.shape, causal=job.causal)
    return choice.bound.guess_s(choice.plan.head_groups, kernel_s)


def _fits(plan: Plan, shape: Shape) -> bool:
    try:
        check_heads(plan, shape.q_heads, shape.kv_heads)
    except OptionError:
        return False
    return True


def _with_riders(plan: Plan, shape: Shape) -> Plan:
    """The plan with what moves fewest words."""

    def words(riders: tuple) -> float:
        plan_ = replace(plan, forward=riders[0], backward=riders[1])
        kappa, kv_heads = shape.kappa, shape.kv_heads
        return forward_words(plan_, kappa, kv_heads=kv_heads) + backward_words(plan_, kappa, kv_heads=kv_heads)

    forward, backward = min(product(RIDERS, RIDERS), key=words)
    return replace(plan, forward=forward, backward=backward)


def _placements(grid: Grid) -> list[Grid]:
    """The grid in every order of its wide axes."""
    return [replace(grid, placement=order) for order in permutations(grid.placement)]


def _choices(job: Job, plan: Plan) -> Iterator[Choice]:
    """Queries are kept where there are any to keep; heads in two groups where something is gathered.

    Where kernels are measured smaller tiles may cost more than two groups hide: one group is a choice too.
    """
    gathers = plan.grid.head > 1 or plan.grid.team > 1
    yield Choice(job, replace(plan, head_groups=2 if gathers else 1), q_kept=plan.grid.team > 1)
    if gathers and job.cluster.device.kernels is not None:
        two = replace(plan, head_groups=2)
        if head_groups(two, job.shape.q_heads, job.shape.kv_heads) > 1:
            yield Choice(job, replace(plan, head_groups=1), q_kept=plan.grid.team > 1)
