"""Schemes by name: each is a corner of the grid (``docs/schemes.md``).

===================  ================================================  =======================================
name                 grid                                              source
===================  ================================================  =======================================
``ring``             ring_outer = P                                    Ring Attention, Megatron's p2p
``tokenring``        ring_outer = P, queries ride in forward           TokenRing
``double-ring``      ring_outer x ring_inner                           LoongTrain's rings
``burst``            the same, queries ride in backward                BurstAttention, BurstEngine
``ulysses``          head = P                                          DeepSpeed-Ulysses, Megatron's a2a
``usp``              head x ring_outer                                 USP, Megatron's a2a+p2p
``loongtrain``       head x ring_outer x ring_inner                    LoongTrain's 2D-Attention
``all-gather``       kv_team = P                                       Llama 3, Megatron's all_gather
``lss``              kv_team = P                                       LSS Transformer
``mesh``             team x kv_team                                    Attention2D, Mesh-Attention
``wallfacer``        team = kv_team = C, ring_outer = P / C^2          WallFacer / StarTrail
``team-ring``        team x ring_outer, other axes by hand             this project
===================  ================================================  =======================================

``lss`` is ``all-gather`` under another name: the LSS Transformer gathers in forward and reduces the gradients in one
fused step in backward, which is what a ``kv_team`` of all ranks does; its second averaging of the gradients is what
Megatron does over data and context parallel ranks together.

``auto`` is the ``team-ring`` with the lowest price (:mod:`megatron_wallfacer.schedule.price`), a ``kv_team`` among its
axes; where the number of tokens is not known, the one that moves the fewest words, with a ``kv_team`` by hand only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.formulas import backward_words, forward_words
from megatron_wallfacer.schedule.grid import DEFAULT_PLACEMENT, RINGS_ADJACENT, TEAMS_ADJACENT, Grid
from megatron_wallfacer.schedule.heads import check_heads
from megatron_wallfacer.schedule.plan import Order, Plan, Rider, shard_work
from megatron_wallfacer.schedule.price import NODE, cheapest


@dataclass(frozen=True)
class Rule:
    """What a name fixes, and what it leaves open.

    Attributes:
        axes: the axes that it has; where there is a choice it is by words.
        by_hand: axes of one rank unless asked for.
        all_wide: as many of its axes as possible have more than one rank, even where that costs words.
        orders: orders of K and V that it may have, the default first.
        forward, backward: what rides as published; None for the cheaper.
        note: said where an axis is refused.
    """

    axes: tuple[str, ...]
    by_hand: tuple[str, ...] = ()
    all_wide: bool = False
    orders: tuple[Order, ...] = ("native",)
    forward: Rider | None = "kv"
    backward: Rider | None = "kv"
    note: str = ""


_OURS = Rule(
    axes=("team", "ring_outer"),
    by_hand=("head", "kv_team", "ring_inner"),
    orders=("native", "paper", "permuted"),
    forward=None,
    backward=None,
)
RULES: Mapping[str, Rule] = {
    "auto": _OURS,
    "wallfacer": Rule(
        axes=("team", "kv_team", "ring_outer"),
        orders=("paper", "permuted"),
        backward="q",
        note="team = kv_team = C, and C^2 divides cp size",
    ),
    "team-ring": _OURS,
    "ring": Rule(axes=("ring_outer",)),
    "double-ring": Rule(axes=("ring_outer", "ring_inner"), all_wide=True),
    "ulysses": Rule(axes=("head",)),
    "usp": Rule(axes=("head", "ring_outer"), all_wide=True),
    "loongtrain": Rule(axes=("head", "ring_outer", "ring_inner"), all_wide=True),
    "all-gather": Rule(axes=("kv_team",)),
    "lss": Rule(axes=("kv_team",)),
    "mesh": Rule(axes=("team", "kv_team")),
    # The paper is about inference and has no backward.
    "tokenring": Rule(axes=("ring_outer",), forward="q", backward=None),
    "burst": Rule(axes=("ring_outer", "ring_inner"), all_wide=True, backward="q"),
}
SCHEMES: tuple[str, ...] = tuple(RULES)
PLACEMENTS: Mapping[str, tuple[str, ...]] = {
    "teams-adjacent": TEAMS_ADJACENT,
    "rings-adjacent": RINGS_ADJACENT,
    "head-first": ("head", "ring_inner", "ring_outer", "team", "kv_team"),
    "ring-first": ("ring_inner", "ring_outer", "head", "team", "kv_team"),
}
RIDERS: tuple[Rider, ...] = ("kv", "q")
#: ``auto`` where it chooses by price.
_PRICED = replace(_OURS, axes=("team", "kv_team", "ring_outer"), by_hand=("head", "ring_inner"))
#: The option that sets an axis. What these leave over is ``ring_outer``, or the one axis that is not given.
_OPTIONS = {"head": "head_size", "team": "team_size", "kv_team": "kv_team_size", "ring_inner": "ring_window"}

#: Least tokens per rank squared x query heads with which heads are split in two groups: 16,384 tokens with 32 heads. A
#: ring step is then a call of 16,384 x 8,192 rows and columns, and half of its heads run at 95 % of its rate on an H200
#: (docs/gpu/h200-2026-11-27/tiles.csv). At 4,096 tokens it is 84 %, and the host launches twice as many calls.
SPLIT_WORK = 2**33


def make_plan(
    scheme: str,
    cp_size: int,
    *,
    head_size: int | None = None,
    team_size: int | None = None,
    kv_team_size: int | None = None,
    ring_window: int | None = None,
    placement: str | Sequence[str] | None = None,
    kv_order: str | None = None,
    forward: str = "auto",
    backward: str = "auto",
    bidirectional: bool = False,
    head_groups: int | None = None,
    q_heads: int | None = None,
    kv_heads: int | None = None,
    kappa: float = 1.0,
    tokens: int | None = None,
    ranks_per_node: int = NODE,
) -> Plan:
    """The plan for a scheme by name.

    Axes that are not given are chosen by words, forward and backward together; with ``auto`` by price, where ``tokens``
    and heads are given. A window is chosen as near to the square root of its ring as it can be.
    Without ``q_heads`` and ``kv_heads`` any head size is thought to fit.

    Args:
        scheme: one of :data:`SCHEMES`.
        cp_size: P.
        head_size, team_size, kv_team_size: U, C, G, where the scheme leaves them open.
        ring_window: ranks of the inner ring, where the scheme leaves it open.
        placement: one of :data:`PLACEMENTS`, or an order of the axes, fastest first, in which ``ring`` is short for
            ``ring_inner,ring_outer`` and axes of one rank may be left out. By default what talks most stands nearest.
        kv_order: ``native``, ``paper`` or ``permuted``; ``paper`` with ``wallfacer``, else ``native``.
        forward, backward: what rides, ``kv`` or ``q``; ``auto`` is as published, or the cheaper by words where nothing
            is.
        bidirectional: blocks go half way round in each direction.
        head_groups: groups of heads that are pipelined; by default 2 where there is something to gather and, if
            ``tokens`` and heads are given, kernel calls of half the heads are large enough (:data:`SPLIT_WORK`).
        q_heads, kv_heads: heads at hand (after tensor parallelism); both or neither.
        kappa: kv heads / q heads, where heads are not given.
        tokens: tokens per rank. With them and heads, small attention calls are merged
            (:mod:`megatron_wallfacer.schedule.merging`).
        ranks_per_node: ranks of the context-parallel group in one node, for the price of ``auto``.

    Raises:
        OptionError: naming the option, its value and what is allowed.
    """
    if cp_size < 1:
        raise OptionError("cp_size", cp_size, "a positive number of ranks")
    if scheme not in RULES:
        raise OptionError("scheme", scheme, f"one of {', '.join(SCHEMES)}")
    if (q_heads is None) != (kv_heads is None):
        raise OptionError("kv_heads", kv_heads, "given if q_heads is, and only then")
    heads = None if q_heads is None or kv_heads is None else (q_heads, kv_heads)
    priced = scheme == "auto" and heads and tokens and kv_order in (None, "native")
    rule = _PRICED if priced else RULES[scheme]
    kappa = heads[1] / heads[0] if heads else kappa
    given = {"head": head_size, "team": team_size, "kv_team": kv_team_size, "ring_inner": ring_window}
    order = _order(scheme, rule, kv_order)
    riders = _riders("forward", forward, rule.forward), _riders("backward", backward, rule.backward)
    given = {axis: size for axis, size in given.items() if size is not None}
    grids = _open_grids(scheme, rule, cp_size, given, order)
    if heads and head_size is None:
        # Where none fits, the check below says so.
        grids = [grid for grid in grids if _fits(grid, heads)] or grids
    name = "team-ring" if scheme == "auto" else scheme
    plans = [_cheapest_riders(Plan(grid, name, order), riders, kappa, heads) for grid in grids]
    by_words = partial(_preference, rule, kappa=kappa, heads=heads)
    plan = cheapest(plans, tokens, *heads, ranks_per_node=ranks_per_node) if priced else min(plans, key=by_words)
    if heads:
        check_heads(plan, *heads)
    return replace(
        plan,
        grid=_placed(plan.grid, placement),
        bidirectional=bidirectional,
        head_groups=_head_groups(plan.grid, tokens, q_heads) if head_groups is None else head_groups,
        shard_work=shard_work(tokens, q_heads) if tokens and q_heads else None,
    )


def divisors(number: int) -> tuple[int, ...]:
    """All divisors, ascending."""
    small = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return (*small, *(number // d for d in reversed(small) if d * d != number))


def factorisations(number: int, axes: Sequence[str]) -> Iterator[dict[str, int]]:
    """Every way to write a number as the product of sizes of these axes."""
    first, *rest = axes
    if not rest:
        yield {first: number}
        return
    for size in divisors(number):
        for others in factorisations(number // size, rest):
            yield {first: size, **others}


def total_words(plan: Plan, kappa: float, *, kv_heads: int | None = None) -> float:
    """Words that a rank receives, forward and backward, in units of n*H."""
    return forward_words(plan, kappa, kv_heads=kv_heads) + backward_words(plan, kappa, kv_heads=kv_heads)


def _open_grids(scheme: str, rule: Rule, cp_size: int, given: Mapping[str, int], order: Order) -> list[Grid]:
    """The grids of a scheme that have the axes that are given.

    Raises:
        OptionError: there is none; says which sizes the first axis without a fit could have.
    """
    axes = [*rule.axes, *(axis for axis in rule.by_hand if axis in given)]
    if order != "native" and "kv_team" not in axes:
        axes.append("kv_team")
    grids = [Grid(**sizes) for sizes in factorisations(cp_size, axes)]
    if order != "native":
        grids = [grid for grid in grids if grid.team == grid.kv_team]
    asked = ""
    for axis, size in given.items():
        fitting = [grid for grid in grids if grid.size_of(axis) == size]
        if not fitting:
            allowed = sorted({grid.size_of(axis) for grid in grids})
            sizes = f"one of {', '.join(map(str, allowed))}" if len(allowed) > 1 else f"{allowed[0]}"
            note = f"; {rule.note}" if rule.note else ""
            raise OptionError(_OPTIONS[axis], size, f"{sizes} with scheme {scheme}, cp size {cp_size}{asked}{note}")
        grids, asked = fitting, f"{asked}, {axis} {size}"
    return grids


def _fits(grid: Grid, heads: tuple[int, int]) -> bool:
    try:
        check_heads(Plan(grid), *heads)
    except OptionError:
        return False
    return True


def _cheapest_riders(
    plan: Plan, riders: tuple[Sequence[Rider], Sequence[Rider]], kappa: float, heads: tuple[int, int] | None
) -> Plan:
    """The plan with the rider of each pass that moves fewer words; K and V where there is no difference."""
    kv_heads = heads[1] if heads else None
    forward = min(
        riders[0], key=lambda way: _rounded(forward_words(replace(plan, forward=way), kappa, kv_heads=kv_heads))
    )
    backward = min(
        riders[1], key=lambda way: _rounded(backward_words(replace(plan, backward=way), kappa, kv_heads=kv_heads))
    )
    return replace(plan, forward=forward, backward=backward)


def _preference(rule: Rule, plan: Plan, *, kappa: float, heads: tuple[int, int] | None) -> tuple[float, ...]:
    """What is least is taken: fewest words, then the smallest team, then a window near the square root of the ring."""
    grid = plan.grid
    wide = sum(grid.size_of(axis) > 1 for axis in rule.axes) if rule.all_wide else 0
    words = _rounded(total_words(plan, kappa, kv_heads=heads[1] if heads else None))
    return -wide, words, grid.team, max(grid.ring_outer, grid.ring_inner), grid.ring_inner


def _rounded(words: float) -> float:
    """Equal sums of different order are equal."""
    return round(words, 9)


def _order(scheme: str, rule: Rule, kv_order: str | None) -> Order:
    if kv_order is None:
        return rule.orders[0]
    if kv_order not in rule.orders:
        raise OptionError("kv_order", kv_order, f"{_either(rule.orders)} with scheme {scheme}")
    return kv_order  # type: ignore[return-value]


def _riders(option: str, asked: str, published: Rider | None) -> Sequence[Rider]:
    """The riders to choose from."""
    if asked not in ("auto", *RIDERS):
        raise OptionError(option, asked, _either(("auto", *RIDERS)))
    if asked != "auto":
        return (asked,)  # type: ignore[return-value]
    return RIDERS if published is None else (published,)


def _either(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _placed(grid: Grid, placement: str | Sequence[str] | None) -> Grid:
    if placement is None:
        return replace(grid, placement=DEFAULT_PLACEMENT)
    typed = placement if isinstance(placement, str) else ",".join(placement)
    order = PLACEMENTS.get(typed) or tuple(typed.replace(" ", "").split(","))
    spelt_out = [axis for name in order for axis in (("ring_inner", "ring_outer") if name == "ring" else (name,))]
    try:
        return replace(grid, placement=tuple(spelt_out))
    except OptionError as error:
        raise OptionError(error.option, typed, error.allowed) from None


def _head_groups(grid: Grid, tokens: int | None, q_heads: int | None) -> int:
    """Two where something is gathered that the other group's kernels can hide, and both groups have enough work."""
    if grid.head == 1 and grid.team == 1:
        return 1
    return 1 if tokens and q_heads and shard_work(tokens, q_heads) < SPLIT_WORK else 2
