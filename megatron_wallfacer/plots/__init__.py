"""Pictures, drawn from the objects that the engine runs. The only floor that needs matplotlib, and this the only
place that looks for it: whoever imports a picture passes here first.

Figures are made without pyplot, so nothing global is changed and no window system is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_wallfacer.errors import WallfacerError

try:
    import matplotlib as _matplotlib  # noqa: F401  asked for here so that the answer is ours
except ImportError as error:
    raise WallfacerError("pictures need matplotlib, which is not installed: pip install matplotlib") from error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GREY, PALE = "#1f2430", "#6b7280", "#eef0f3"
"""Text and outlines; what matters less; backgrounds."""

DOTS_PER_INCH = 150


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, drawn by Agg."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, or as SVG where the file is called so; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg" if path.suffix == ".svg" else "png")
