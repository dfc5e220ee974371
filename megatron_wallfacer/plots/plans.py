"""Plot predicted times of plans as bars with lower bounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_wallfacer.planning.grid_table import GridRow
from megatron_wallfacer.plots import INK, new_figure, save
from megatron_wallfacer.plots.palette import hues

_BAR = 0.62


def draw_plans(path: Path, rows: Sequence[GridRow], title: str) -> None:
    """Draw the times of one attention layer, fastest first, with named schemes in another colour.

    Plans without a time are not drawn. The file is PNG or SVG. A missing folder is created.
    """
    simulated = sorted((row for row in rows if row.seconds is not None), key=lambda row: row.seconds, reverse=True)
    figure = new_figure(11, 1.3 + 0.34 * len(simulated))
    axes = figure.add_axes((0.42, 0.6 / figure.get_figheight(), 0.54, 1 - 1.2 / figure.get_figheight()))
    searched, named = hues(2)
    for position, row in enumerate(simulated):
        axes.barh(position, 1e3 * row.seconds, _BAR, color=named if row.name else searched)
        axes.plot([1e3 * row.bound_s] * 2, [position - 0.45, position + 0.45], color=INK, linewidth=1.4)
    axes.set_yticks(range(len(simulated)), [_label(row) for row in simulated], fontsize=8.5, color=INK)
    axes.set_xlabel("predicted ms of one attention layer, forward and backward (line: lower bound)", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=12, color=INK, loc="left")
    save(figure, path)


def _label(row: GridRow) -> str:
    order = f" ({', '.join(row.placement)})" if len(row.placement) > 1 else ""
    return f"{row.name}: {row.grid}" if row.name else f"{row.grid}{order}"
