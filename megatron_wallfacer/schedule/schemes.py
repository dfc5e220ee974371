"""Schemes by name, each of which fixes or restricts the grid. ``docs/schemes.md`` lists grids and sources.

``lss`` is another name of ``all-gather``. The LSS Transformer gathers in forward and reduces gradients in backward,
like a grid whose ``kv_team`` has all ranks. Megatron itself averages gradients over data- and context-parallel ranks.

If tokens and heads are known and ``kv_order`` is ``native``, ``auto`` selects a ``team-ring`` grid by estimated time
(:mod:`megatron_wallfacer.schedule.price`). This grid may have a ``kv_team`` axis. Otherwise ``auto`` selects the grid
that ``team-ring`` selects: the grid with the least communication volume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.formulas import backward_volume, forward_volume
from megatron_wallfacer.schedule.grid import DEFAULT_PLACEMENT, RINGS_ADJACENT, TEAMS_ADJACENT, Grid, factorisations
from megatron_wallfacer.schedule.heads import check_heads, divides_heads
from megatron_wallfacer.schedule.plan import RING_VARIANTS, Order, Plan, RingVariant, shard_work
from megatron_wallfacer.schedule.price import NODE, cheapest


@dataclass(frozen=True)
class Rule:
    """The choices that a scheme fixes or leaves open.

    Attributes:
        axes: axes whose sizes the scheme selects, unless the user gives the sizes.
        by_hand: axes that have one rank unless a size is given.
        all_wide: whether to prefer grids with more axes of size > 1, even if other grids have less volume.
        orders: allowed values of ``kv_order``, the default first.
        forward: ring variant of the forward pass; None for the variant with less volume.
        backward: ring variant of the backward pass; None for the variant with less volume.
        note: addition to the error message for a size that does not fit.
    """

    axes: tuple[str, ...]
    by_hand: tuple[str, ...] = ()
    all_wide: bool = False
    orders: tuple[Order, ...] = ("native",)
    forward: RingVariant | None = "pass-kv"
    backward: RingVariant | None = "pass-kv"
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
        backward="pass-q",
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
    # TokenRing's paper is about inference and has no backward pass.
    "tokenring": Rule(axes=("ring_outer",), forward="pass-q", backward=None),
    "burst": Rule(axes=("ring_outer", "ring_inner"), all_wide=True, backward="pass-q"),
}
SCHEMES: tuple[str, ...] = tuple(RULES)
PLACEMENTS: Mapping[str, tuple[str, ...]] = {
    "teams-adjacent": TEAMS_ADJACENT,
    "rings-adjacent": RINGS_ADJACENT,
    "head-first": ("head", "ring_inner", "ring_outer", "team", "kv_team"),
    "ring-first": ("ring_inner", "ring_outer", "head", "team", "kv_team"),
}
#: ``auto`` with a choice by price.
_PRICED = replace(_OURS, axes=("team", "kv_team", "ring_outer"), by_hand=("head", "ring_inner"))
#: The option that sets each axis. The remaining axis, mostly ``ring_outer``, gets the remaining ranks.
_OPTIONS = {"head": "head_size", "team": "team_size", "kv_team": "kv_team_size", "ring_inner": "ring_inner_size"}

#: Least value of (tokens per rank)^2 x query heads for which heads are split in two groups: 16,384 tokens x 32 heads. A
#: ring step is then a call of 16,384 x 8,192 rows and columns. On an H200 half of its heads run at 95 % of the rate of
#: all heads (docs/gpu/h200-2026-11-27/tiles.csv). At 4,096 tokens it is 84 %. Two groups need twice as many calls.
SPLIT_WORK = 2**33


def make_plan(
    scheme: str,
    cp_size: int,
    *,
    head_size: int | None = None,
    team_size: int | None = None,
    kv_team_size: int | None = None,
    ring_inner_size: int | None = None,
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
    """Return the plan of a scheme.

    Axis sizes that are not given are chosen for the least communication volume of forward and backward together. If
    ``tokens`` and heads are given, ``auto`` selects sizes by estimated time instead
    (:mod:`megatron_wallfacer.schedule.price`). The inner ring size is as near to the square root of the ring size as
    possible. If heads are not given, any size of the head axis is allowed.

    Args:
        scheme: one of :data:`SCHEMES`.
        cp_size: P, the number of context-parallel ranks.
        head_size: U, number of ranks of the head axis. Some schemes fix this number.
        team_size: C, number of ranks in a team. Some schemes fix this number.
        kv_team_size: G, number of ranks that share keys and values. Some schemes fix this number.
        ring_inner_size: number of ranks of the inner ring. Some schemes fix this number.
        placement: one of :data:`PLACEMENTS`, or an order of the axes, fastest varying first. ``ring`` is short for
            ``ring_inner,ring_outer``. Axes of size 1 may be left out.
        kv_order: ``native``, ``paper`` or ``permuted``; by default ``paper`` with ``wallfacer``, else ``native``.
        forward: ring variant of the forward pass, ``pass-kv``, ``pass-q`` or ``auto``. ``auto`` selects the published
            variant, or the variant with less volume if the scheme has not been published.
        backward: ring variant of the backward pass, ``pass-kv``, ``pass-q`` or ``auto``.
        bidirectional: whether blocks are sent half way around the ring in each direction.
        head_groups: number of head groups. The default is 1 if the grid has neither a head axis nor a team, or if
            kernels would be too small with half of the heads (:data:`SPLIT_WORK`); else 2.
        q_heads: query heads per rank after tensor parallelism; required if ``kv_heads`` is given.
        kv_heads: key and value heads per rank after tensor parallelism; required if ``q_heads`` is given.
        kappa: kv heads / query heads, if heads are not given.
        tokens: tokens per rank. If tokens and heads are given, small attention calls are merged
            (:mod:`megatron_wallfacer.schedule.merging`).
        ranks_per_node: ranks of the context-parallel group in one node, for the estimated time.

    Raises:
        OptionError: The value of an option is not allowed. The message names option, value and allowed values.
    """
    if cp_size < 1:
        raise OptionError("cp_size", cp_size, "a positive number of ranks")
    if scheme not in RULES:
        raise OptionError("scheme", scheme, f"one of {', '.join(SCHEMES)}")
    if (q_heads is None) != (kv_heads is None):
        raise OptionError("kv_heads", kv_heads, "given if q_heads is given, and left out otherwise")
    heads = None if q_heads is None or kv_heads is None else (q_heads, kv_heads)
    priced = scheme == "auto" and heads and tokens and kv_order in (None, "native")
    rule = _PRICED if priced else RULES[scheme]
    kappa = heads[1] / heads[0] if heads else kappa
    given = {"head": head_size, "team": team_size, "kv_team": kv_team_size, "ring_inner": ring_inner_size}
    order = _order(scheme, rule, kv_order)
    variants = _ring_variants("forward", forward, rule.forward), _ring_variants("backward", backward, rule.backward)
    given = {axis: size for axis, size in given.items() if size is not None}
    grids = _open_grids(scheme, rule, cp_size, given, order)
    if heads and head_size is None:
        # If no grid divides the heads, check_heads below raises the error.
        grids = [grid for grid in grids if divides_heads(grid.head, *heads)] or grids
    name = "team-ring" if scheme == "auto" else scheme
    plans = [_with_cheapest_variants(Plan(grid, name, order), variants, kappa, heads) for grid in grids]
    by_volume = partial(_preference, rule, kappa=kappa, heads=heads)
    plan = cheapest(plans, tokens, *heads, ranks_per_node=ranks_per_node) if priced else min(plans, key=by_volume)
    if heads:
        check_heads(plan, *heads)
    return replace(
        plan,
        grid=_placed(plan.grid, placement),
        bidirectional=bidirectional,
        head_groups=_head_groups(plan.grid, tokens, q_heads) if head_groups is None else head_groups,
        shard_work=shard_work(tokens, q_heads) if tokens and q_heads else None,
    )


def total_volume(plan: Plan, kappa: float, *, kv_heads: int | None = None) -> float:
    """Return the volume that a rank receives in forward and backward, as a multiple of one query shard's elements."""
    return forward_volume(plan, kappa, kv_heads=kv_heads) + backward_volume(plan, kappa, kv_heads=kv_heads)


