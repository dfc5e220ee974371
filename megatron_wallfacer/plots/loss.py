"""Plot loss curves of several runs, and their differences from the first run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor, inf, log10
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from megatron_wallfacer.plots import GREY, INK, PALE, new_figure, save
from megatron_wallfacer.plots.palette import hues
from megatron_wallfacer.training_runs.loss_comparison import TOLERANCE, differences

REFERENCE = "#b4bac4"
MARKERS, DASHES = "os^Dv", ((0, (4, 2)), (2, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (3, (2, 2)))
MARKS = 16  # markers per curve
LEFT, WIDTH = 0.085, 0.885  # left edge and width of the panels, as fractions of the figure width


def draw_losses(runs: Mapping[str, Sequence[float]], path: Path, title: str, *, tolerance: float = TOLERANCE) -> None:
    """Draw loss over iterations in the upper panel, and relative differences from the first run in the lower panel.

    Two runs are compared up to the length of the shorter run. A line in the lower panel shows ``tolerance``. The file
    is PNG or SVG. A missing folder is created.

    Raises:
        ValueError: There is no run, or a run has no losses.
    """
    if not runs or not all(len(losses) for losses in runs.values()):
        raise ValueError(f"runs={list(runs)}: must be one or more, each with a loss for one iteration or more")
    reference, *others = runs
    figure = new_figure(11, 7.2)
    figure.text(LEFT, 0.945, title, fontsize=16, fontweight="bold", color=INK, va="center")
    bottom = 0.43 if others else 0.1
    above = figure.add_axes((LEFT, bottom, WIDTH, 0.85 - bottom))
    _curves(above, runs)
    if others:
        below = figure.add_axes((LEFT, 0.1, WIDTH, 0.24), sharex=above)
        _differences(below, {name: differences(runs[reference], runs[name]) for name in others}, tolerance)
        _heading(below, f"relative difference from {reference}")
        above.tick_params(labelbottom=False)
    figure.axes[-1].set_xlabel("iteration", fontsize=10.5, color=INK, labelpad=7)
    save(figure, path)


def _curves(axes: Axes, runs: Mapping[str, Sequence[float]]) -> None:
    """Draw the first run thick and pale, and the other runs dashed on top, so that equal curves are all visible."""
    reference, *others = runs
    pale = {"color": REFERENCE, "lw": 6} if others else {"color": INK, "lw": 2}
    axes.plot(_iterations(runs[reference]), runs[reference], label=reference, solid_capstyle="round", **pale)
    for index, name in enumerate(others):
        axes.plot(_iterations(runs[name]), runs[name], label=name, **_style(index, len(others), len(runs[name])))
    _heading(axes, "loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02, y=0.08)
    axes.legend(loc="upper right", frameon=False, fontsize=10, labelcolor=INK, handlelength=3.2, labelspacing=0.6)
    _plain(axes)


def _differences(axes: Axes, by_run: Mapping[str, Sequence[float]], tolerance: float) -> None:
    """Draw differences on a log scale. Differences of exactly 0 are drawn at the bottom, which has the label 0."""
    finite = [value for values in by_run.values() for value in values if 0 < value < inf]
    low, high = floor(log10(min([*finite, tolerance]))) - 1, floor(log10(max([*finite, tolerance]))) + 1
    lowest = 10.0**low
    for index, values in enumerate(by_run.values()):
        raised = [lowest if value == 0 else value for value in values]
        # Draw markers without a line, because a line would jump to the bottom if two runs agree to the last bit.
        marks = _style(index, len(by_run), len(values)) | {"ls": "none", "ms": 4.5, "markevery": 1, "clip_on": False}
        axes.plot(_iterations(values), raised, **marks)
    axes.axhline(tolerance, color=INK, lw=1.1, ls=(0, (5, 3)), zorder=1)
    position = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right", "va": "bottom"}
    axes.annotate(f"tolerance {_power(tolerance)}", (1.0, tolerance), (0, 3), fontsize=9, color=INK, **position)
    axes.set_yscale("log")
    axes.set_ylim(lowest / 1.8, 10.0**high)
    every = max(1, (high - low) // 5)
    decades = range(high, low, -every)
    axes.yaxis.set_major_locator(FixedLocator([lowest, *(10.0**decade for decade in decades)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value <= lowest else _power(value)))
    _plain(axes)


def _power(value: float) -> str:
    """Return a number as text without leading zeros in the exponent, for example ``1e-5``."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _heading(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10.5, color=INK, pad=9)


def _style(index: int, count: int, length: int) -> dict[str, object]:
    """Return the style of one run. Markers of different runs are staggered so that they do not overlap."""
    every = max(1, length // MARKS)
    return {
        "color": hues(count)[index],
        "lw": 1.7,
        "ls": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "ms": 5,
        "mec": "white",
        "mew": 0.6,
        "markevery": (index * every // count % every if every > 1 else 0, every),
        "zorder": 3 + index,
    }


def _iterations(losses: Sequence[float]) -> range:
    return range(1, len(losses) + 1)


def _plain(axes: Axes) -> None:
    axes.grid(axis="y", color=PALE, lw=1)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(length=0, pad=5, labelsize=9, labelcolor=GREY)
