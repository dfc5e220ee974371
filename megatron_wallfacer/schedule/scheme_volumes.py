"""Communication volume of every scheme, computed from its schedules and compared with lower bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.formulas import backward_volume, busiest_rank, forward_volume
from megatron_wallfacer.schedule.grid import Grid, factorisations
from megatron_wallfacer.schedule.heads import divides_heads
from megatron_wallfacer.schedule.plan import RING_VARIANTS, Plan
from megatron_wallfacer.schedule.schedule import Schedule, backward_schedule, forward_schedule
from megatron_wallfacer.schedule.schemes import SCHEMES, make_plan
from megatron_wallfacer.schedule.volume import Shape, received_elements
from megatron_wallfacer.schedule.volume_bounds import backward_bound, forward_bound, ratio

#: Names of schemes that have a grid of their own; ``auto`` selects one of them. Axis sizes have the least volume.
NAMED = tuple(name for name in SCHEMES if name != "auto")
#: Searches for the best grid by name: pass to minimise first, pass to minimise second, axes. A double ring is omitted,
#: because it has the same volume as a ring.
_WITHOUT_HEAD, _WITH_HEAD = ("team", "kv_team", "ring_outer"), ("head", "team", "kv_team", "ring_outer")
BEST = {
    "best-forward": (forward_volume, backward_volume, _WITHOUT_HEAD),
    "best-backward": (backward_volume, forward_volume, _WITHOUT_HEAD),
    "best-forward-head": (forward_volume, backward_volume, _WITH_HEAD),
    "best-backward-head": (backward_volume, forward_volume, _WITH_HEAD),
}
DOES_NOT_FIT = "heads do not divide"

Formula = Callable[..., float]


@dataclass(frozen=True)
class SchemeVolume:
    """Elements that the busiest rank receives for one layer, in units of one query shard.

    Attributes:
        group: query heads per kv head.
        scheme: name of a scheme, or key of :data:`BEST`.
        grid: axis sizes. If no grid fits, the grid is :data:`DOES_NOT_FIT`, and all volumes and ratios are None.
        forward: volume of the forward pass.
        forward_ratio: ``forward`` divided by the lower bound.
        forward_whole: ``forward`` divided by the lower bound for schemes in which a shard is never split.
        backward: volume of the backward pass.
        backward_ratio: ``backward`` divided by the lower bound.
        backward_whole: ``backward`` divided by the lower bound for schemes in which a shard is never split.
    """

    cp_size: int
    group: int
    scheme: str
    grid: str
    forward: float | None = None
    forward_ratio: float | None = None
    forward_whole: float | None = None
    backward: float | None = None
    backward_ratio: float | None = None
    backward_whole: float | None = None


def scheme_volumes(sizes: Iterable[int], groups: Sequence[int], q_heads: int) -> Iterator[SchemeVolume]:
    """Return the volumes of every scheme and of the best grids, for each pair of a size and a group.

    Args:
        sizes: context-parallel sizes.
        groups: numbers of query heads per kv head.
        q_heads: number of query heads.

    Raises:
        OptionError: A size is not positive, or an element of ``groups`` does not divide ``q_heads``.
    """
    sizes = tuple(sizes)
    for cp_size in sizes:
        if cp_size < 1:
            raise OptionError("cp_size", cp_size, "a positive number of ranks")
    for group in groups:
        if q_heads < 1 or group < 1 or q_heads % group:
            raise OptionError("group", group, f"a divisor of {q_heads} query heads")
    return _volumes(sizes, groups, q_heads)


def named_plan(scheme: str, cp_size: int, shape: Shape) -> Plan | None:
    """Return the plan of a scheme; None if the head axis of the scheme does not divide the heads.

    Raises:
        OptionError: The size is not positive.
    """
    try:
        return make_plan(scheme, cp_size, q_heads=shape.q_heads, kv_heads=shape.kv_heads)
    except OptionError as error:
        if error.option != "head_size":
            raise
        return None


def _volumes(sizes: Sequence[int], groups: Sequence[int], q_heads: int) -> Iterator[SchemeVolume]:
    """Yield the volume of each scheme as soon as it is known, because large sizes take seconds."""
    for cp_size, group in product(sizes, groups):
        shape = Shape(tokens=2, q_heads=q_heads, kv_heads=q_heads // group, head_dim=1)
        for scheme in NAMED:
            yield _volume(scheme, named_plan(scheme, cp_size, shape), cp_size, shape)
        for name, (first, second, axes) in BEST.items():
            yield _volume(name, _best(cp_size, shape, axes, first, second), cp_size, shape)


def _best(cp_size: int, shape: Shape, axes: Sequence[str], first: Formula, second: Formula) -> Plan:
    def key(plan: Plan) -> tuple[float, ...]:
        volumes = (formula(plan, shape.kappa, kv_heads=shape.kv_heads) for formula in (first, second))
        return *(round(volume, 9) for volume in volumes), plan.grid.kv_team, plan.grid.team

    return min(_all_plans(cp_size, shape, axes), key=key)


def _all_plans(cp_size: int, shape: Shape, axes: Sequence[str]) -> Iterator[Plan]:
    for sizes in factorisations(cp_size, axes):
        grid = Grid(**sizes)
        if not divides_heads(grid.head, shape.q_heads, shape.kv_heads):
            continue
        for forward, backward in product(RING_VARIANTS, repeat=2):
            yield Plan(grid, forward=forward, backward=backward)


def _volume(name: str, plan: Plan | None, cp_size: int, shape: Shape) -> SchemeVolume:
    group = shape.q_heads // shape.kv_heads
    if plan is None:
        return SchemeVolume(cp_size, group, name, DOES_NOT_FIT)
    forward, backward = (
        received_elements(schedule, shape) / shape.unit
        for schedule in _schedules(replace(plan, scheme="", head_groups=1))
    )
    return SchemeVolume(
        cp_size=cp_size,
        group=group,
        scheme=name,
        grid=str(plan.grid),
        forward=forward,
        forward_ratio=ratio(forward, forward_bound(cp_size, shape.kappa)),
        forward_whole=ratio(forward, forward_bound(cp_size, shape.kappa, whole=True)),
        backward=backward,
        backward_ratio=ratio(backward, backward_bound(cp_size, shape.kappa)),
        backward_whole=ratio(backward, backward_bound(cp_size, shape.kappa, whole=True)),
    )


@cache
def _schedules(plan: Plan) -> tuple[Schedule, Schedule]:
    """Return the forward and the backward schedule of the busiest rank. Schedules do not depend on numbers of heads."""
    rank = busiest_rank(plan)
    return forward_schedule(plan, rank), backward_schedule(plan, rank)
