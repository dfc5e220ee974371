"""The square of (query shard, key shard): which rank computes which pair, at which ring step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from megatron_wallfacer.cli.pictures import GREY, INK
from megatron_wallfacer.cli.pictures.palette import Colour, ink_on
from megatron_wallfacer.schedule.layout import block_chunks, shard_chunks
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import Step, forward_schedule

#: Above these cp sizes a number in each cell, and a label for each row, would not be read.
NUMBERED, LABELLED = 32, 16

Pair = tuple[int, int]


class Work(NamedTuple):
    """One rank's work on a pair at one ring step; ``area`` in chunk squares, a causal one being half."""

    rank: int
    step: int
    area: float


def who_computes(plan: Plan) -> dict[Pair, list[Work]]:
    """All work on each (query shard, key shard), collected from the tiles of every rank's forward schedule.

    A correct plan has one entry a pair, and the same area in each: the zig-zag layout's balance.
    """
    work: dict[Pair, list[Work]] = defaultdict(list)
    for rank in range(plan.grid.cp_size):
        for index, step in enumerate(forward_schedule(plan, rank).steps):
            for pair, area in _areas(step, plan.grid.cp_size).items():
                work[pair].append(Work(rank, index, area))
    return dict(work)


def square_of(plan: Plan) -> dict[Pair, Work]:
    """The work on each pair of the P x P square.

    Raises:
        ValueError, KeyError: a pair is computed twice, or not at all. Better no picture than a wrong one.
    """
    size, who = plan.grid.cp_size, who_computes(plan)
    square: dict[Pair, Work] = {}
    for pair in product(range(size), repeat=2):
        (square[pair],) = who[pair]
    return square


def draw_square(axes: Axes, square: Mapping[Pair, Work], colours: Sequence[Colour]) -> None:
    """Draw the pairs in the colours of their ranks, and an outline around those of rank 0."""
    size = len(colours)
    axes.imshow([[colours[square[q, k].rank] for k in range(size)] for q in range(size)])
    if size <= NUMBERED:
        _number(axes, square, colours)
    _rule(axes, size)
    _outline(axes, {pair for pair, work in square.items() if work.rank == 0})
    _label(axes, size)


def _areas(step: Step, cp_size: int) -> dict[Pair, float]:
    """Chunk squares computed in one step, by (query shard, key shard)."""
    owner = {chunk: rank for rank in range(cp_size) for chunk in shard_chunks(rank, cp_size)}
    q_owners = [owner[chunk] for chunk in block_chunks(step.q_ranks, cp_size)]
    k_owners = [owner[chunk] for chunk in block_chunks(step.kv_ranks, cp_size)]
    areas: dict[Pair, float] = defaultdict(float)
    for tile in step.tiles:
        for down, row in enumerate(range(*tile.rows)):
            for right, col in enumerate(range(*tile.cols)):
                if not tile.causal or right <= down:
                    areas[q_owners[row], k_owners[col]] += 0.5 if tile.causal and right == down else 1.0
    return areas


def _number(axes: Axes, square: Mapping[Pair, Work], colours: Sequence[Colour]) -> None:
    size = min(15.0, 190 / len(colours))
    for (q, k), work in square.items():
        ink = ink_on(colours[work.rank])
        axes.text(k, q, str(work.step), ha="center", va="center_baseline", color=ink, fontsize=size)


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
