"""One picture of a measurement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.config import Config
from benchmarks.measure import Result

_OURS, _PEER, _BOUND = "#3b6ea5", "#c08a3e", "#222222"


def draw_times(path: Path, config: Config, results: Sequence[Result]) -> None:
    """Medians as bars with their range, and each scheme's own bound as a mark."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ran = sorted((result for result in results if result.samples), key=lambda result: -result.median_s)
    if not ran:
        return
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.3 * len(ran)), layout="constrained")
    places = range(len(ran))
    colours = [_OURS if result.planned else _PEER for result in ran]
    axes.barh(places, [result.median_s for result in ran], color=colours, height=0.7)
    for place, result in zip(places, ran, strict=True):
        times = [sample.seconds for sample in result.samples]
        axes.plot([min(times), max(times)], [place, place], color=_BOUND, linewidth=1)
        axes.plot([result.bound_s] * 2, [place - 0.4, place + 0.4], color=_BOUND, linewidth=2)
    axes.set_yticks(places, [result.label for result in ran])
    axes.set_xlabel("seconds, forward + backward (blue: this project, ochre: peers; mark: max(compute, busiest link))")
    axes.set_title(f"{config.name}: {config.topology}, {config.compute.mode} compute", fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)
