"""Loss curves of several runs that should coincide, and how far they do not."""

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
MARKS = 16  # on a curve, whatever its length
LEFT, WIDTH = 0.085, 0.885  # of the panels, in parts of the figure's width


def draw_losses(runs: Mapping[str, Sequence[float]], path: Path, title: str, *, tolerance: float = TOLERANCE) -> None:
    """Draw loss over iterations, and below it the relative difference to the first run.

    Args:
        runs: losses by iteration, by the name of the run; the others are compared with the first, as far as both go.
        path: the PNG to write; its folder is made.
        title: what was run.
        tolerance: relative difference to mark.

    Raises:
        ValueError: there is no run, or one without losses.
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
        apart = {name: differences(runs[reference], runs[name]) for name in others}
        _differences(below, apart, tolerance)
        _head(below, f"relative difference to {reference}")
        above.tick_params(labelbottom=False)
    figure.axes[-1].set_xlabel("iteration", fontsize=10.5, color=INK, labelpad=7)
    save(figure, path)


def _curves(axes: Axes, runs: Mapping[str, Sequence[float]]) -> None:
    """The first run broad and pale, the others dashed on top of it: what coincides is seen to."""
    reference, *others = runs
    pale = {"color": REFERENCE, "lw": 6} if others else {"color": INK, "lw": 2}
    axes.plot(_iterations(runs[reference]), runs[reference], label=reference, solid_capstyle="round", **pale)
    for index, name in enumerate(others):
        axes.plot(_iterations(runs[name]), runs[name], label=name, **_style(index, len(others), len(runs[name])))
    _head(axes, "loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02, y=0.08)
    axes.legend(loc="upper right", frameon=False, fontsize=10, labelcolor=INK, handlelength=3.2, labelspacing=0.6)
    _plain(axes)


def _differences(axes: Axes, apart: Mapping[str, Sequence[float]], tolerance: float) -> None:
    """Differences on a log scale; those that are exactly 0 lie on the floor, which is marked so."""
    seen = [value for values in apart.values() for value in values if 0 < value < inf]
    low, high = floor(log10(min([*seen, tolerance]))) - 1, floor(log10(max([*seen, tolerance]))) + 1
    lowest = 10.0**low
    for index, values in enumerate(apart.values()):
        raised = [lowest if value == 0 else value for value in values]
        # Dots without a line, which would fall to the floor and rise again wherever two runs agree to the last bit.
        marks = _style(index, len(apart), len(values)) | {"ls": "none", "ms": 4.5, "markevery": 1, "clip_on": False}
        axes.plot(_iterations(values), raised, **marks)
    axes.axhline(tolerance, color=INK, lw=1.1, ls=(0, (5, 3)), zorder=1)
    where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right", "va": "bottom"}
    axes.annotate(f"tolerance {_power(tolerance)}", (1.0, tolerance), (0, 3), fontsize=9, color=INK, **where)
    axes.set_yscale("log")
    axes.set_ylim(lowest / 1.8, 10.0**high)
    every = max(1, (high - low) // 5)
    decades = range(high, low, -every)
    axes.yaxis.set_major_locator(FixedLocator([lowest, *(10.0**decade for decade in decades)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value <= lowest else _power(value)))
    _plain(axes)


def _power(value: float) -> str:
    """1e-5, where Python has 1e-05."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _head(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10.5, color=INK, pad=9)


def _style(index: int, count: int, length: int) -> dict[str, object]:
    """Line of one run; the marks of different runs take turns, so that none hides another."""
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
