"""Times of plans, as bars, each over its bound; and how the time of a layer grows with the cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from megatron_wallfacer.cli.pictures import GREY, INK, new_figure, save
from megatron_wallfacer.cli.pictures.palette import hues

_BAR = 0.62


class Timed(Protocol):
    """A plan with its time in seconds; None where it was not played."""

    name: str
    grid: str
    placement: tuple[str, ...]
    seconds: float | None
    bound_s: float


def draw_plans(path: Path, rows: Sequence[Timed], title: str) -> None:
    """Draw the times of one attention layer, fastest first, named schemes in another colour.

    Args:
        path: the PNG to write.
        rows: plans; those that were not played are left out.
        title: what for.
    """
    played = sorted((row for row in rows if row.seconds is not None), key=lambda row: row.seconds, reverse=True)
    figure = new_figure(11, 1.3 + 0.34 * len(played))
    axes = figure.add_axes((0.42, 0.6 / figure.get_figheight(), 0.54, 1 - 1.2 / figure.get_figheight()))
    ours, others = hues(2)
    for place, row in enumerate(played):
        axes.barh(place, 1e3 * row.seconds, _BAR, color=others if row.name else ours)
        axes.plot([1e3 * row.bound_s] * 2, [place - 0.45, place + 0.45], color=INK, linewidth=1.4)
    axes.set_yticks(range(len(played)), [_label(row) for row in played], fontsize=8.5, color=INK)
    axes.set_xlabel("ms for one attention layer, forward and backward; the stroke is the bound", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=12, color=INK, loc="left")
    save(figure, path)


def _label(row: Timed) -> str:
    order = f" ({', '.join(row.placement)})" if len(row.placement) > 1 else ""
    return f"{row.name}: {row.grid}" if row.name else f"{row.grid}{order}"


def draw_scaling(path: Path, series: Mapping[str, Sequence[tuple[int, float, float, str]]], title: str) -> None:
    """Draw the time of a layer over the size of the cluster, log-log, with the best grid at each point.

    Args:
        path: the PNG to write.
        series: by name, (ranks, seconds, seconds of kernels alone, grid).
        title: what grows with what.
    """
    figure = new_figure(13, 6.4)
    width = 0.9 / len(series)
    for place, ((name, points), colour) in enumerate(zip(series.items(), hues(len(series)), strict=True)):
        axes = figure.add_axes((0.07 + place * width, 0.11, width - 0.05, 0.75))
        ranks = [point[0] for point in points]
        axes.plot(ranks, [point[1] for point in points], "o-", color=colour)
        axes.plot(ranks, [point[2] for point in points], ":", color=INK)
        for number, (size, seconds, _, grid) in enumerate(points):
            # Beside the line, on the side where there is room.
            side = (
                {"xytext": (8, -12), "ha": "left"} if number < len(points) / 2 else {"xytext": (-8, 6), "ha": "right"}
            )
            axes.annotate(grid, (size, seconds), textcoords="offset points", fontsize=7.5, color=INK, **side)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(name, fontsize=11, color=INK)
        axes.set_xlabel("devices", color=INK)
        axes.grid(color=GREY, alpha=0.2)
        if place == 0:
            axes.set_ylabel("seconds of one layer, forward and backward (dotted: kernels alone)", color=INK)
    figure.text(0.07, 0.94, title, fontsize=13, color=INK)
    save(figure, path)
