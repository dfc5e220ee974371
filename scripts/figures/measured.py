"""The picture of the README: measured times of one attention layer on the emulated cluster."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[2] / "docs" / "data" / "emulated-2026-11-20.csv"
SETTING = "c-4x4"
#: Schemes that are drawn, by label: the name in the picture, and whose it is.
SCHEMES = {
    "u2-i2-c2-o2": ("head 2 x inner ring 2 x team 2 x ring 2", "this project"),
    "double-ring-1": ("double ring 4 x 4", "this project"),
    "usp-4": ("USP, yunchang: head 4 x ring 4", "peer"),
    "wallfacer-2-x": ("the paper's scheme, C = 2", "this project"),
    "rfa-zigzag": ("ring-flash-attention: zig-zag ring of 16", "peer"),
    "ring": ("ring of 16", "this project"),
}
COLOURS = {"this project": "#3b6ea5", "peer": "#c08a3e"}


def draw_measured(path: Path) -> None:
    """Draw medians as bars with their range, and the lower bound of each scheme as a mark."""
    with RESULTS.open(newline="") as file:
        rows = {row["scheme"]: row for row in csv.DictReader(file) if row["setting"] == SETTING}
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    for place, (scheme, (_, whose)) in enumerate(reversed(SCHEMES.items())):
        row = {name: float(rows[scheme][name]) for name in ("median_s", "min_s", "max_s", "bound_s")}
        axes.barh(place, row["median_s"], height=0.7, color=COLOURS[whose])
        axes.plot([row["min_s"], row["max_s"]], [place, place], color="#222222", linewidth=1)
        axes.plot([row["bound_s"]] * 2, [place - 0.4, place + 0.4], color="#222222", linewidth=2)
        axes.text(row["max_s"] + 0.08, place, f"{row['median_s']:.2f} s", va="center", fontsize=9)
    axes.set_yticks(range(len(SCHEMES)), [label for label, _ in reversed(SCHEMES.values())], fontsize=9)
    legend = "blue: this project, ochre: peers; mark: lower bound of the scheme"
    axes.set_xlabel(f"seconds, forward + backward ({legend})", fontsize=9)
    axes.set_xlim(0, 9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=140)
