"""Times of plans, as bars, each over its bound."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_wallfacer.plots import INK, new_figure, save
from megatron_wallfacer.plots.palette import hues

_BAR = 0.62


class Timed(Protocol):
    """A plan with its time in seconds; None where it was not simulated."""

    name: str
    grid: str
    placement: tuple[str, ...]
    seconds: float | None
    bound_s: float


def draw_plans(path: Path, rows: Sequence[Timed], title: str) -> None:
    """Draw the times of one attention layer, fastest first, named schemes in another colour.

    Args:
        path: the PNG to write.
        rows: plans; those that were not simulated are left out.
        title: what for.
    """
    simulated = sorted((row for row in rows if row.seconds is not None), key=lambda row: row.seconds, reverse=True)
    figure = new_figure(11, 1.3 + 0.34 * len(simulated))
    axes = figure.add_axes((0.42, 0.6 / figure.get_figheight(), 0.54, 1 - 1.2 / figure.get_figheight()))
    ours, others = hues(2)
    for place, row in enumerate(simulated):
        axes.barh(place, 1e3 * row.seconds, _BAR, color=others if row.name else ours)
        axes.plot([1e3 * row.bound_s] * 2, [place - 0.45, place + 0.45], color=INK, linewidth=1.4)
    axes.set_yticks(range(len(simulated)), [_label(row) for row in simulated], fontsize=8.5, color=INK)
    axes.set_xlabel("ms for one attention layer, forward and backward; the stroke is the bound", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=12, color=INK, loc="left")
    save(figure, path)


def _label(row: Timed) -> str:
    order = f" ({', '.join(row.placement)})" if len(row.placement) > 1 else ""
    return f"{row.name}: {row.grid}" if row.name else f"{row.grid}{order}"
