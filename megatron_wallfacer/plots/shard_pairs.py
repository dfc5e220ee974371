"""The square of (query shard, key shard): which ranks compute which pair, at which visit of the ring."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.patheffects import withStroke

from megatron_wallfacer.plots import GREY, INK
from megatron_wallfacer.plots.palette import Colour, ink_on
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.ops import Attend, Schedule
from megatron_wallfacer.schedule.plan import Plan, Rider
from megatron_wallfacer.schedule.schedule import forward_schedule
from megatron_wallfacer.schedule.sides import ALL, OTHERS, OWN, visit_number

#: Above these cp sizes a number in each cell (on stripes, half of it), and a label for each row, would not be read.
NUMBERED, LABELLED = 32, 16

Pair = tuple[int, int]


class Work(NamedTuple):
    """One rank's work on a pair at one visit of the ring; ``area`` in chunk squares, a causal one being half."""

    rank: int
    visit: int
    area: float


def who_computes(plan: Plan) -> dict[Pair, list[Work]]:
    """All work on each (query shard, key shard), collected from the tiles of every rank's forward schedule.

    A correct plan has one entry a pair for each rank of the head axis, and the same area in each: the zig-zag layout's
    balance.
    """
    work: dict[Pair, list[Work]] = defaultdict(list)
    for rank in range(plan.grid.cp_size):
        schedule = forward_schedule(plan, rank)
        areas: Counter[tuple[int, Pair]] = Counter()
        for attend in schedule.attends:
            visit = visit_of(attend, plan.forward)
            for pair, area in _areas(schedule, attend).items():
                areas[visit, pair] += area
        for (visit, pair), area in areas.items():
            work[pair].append(Work(rank, visit, area))
    return dict(work)


def visit_of(attend: Attend, rider: Rider) -> int:
    """The visit whose block some tiles read; what the rank gathered itself belongs to the first, number 0."""
    name = (attend.kv if rider == "kv" else attend.q)[0]
    whose = name.split(".", 1)[0]
    return 0 if whose in (OWN, OTHERS, ALL) else visit_number(whose)


def square_of(plan: Plan) -> dict[Pair, tuple[Work, ...]]:
    """The work on each pair of the P x P square: for each part of the heads one rank's, in the order of the parts.

    Raises:
        ValueError, KeyError: a pair is computed twice for the same heads, or not at all. Better no picture than a
            wrong one.
    """
    size, who = plan.grid.cp_size, who_computes(plan)
    square: dict[Pair, tuple[Work, ...]] = {}
    for pair in product(range(size), repeat=2):
        by_part = {plan.grid.coordinates(work.rank)["head"]: work for work in who[pair]}
        if len(who[pair]) != len(by_part) or len(by_part) != plan.grid.head:
            raise ValueError(f"{pair} is computed by ranks {[work.rank for work in who[pair]]}")
        square[pair] = tuple(by_part[part] for part in range(plan.grid.head))
    return square


def is_numbered(square: Mapping[Pair, Sequence[Work]], cp_size: int) -> bool:
    """Whether the visits are written into the cells: there are several, and the cells are large enough."""
    striped = len(square[0, 0]) > 1
    return cp_size <= (NUMBERED // 2 if striped else NUMBERED) and any(
        work.visit for works in square.values() for work in works
    )


def draw_square(axes: Axes, square: Mapping[Pair, Sequence[Work]], colours: Sequence[Colour]) -> None:
    """Draw the pairs in the colours of their ranks, and an outline around those of rank 0.

    Where several ranks have different heads of a pair, each has a stripe of it.
    """
    size = len(colours)
    rows = [[colours[work.rank] for k in range(size) for work in square[q, k]] for q in range(size)]
    axes.imshow(rows, extent=(-0.5, size - 0.5, size - 0.5, -0.5), interpolation="nearest")
    if is_numbered(square, size):
        _number(axes, square, colours)
    _rule(axes, size)
    _outline(axes, {pair for pair, works in square.items() if any(work.rank == 0 for work in works)})
    _label(axes, size)


def _areas(schedule: Schedule, attend: Attend) -> dict[Pair, float]:
    """Chunk squares computed by some tiles, by (query shard, key shard)."""
    owner = {chunk: rank for rank in range(schedule.cp_size) for chunk in shard_chunks(rank, schedule.cp_size)}
    q_owners, k_owners = (
        [owner[chunk] for chunk in schedule.values[names[0]].chunks] for names in (attend.q, attend.kv)
    )
    areas: dict[Pair, float] = defaultdict(float)
    for tile in attend.tiles:
        for down, row in enumerate(range(*tile.rows)):
            for right, col in enumerate(range(*tile.cols)):
                if not tile.causal or right <= down:
                    areas[q_owners[row], k_owners[col]] += 0.5 if tile.causal and right == down else 1.0
    return areas


def _number(axes: Axes, square: Mapping[Pair, Sequence[Work]], colours: Sequence[Colour]) -> None:
    size = min(15.0, 190 / len(colours))
    for (q, k), works in square.items():
        visits = sorted({work.visit for work in works})
        ink = ink_on(colours[works[0].rank]) if len(works) == 1 else INK
        # On stripes of several colours a number needs an edge of its own.
        edge = [] if len(works) == 1 else [withStroke(linewidth=0.22 * size, foreground="white")]
        number = ",".join(map(str, visits))
        style = {"ha": "center", "va": "center_baseline", "color": ink, "fontsize": size, "path_effects": edge}
        axes.text(k, q, number, **style)


def _rule(axes: Axes, size: int) -> None:
    """White lines between the cells."""
    between = [index - 0.5 for index in range(1, size)]
    width = min(1.5, 24 / size)
    axes.hlines(between, -0.5, size - 0.5, color="white", lw=width)
    axes.vlines(between, -0.5, size - 0.5, color="white", lw=width)


def _outline(axes: Axes, cells: set[Pair]) -> None:
    edges = []
    for q, k in cells:
        left, right, top, bottom = k - 0.5, k + 0.5, q - 0.5, q + 0.5
        sides = {
            (q, k - 1): [(left, top), (left, bottom)],
            (q, k + 1): [(right, top), (right, bottom)],
            (q - 1, k): [(left, top), (right, top)],
            (q + 1, k): [(left, bottom), (right, bottom)],
        }
        edges += [edge for neighbour, edge in sides.items() if neighbour not in cells]
    axes.add_collection(LineCollection(edges, colors=INK, lw=2.2, capstyle="projecting", clip_on=False))


def _label(axes: Axes, size: int) -> None:
    every = max(1, size // LABELLED)
    axes.set_xticks(range(0, size, every))
    axes.set_yticks(range(0, size, every))
    axes.tick_params(length=0, pad=5, labelsize=9, labelcolor=GREY, top=False, labeltop=True, labelbottom=False)
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("keys and values of rank", fontsize=10.5, color=INK, labelpad=8)
    axes.set_ylabel("queries of rank", fontsize=10.5, color=INK, labelpad=8)
    axes.spines[:].set_visible(False)
