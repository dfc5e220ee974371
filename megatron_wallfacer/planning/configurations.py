"""One search over everything that a training's time and memory depend on.

Closed form first: every tensor-parallel size with every combination of flags of
:mod:`megatron_wallfacer.planning.offers`, around attention at its kernels' time and without buffers. What does not fit
then does not fit at all. For the likeliest sizes grids of attention are simulated, and each combination takes the
fastest grid with which it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning.attention_memory import AttentionMemory
from megatron_wallfacer.planning.bounds import kernel_seconds
from megatron_wallfacer.planning.configuration import Configuration, Request, fits_memory, not_dominated, ranked
from megatron_wallfacer.planning.inventory import peak
from megatron_wallfacer.planning.kernels import BACKWARD_FLOPS, FORWARD_FLOPS, best_rate
from megatron_wallfacer.planning.layer import Attention, Step, attention_job, step_around
from megatron_wallfacer.planning.offers import Offer, offers, resolved
from megatron_wallfacer.planning.parallel import Software, Spread, spread_over
from megatron_wallfacer.planning.rank_memory import rank_buffers
from megatron_wallfacer.planning.search import MANY_RANKS, TIE, Choice, Found, Job, search, taken
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.heads import head_groups
from megatron_wallfacer.schedule.plan import Plan, shard_work

#: Tensor-parallel sizes whose grids are simulated: context-parallel ranks up to which there are so many.
SIZES = {64: 4, MANY_RANKS: 2}
#: Head groups that are tried for the fastest grids and for the ring, and how many grids. More groups need less memory.
GROUPS, REGROUPED, MOST_RANKS_REGROUPED = (1, 2, 4, 8), 4, 64


@dataclass(frozen=True)
class Offered:
    """What a search came to.

    Attributes:
        best: what fits: the one to take, see :func:`ranked`, then the others that tests cover, then all others. None
            needs more time, device and host memory than another one.
        leanest: what needs the least device memory of all that was simulated.
        grids: grids of attention that were simulated for the first, the fastest first.
        considered: combinations in closed form.
    """

    best: tuple[Configuration, ...]
    leanest: Configuration
    grids: Found
    considered: int


def configurations(request: Request) -> Offered:
    """Search everything that is not given.

    Raises:
        OptionError: a size that does not divide.
    """
    sizes = [(way, tried_in_closed_form(way)) for way in ways(request)]
    likely = [one for one in sizes if one[1].fastest_s is not None] or [min(sizes, key=lambda one: one[1].least_gb)]
    likely.sort(key=lambda one: one[1].fastest_s or 0.0)
    most = next((count for ranks, count in SIZES.items() if sizes[0][0].job.cp_size <= ranks), 1)
    simulated: list[Configuration] = []
    grids: dict[Spread, Found] = {}
    for way, tried in likely[:most]:
        grids[way.spread], pool = grid_pool(way, tried.leanest)
        simulated += _best_of_each_kind(way, pool, tried.offers)
    fitting = ranked(not_dominated([one for one in simulated if one.fits]))
    least = min(simulated, key=lambda one: one.step.memory_gb)
    first = (fitting or [least])[0]
    return Offered(tuple(fitting), least, grids[first.spread], sum(len(tried.offers) for _, tried in sizes))


@dataclass(frozen=True)
class Way:
    """A tensor-parallel size.

    Attributes:
        request: what is planned.
        spread: sizes of the groups.
        job: of attention.
    """

    request: Request
    spread: Spread
    job: Job

    def at(self, tokens: int) -> Way:
        """Return the same for a sequence of another length."""
        request = replace(self.request, tokens=tokens)
        return _way(request, self.spread)

    def offers(self) -> Iterator[Offer]:
        """Return every combination of flags for this size."""
        return offers(self.request.cluster, self.job.cp_size, tested_only=self.request.tested_only)

    def resolved(self, offer: Offer, attention: Attention) -> Software:
        """Return a combination with numbers for this size."""
        request = self.request
        sizes = request.model, request.cluster, self.job.shape.tokens, attention.memory, self.spread
        return resolved(offer, *sizes, attention.forward_s)

    def around(self, attention: Attention, software: Software) -> Step:
        """Return the step around attention."""
        request = self.request
        return step_around(request.model, self.job, attention, request.cluster, self.spread, software)


@dataclass(frozen=True)
class Tried:
    """Combinations in closed form.

    Attributes:
        offers: all of them.
        leanest, least_gb: that which needs the least device memory, and what it needs.
        fastest_s: step of the fastest that fits, if one does.
    """

    offers: tuple[Offer, ...]
    leanest: Offer
    least_gb: float
    fastest_s: float | None


def ways(request: Request, tokens_of: Callable[[Spread], int] | None = None) -> list[Way]:
    """Return every tensor-parallel size that divides ranks, heads and tokens.

    Args:
        request: what is planned.
        tokens_of: length of the sequence by sizes; by default that of the request.

    Raises:
        OptionError: there is none.
    """
    each = request.cluster.gpus_per_node
    sizes = [request.tp] if request.tp else [size for size in range(1, each + 1) if each % size == 0]
    found: list[Way] = []
    errors: list[OptionError] = []
    for tp in sizes:
        try:
            spread = spread_over(request.cluster, tp=tp, pp=request.pp, cp=request.cp)
            found.append(_way(replace(request, tokens=tokens_of(spread)) if tokens_of else request, spread))
        except OptionError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def _way(request: Request, spread: Spread) -> Way:
    sequence = request.model, request.cluster, request.tokens
    job = attention_job(*sequence, spread, causal=request.causal, software=Software())
    return Way(request, spread, replace(job, cuda_graphs=request.cuda_graphs))


def tried_in_closed_form(way: Way) -> Tried:
    """Return every combination around attention at its best."""
    steps: dict[Offer, Step] = {}
    for offer in way.offers():
        attention = _at_best(way.job, offer)
        steps[offer] = way.around(attention, way.resolved(offer, attention))
    leanest = min(steps, key=lambda one: steps[one].memory_gb)
    fitting = [found.seconds for found in steps.values() if fits_memory(found, way.request.cluster)]
    return Tried(tuple(steps), leanest, steps[leanest].memory_gb, min(fitting, default=None))


def _at_best(job: Job, offer: Offer) -> Attention:
    """Attention at the time of its kernels, without buffers."""
    device = job.cluster.device
    kernel_s = kernel_seconds(job.cp_size, job.cluster, job.shape, causal=job.causal)
    rates = device.forward, device.backward
    if device.kernels is not None:
        rates = best_rate(device.kernels, backward=False), best_rate(device.kernels, backward=True)
    forward, backward = FORWARD_FLOPS / rates[0], BACKWARD_FLOPS / rates[1]
    forward_s = kernel_s * forward / (forward + backward)
    return Attention(kernel_s + forward_s * (offer.recompute == "full"), kernel_s, forward_s, AttentionMemory())


def grid_pool(way: Way, leanest: Offer) -> tuple[Found, list[Choice]]:
    """Return simulated grids: the fastest that fit with the leanest combination, and some in other head groups."""

    def needs(choice: Choice) -> float:
        attention = attention_of(choice, leanest)
        software = way.resolved(leanest, attention)
        sizes = way.request.model, way.job.shape.tokens, choice.attention, way.spread, software
        return peak(rank_buffers(*sizes))[1]

    memory = way.request.cluster.device.memory_gb * 1e9
    try:
        found = search(way.job, memory_bytes=memory, needs=needs)
    except OptionError:
        found = search(way.job)
    pool = list(found.best)
    if way.job.cp_size <= MOST_RANKS_REGROUPED:
        pool += _regrouped([*pool[:REGROUPED], _ring(way.job)])
    return found, pool


def _ring(job: Job) -> Choice:
    plan = Plan(Grid(ring_outer=job.cp_size), "team-ring", shard_work=shard_work(job.shape.tokens, job.shape.q_heads))
    return Choice(job, plan)


def _regrouped(choices: Sequence[Choice]) -> Iterator[Choice]:
    """The same grids with other numbers of head groups."""
    seen: set[tuple[Plan, bool]] = {(one.plan, one.q_kept) for one in choices[:-1]}
    for choice in choices:
        for count in GROUPS:
            plan, shape = replace(choice.plan, head_groups=count), choice.job.shape
            if head_groups(plan, shape.q_heads, shape.kv_heads) == count and (plan, choice.q_kept) not in seen:
                seen.add((plan, choice.q_kept))
                yield replace(choice, plan=plan)


def _best_of_each_kind(way: Way, pool: Sequence[Choice], tried: Sequence[Offer]) -> Iterator[Configuration]:
    """Of each combination without regard to tiles the fastest that fits, else the one that needs least."""
    kinds: dict[tuple[object, ...], list[Offer]] = {}
    for offer in tried:
        kinds.setdefault(offer.kind, []).append(offer)
    ordered = sorted(pool, key=lambda one: one.played.seconds)
    for same in kinds.values():
        options: list[Configuration] = []
        for offer in same:
            options.append(_with_best_grid(way, ordered, offer))
            # The first has no tiles: with one of the fastest grids none of the others is faster.
            if options[0].fits and options[0].choice.played.seconds <= TIE * ordered[0].played.seconds:
                break
        fitting = [one for one in options if one.fits]
        if fitting:
            yield min(fitting, key=lambda one: one.step.seconds)
        else:
            yield min(options, key=lambda one: one.step.memory_gb)


def _with_best_grid(way: Way, ordered: Sequence[Choice], offer: Offer) -> Configuration:
    """The fastest grid with which the combination fits; of equals that with the fewest words."""
    fitting: list[tuple[Choice, Software, Step]] = []
    others: list[tuple[Choice, Software, Step]] = []
    for choice in ordered:
        if fitting and choice.played.seconds > TIE * fitting[0][0].played.seconds:
            break
        attention = attention_of(choice, offer)
        software = way.resolved(offer, attention)
        found = way.around(attention, software)
        (fitting if fits_memory(found, way.request.cluster) else others).append((choice, software, found))
    if fitting:
        choice, software, _ = fitting[taken([(found.seconds, choice.words) for choice, _, found in fitting])]
    else:
        choice, software, _ = min(others, key=lambda one: one[2].memory_gb)
    return Configuration(way.request, way.spread, software, choice)


def attention_of(choice: Choice, offer: Offer) -> Attention:
    """Return simulated attention in the software of Megatron, which hides what streams allow."""
    played = choice.played
    repeated = played.pass_s[0] if offer.recompute == "full" else 0.0
    return Attention(played.seconds + repeated, played.kernel_s, played.pass_s[0], choice.attention)
