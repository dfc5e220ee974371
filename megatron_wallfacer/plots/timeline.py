"""Time lines of ranks below each other: all there is, and the pass that waited longest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from megatron_wallfacer.engine.timeline import Event
from megatron_wallfacer.engine.totals import by_pass, is_move
from megatron_wallfacer.plots import GREY, INK, PALE, new_figure, save
from megatron_wallfacer.plots.palette import HUES, Colour, ramp

#: What a rank does, one thing at a time; exposed is what stands out.
DOES = {"compute": HUES[0], "copy": "#b4bac4", "wait": HUES[4]}
CALLED = {"compute": "computing", "copy": "merging, packing", "wait": "exposed: waiting, nothing computes"}
MOVES = (HUES[1], HUES[2], HUES[3], HUES[5])
MOST_RANKS = 64
WIDTH, HEAD, FOOT, GAP = 13.0, 0.75, 1.25, 0.95  # inches
LEFT, RIGHT = 0.055, 0.985  # of the panels, in parts of the width
LANE = 0.44  # of a rank's row is what it does, the rest what is on its way


class Line(Protocol):
    """What a rank did."""

    @property
    def rank(self) -> int:
        """Of the job."""

    @property
    def events(self) -> Sequence[Event]:
        """In seconds."""


def draw_trace(lines: Sequence[Line], path: Path, title: str) -> None:
    """Draw time lines, a row a rank: what it does above, what is on its way below.

    Args:
        lines: of ranks, on one clock, with passes; beyond :data:`MOST_RANKS` they are left out, and the title says so.
        path: the PNG or SVG to write; its folder is made.
        title: what was recorded.
    """
    shown = lines[:MOST_RANKS]
    if len(shown) < len(lines):
        title += f"; {len(shown)} of {len(lines)} ranks, --ranks chooses others"
    colours = _move_colours(shown)
    rows = len(shown) * min(0.5, max(0.11, 5.0 / len(shown)))
    height = HEAD + 2 * rows + GAP + FOOT
    figure = new_figure(WIDTH, height)
    figure.text(LEFT, 1 - 0.3 / height, title, fontsize=14, fontweight="bold", color=INK, va="center")
    worst, rank = _most_exposed(shown)
    everything = min(e.start for line in shown for e in line.events), max(e.end for line in shown for e in line.events)
    room = 0.03 * (worst.end - worst.start)
    panels = (
        ("all passes", everything),
        (f"the {worst.name} pass in which a rank waited longest: rank {rank}", (worst.start - room, worst.end + room)),
    )
    for number, (name, window) in enumerate(panels):
        bottom = FOOT + (1 - number) * (rows + GAP)
        axes = figure.add_axes((LEFT, bottom / height, RIGHT - LEFT, rows / height))
        _panel(axes, shown, colours, window)
        axes.set_title(name, loc="left", fontsize=10, color=INK, pad=6)
    handles = [Patch(color=DOES[row], label=CALLED[row]) for row in DOES]
    handles += [Patch(color=colour, label=f"on its way: {row}") for row, colour in colours.items()]
    figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(LEFT - 0.005, 0.0), ncols=4, frameon=False, fontsize=9,
        labelcolor=INK, borderpad=0.3, handlelength=1.4,
    )  # fmt: skip
    save(figure, path)


def _move_colours(lines: Sequence[Line]) -> dict[str, Colour | str]:
    channels = sorted({event.row for line in lines for event in line.events if is_move(event)})
    return dict(zip(channels, MOVES if len(channels) <= len(MOVES) else ramp(len(channels)), strict=False))


def _most_exposed(lines: Sequence[Line]) -> tuple[Event, int]:
    """The pass that waited longest, and its rank."""
    waited = [
        (sum(event.end - event.start for event in inside if event.row == "wait"), -line.rank, one)
        for line in lines
        for one, inside in by_pass(line.events)
    ]
    _, rank, worst = max(waited, key=lambda found: found[:2])
    return worst, -rank


def _panel(axes: Axes, lines: Sequence[Line], colours: Mapping[str, Colour | str], window: tuple[float, float]) -> None:
    """What happened in a window of time, in ms since its beginning."""
    start, end = window
    lane = (1 - LANE - 0.12) / max(1, len(colours))
    for place, line in enumerate(lines):
        seen = [event for event in line.events if event.end >= start and event.start <= end]
        spans = {row: [e for e in seen if e.row == row] for row in ("pass", *DOES, *colours)}
        axes.broken_barh(_ms(spans["pass"], start), (place - 0.5 + 0.06, 0.88), facecolors=PALE)
        for row, colour in DOES.items():
            axes.broken_barh(_ms(spans[row], start), (place - 0.5 + 0.06, LANE), facecolors=colour)
        for number, (row, colour) in enumerate(colours.items()):
            where = place - 0.5 + 0.06 + LANE + number * lane
            axes.broken_barh(_ms(spans[row], start), (where, 0.8 * lane), facecolors=colour)
    axes.set_xlim(0, 1e3 * (end - start))
    axes.set_ylim(len(lines) - 0.5, -0.5)
    every = 1 + (len(lines) - 1) // 24
    axes.set_yticks(range(0, len(lines), every), [str(line.rank) for line in lines[::every]])
    axes.set_ylabel("rank", fontsize=9, color=INK)
    axes.set_xlabel("ms", fontsize=9, color=INK, labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(length=0, pad=3, labelsize=8.5, labelcolor=GREY)


def _ms(events: Sequence[Event], start: float) -> list[tuple[float, float]]:
    return [(1e3 * (event.start - start), 1e3 * (event.end - event.start)) for event in events]