def _open_grids(scheme: str, rule: Rule, cp_size: int, given: Mapping[str, int], order: Order) -> list[Grid]:
    """Return the grids of a scheme that have the given sizes.

    Raises:
        OptionError: No grid has these sizes. The message lists the allowed sizes of one axis that does not fit.
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


def _with_cheapest_variants(
    plan: Plan, variants: Sequence[Sequence[RingVariant]], kappa: float, heads: tuple[int, int] | None
) -> Plan:
    """Select for each pass the ring variant with the least volume, and return the plan. Ties prefer pass-KV."""
    kv_heads = heads[1] if heads else None

    def forward_cost(variant: RingVariant) -> float:
        return _rounded(forward_volume(replace(plan, forward=variant), kappa, kv_heads=kv_heads))

    def backward_cost(variant: RingVariant) -> float:
        return _rounded(backward_volume(replace(plan, backward=variant), kappa, kv_heads=kv_heads))

    return replace(plan, forward=min(variants[0], key=forward_cost), backward=min(variants[1], key=backward_cost))


def _preference(rule: Rule, plan: Plan, *, kappa: float, heads: tuple[int, int] | None) -> tuple[float, ...]:
    """Return a sort key that prefers little volume, then a small team, then an inner ring near sqrt(R)."""
    grid = plan.grid
    wide = sum(grid.size_of(axis) > 1 for axis in rule.axes) if rule.all_wide else 0
    volume = _rounded(total_volume(plan, kappa, kv_heads=heads[1] if heads else None))
    return -wide, volume, grid.team, max(grid.ring_outer, grid.ring_inner), grid.ring_inner


def _rounded(volume: float) -> float:
    """Return a volume rounded to nine decimals, so that volumes that differ by rounding errors compare equal."""
    return round(volume, 9)


def _order(scheme: str, rule: Rule, kv_order: str | None) -> Order:
    if kv_order is None:
        return rule.orders[0]
    if kv_order not in rule.orders:
        raise OptionError("kv_order", kv_order, f"{_either(rule.orders)} with scheme {scheme}")
    return kv_order  # type: ignore[return-value]


def _ring_variants(option: str, given: str, published: RingVariant | None) -> Sequence[RingVariant]:
    if given not in ("auto", *RING_VARIANTS):
        raise OptionError(option, given, _either(("auto", *RING_VARIANTS)))
    if given != "auto":
        return (given,)  # type: ignore[return-value]
    return RING_VARIANTS if published is None else (published,)


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
    # Two head groups help with a head axis or a team, unless kernels for half of the heads are too small.
    if grid.head == 1 and grid.team == 1:
        return 1
    return 1 if tokens and q_heads and shard_work(tokens, q_heads) < SPLIT_WORK else 2
