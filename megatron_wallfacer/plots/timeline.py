"""Plot the timelines of ranks: all passes, and the pass with the longest exposed communication."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from megatron_wallfacer.engine.timeline import TimelineEvent, by_pass, is_transfer
from megatron_wallfacer.plots import GREY, INK, PALE, new_figure, save
from megatron_wallfacer.plots.palette import HUES, Colour, ramp
from megatron_wallfacer.traces.timelines import RankTimeline

#: Colours and labels of activities. A rank has one activity at a time.
ACTIVITY_COLOURS = {"compute": HUES[0], "copy": "#b4bac4", "wait": HUES[4]}
ACTIVITY_LABELS = {
    "compute": "attention kernel",
    "copy": "merge or copy",
    "wait": "exposed communication: waiting, nothing is computed",
}
TRANSFER_COLOURS = (HUES[1], HUES[2], HUES[3], HUES[5])
MAX_RANKS = 64
WIDTH, HEAD, FOOT, GAP = 13.0, 0.75, 1.25, 0.95  # inches
LEFT, RIGHT = 0.055, 0.985  # edges of the panels, as fractions of the figure width
ACTIVITY_HEIGHT = 0.44  # height of the activities, as a fraction of a rank's row; transfers are below them


def draw_timelines(timelines: Sequence[RankTimeline], path: Path, title: str) -> None:
    """Draw one row per rank, with activities in its upper part and transfers in its lower part, as PNG or SVG.

    Each timeline has at least one pass, and all are on one clock. Only the first :data:`MAX_RANKS` timelines are drawn.
    If timelines are left out, the title has the number of ranks. A missing folder is created.
    """
    shown = timelines[:MAX_RANKS]
    if len(shown) < len(timelines):
        title += f"; {len(shown)} of {len(timelines)} ranks, --ranks selects others"
    colours = _transfer_colours(shown)
    rows = len(shown) * min(0.5, max(0.11, 5.0 / len(shown)))
    height = HEAD + 2 * rows + GAP + FOOT
    figure = new_figure(WIDTH, height)
    figure.text(LEFT, 1 - 0.3 / height, title, fontsize=14, fontweight="bold", color=INK, va="center")
    worst, rank = _most_exposed(shown)
    events = [event for timeline in shown for event in timeline.events]
    everything = min(event.start for event in events), max(event.end for event in events)
    margin = 0.03 * (worst.end - worst.start)
    panels = (
        ("all passes", everything),
        (f"{worst.name} pass with the longest wait, on rank {rank}", (worst.start - margin, worst.end + margin)),
    )
    for number, (name, window) in enumerate(panels):
        bottom = FOOT + (1 - number) * (rows + GAP)
        axes = figure.add_axes((LEFT, bottom / height, RIGHT - LEFT, rows / height))
        _panel(axes, shown, colours, window)
        axes.set_title(name, loc="left", fontsize=10, color=INK, pad=6)
    handles = [Patch(color=colour, label=ACTIVITY_LABELS[row]) for row, colour in ACTIVITY_COLOURS.items()]
    handles += [Patch(color=colour, label=f"transfer: {row}") for row, colour in colours.items()]
    figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(LEFT - 0.005, 0.0), ncols=4, frameon=False, fontsize=9,
        labelcolor=INK, borderpad=0.3, handlelength=1.4,
    )  # fmt: skip
    save(figure, path)


def _transfer_colours(timelines: Sequence[RankTimeline]) -> dict[str, Colour | str]:
    channels = sorted({event.row for timeline in timelines for event in timeline.events if is_transfer(event)})
    few = len(channels) <= len(TRANSFER_COLOURS)
    return dict(zip(channels, TRANSFER_COLOURS if few else ramp(len(channels)), strict=False))


def _most_exposed(timelines: Sequence[RankTimeline]) -> tuple[TimelineEvent, int]:
    """Return the pass with the longest wait, and its rank."""
    waits = [
        (sum(event.end - event.start for event in inside if event.row == "wait"), -timeline.rank, attention_pass)
        for timeline in timelines
        for attention_pass, inside in by_pass(timeline.events)
    ]
    _, negative_rank, worst = max(waits, key=lambda wait: wait[:2])
    return worst, -negative_rank


def _panel(
    axes: Axes, timelines: Sequence[RankTimeline], colours: Mapping[str, Colour | str], window: tuple[float, float]
) -> None:
    """Draw the events in a window of time, in ms after the start of the window."""
    start, end = window
    height = (1 - ACTIVITY_HEIGHT - 0.12) / max(1, len(colours))
    for index, timeline in enumerate(timelines):
        visible = [event for event in timeline.events if event.end >= start and event.start <= end]
        spans = {row: [e for e in visible if e.row == row] for row in ("pass", *ACTIVITY_COLOURS, *colours)}
        top = index - 0.5 + 0.06
        axes.broken_barh(_ms(spans["pass"], start), (top, 0.88), facecolors=PALE)
        for row, colour in ACTIVITY_COLOURS.items():
            axes.broken_barh(_ms(spans[row], start), (top, ACTIVITY_HEIGHT), facecolors=colour)
        for number, (row, colour) in enumerate(colours.items()):
            below = top + ACTIVITY_HEIGHT + number * height
            axes.broken_barh(_ms(spans[row], start), (below, 0.8 * height), facecolors=colour)
    axes.set_xlim(0, 1e3 * (end - start))
    axes.set_ylim(len(timelines) - 0.5, -0.5)
    every = 1 + (len(timelines) - 1) // 24
    labels = [str(timeline.rank) for timeline in timelines[::every]]
    axes.set_yticks(range(0, len(timelines), every), labels)
    axes.set_ylabel("rank", fontsize=9, color=INK)
    axes.set_xlabel("ms", fontsize=9, color=INK, labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(length=0, pad=3, labelsize=8.5, labelcolor=GREY)


def _ms(events: Sequence[TimelineEvent], start: float) -> list[tuple[float, float]]:
    return [(1e3 * (event.start - start), 1e3 * (event.end - event.start)) for event in events]
