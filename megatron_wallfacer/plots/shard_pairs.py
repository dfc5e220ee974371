"""Draw the matrix of pairs (query shard, key shard) with the rank that computes each pair and the ring step."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.patheffects import withStroke

from megatron_wallfacer.plots import GREY, INK
from megatron_wallfacer.plots.palette import Colour, text_colour_on
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.ops import Attend, Schedule
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import forward_schedule

#: Largest cp size with numbers in cells (half of this size with stripes), and largest cp size with a label per row.
MAX_NUMBERED, MAX_LABELLED = 32, 16

Pair = tuple[int, int]


class PairWork(NamedTuple):
    """Work of one rank on a pair of shards in one ring step. Ring steps count from 0.

    ``area`` is the number of computed chunk pairs, with 0.5 for a causal chunk pair.
    """

    rank: int
    ring_step: int
    area: float


def work_by_pair(plan: Plan) -> dict[Pair, list[PairWork]]:
    """Return the work on each pair (query shard, key shard), derived from the tiles of the forward schedules.

    In a correct plan each pair of shards is computed by one rank for each part of the heads. With zig-zag chunks all
    pairs of shards have equal work.
    """
    work: dict[Pair, list[PairWork]] = defaultdict(list)
    ring_operand = plan.ring_operand(backward=False)
    for rank in range(plan.grid.cp_size):
        schedule = forward_schedule(plan, rank)
        areas: Counter[tuple[int, Pair]] = Counter()
        for attend in schedule.attends:
            # Tiles of local and gathered rows belong to ring step 0.
            rows = schedule.values[(attend.kv if ring_operand == "kv" else attend.q)[0]].rows
            for pair, area in _areas(schedule, attend).items():
                areas[rows.step, pair] += area
        for (ring_step, pair), area in areas.items():
            work[pair].append(PairWork(rank, ring_step, area))
    return dict(work)


def pairs_of(plan: Plan) -> dict[Pair, tuple[PairWork, ...]]:
    """Return, for each pair (query shard, key shard), the work of each head slice.

    Raises:
        ValueError: A pair is computed twice for the same heads, which a plot could not show.
        KeyError: A pair is not computed.
    """
    size, work = plan.grid.cp_size, work_by_pair(plan)
    pairs: dict[Pair, tuple[PairWork, ...]] = {}
    for pair in product(range(size), repeat=2):
        by_slice = {plan.grid.coordinates(entry.rank)["head"]: entry for entry in work[pair]}
        if len(work[pair]) != len(by_slice) or len(by_slice) != plan.grid.head:
            raise ValueError(f"{pair} is computed by ranks {[entry.rank for entry in work[pair]]}")
        pairs[pair] = tuple(by_slice[index] for index in range(plan.grid.head))
    return pairs


def has_numbers(pairs: Mapping[Pair, Sequence[PairWork]], cp_size: int) -> bool:
    """Return whether the plot shows ring steps as numbers. The grid must be small, and have several ring steps."""
    has_stripes = len(pairs[0, 0]) > 1
    return cp_size <= (MAX_NUMBERED // 2 if has_stripes else MAX_NUMBERED) and any(
        entry.ring_step for work in pairs.values() for entry in work
    )


def draw_pairs(axes: Axes, pairs: Mapping[Pair, Sequence[PairWork]], colours: Sequence[Colour]) -> None:
    """Draw each pair in the colour of its rank, and an outline around the pairs of rank 0.

    If the heads are divided over several ranks, each pair is drawn with one stripe per rank.
    """
    size = len(colours)
    rows = [[colours[entry.rank] for k in range(size) for entry in pairs[q, k]] for q in range(size)]
    axes.imshow(rows, extent=(-0.5, size - 0.5, size - 0.5, -0.5), interpolation="nearest")
    if has_numbers(pairs, size):
        _draw_numbers(axes, pairs, colours)
    _draw_lines(axes, size)
    _draw_outline(axes, {pair for pair, work in pairs.items() if any(entry.rank == 0 for entry in work)})
    _draw_labels(axes, size)


def _areas(schedule: Schedule, attend: Attend) -> dict[Pair, float]:
    """Return the number of chunk pairs that a group of tiles computes, by (query shard, key shard)."""
    owner = {chunk: rank for rank in range(schedule.cp_size) for chunk in shard_chunks(rank, schedule.cp_size)}
    q_owners, k_owners = (
        [owner[chunk] for chunk in schedule.values[names[0]].chunks] for names in (attend.q, attend.kv)
    )
    areas: dict[Pair, float] = defaultdict(float)
    for tile in attend.tiles:
        rows, cols = enumerate(range(*tile.rows)), enumerate(range(*tile.cols))
        for (row_index, row), (col_index, col) in product(rows, cols):
            if not tile.causal or col_index <= row_index:
                is_diagonal = tile.causal and col_index == row_index
                areas[q_owners[row], k_owners[col]] += 0.5 if is_diagonal else 1.0
    return areas


def _draw_numbers(axes: Axes, pairs: Mapping[Pair, Sequence[PairWork]], colours: Sequence[Colour]) -> None:
    size = min(15.0, 190 / len(colours))
    for (q, k), work in pairs.items():
        ring_steps = sorted({entry.ring_step for entry in work})
        colour = text_colour_on(colours[work[0].rank]) if len(work) == 1 else INK
        # On stripes of several colours a number needs a white edge.
        edge = [] if len(work) == 1 else [withStroke(linewidth=0.22 * size, foreground="white")]
        style = {"ha": "center", "va": "center_baseline", "color": colour, "fontsize": size, "path_effects": edge}
        axes.text(k, q, ",".join(map(str, ring_steps)), **style)


def _draw_lines(axes: Axes, size: int) -> None:
    between = [index - 0.5 for index in range(1, size)]
    width = min(1.5, 24 / size)
    axes.hlines(between, -0.5, size - 0.5, color="white", lw=width)
    axes.vlines(between, -0.5, size - 0.5, color="white", lw=width)


def _draw_outline(axes: Axes, cells: set[Pair]) -> None:
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


def _draw_labels(axes: Axes, size: int) -> None:
    every = max(1, size // MAX_LABELLED)
    axes.set_xticks(range(0, size, every))
    axes.set_yticks(range(0, size, every))
    axes.tick_params(length=0, pad=5, labelsize=9, labelcolor=GREY, top=False, labeltop=True, labelbottom=False)
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("keys and values of rank", fontsize=10.5, color=INK, labelpad=8)
    axes.set_ylabel("queries of rank", fontsize=10.5, color=INK, labelpad=8)
    axes.spines[:].set_visible(False)
