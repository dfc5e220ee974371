"""Draw plots of grids, timelines, losses and plans. Only this package imports matplotlib.

Figures are created without pyplot, so they change no global state and need no window system.
"""

from __future__ import annotations

from pathlib import Path

from megatron_wallfacer.errors import WallfacerError

try:
    import matplotlib.figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg
except ImportError as error:
    raise WallfacerError("plots need matplotlib, which is not installed: pip install matplotlib") from error

INK, GREY, PALE = "#1f2430", "#6b7280", "#eef0f3"
"""Colour of text and outlines, colour of secondary text, and colour of backgrounds."""

DOTS_PER_INCH = 150


def new_figure(width: float, height: float) -> matplotlib.figure.Figure:
    """Return an empty figure with width and height in inches."""
    figure = matplotlib.figure.Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: matplotlib.figure.Figure, path: Path) -> None:
    """Write a figure, as SVG if the suffix of the file is ``.svg``, else as PNG. The function creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg" if path.suffix == ".svg" else "png")
