"""Plots of timelines: rows, the panel of the longest wait, and the colour of exposed communication."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from matplotlib.colors import to_rgba

from megatron_wallfacer.plots import timeline
from megatron_wallfacer.traces.timelines import RankTimeline
from tests.plots.test_plots import check_png, check_texts
from tests.traces.recorded import RANKS, events


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    """Return the list of figures that the test saves."""
    figures, save = [], timeline.save
    monkeypatch.setattr(timeline, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


@pytest.mark.parametrize("ranks", [1, 4, 33, 80])
def test_ranks_are_drawn(tmp_path: Path, drawn: list, ranks: int) -> None:
    path = tmp_path / "made" / "line.png"
    timeline.draw_timelines(
        [RankTimeline(rank, events(rank % 4, 0.0)) for rank in range(ranks)], path, "attention of a run"
    )
    width, height = drawn[0].get_size_inches()
    check_png(path, round(150 * width), int(150 * height))
    check_texts(drawn[0])
    said = drawn[0].texts[0].get_text()
    assert said == "attention of a run" + ("; 64 of 80 ranks, --ranks selects others" if ranks == 80 else "")


def test_exposed_time_has_its_own_colour_and_the_longest_wait_a_panel(tmp_path: Path, drawn: list) -> None:
    timeline.draw_timelines(
        [RankTimeline(rank, events(rank, 0.0)) for rank in range(RANKS)], tmp_path / "line.png", "a run"
    )
    both, zoomed = drawn[0].axes
    assert zoomed.get_title(loc="left") == "forward pass with the longest wait, on rank 3"
    assert zoomed.get_xlim()[1] == pytest.approx(1060)
    exposed = to_rgba(timeline.ACTIVITY_COLOURS["wait"])
    marked = [boxes for boxes in both.collections if tuple(boxes.get_facecolor()[0]) == exposed]
    widths = [path.get_extents().width for boxes in marked for path in boxes.get_paths()]
    assert sorted(widths) == pytest.approx(sorted(100.0 * rank for rank, _ in product(range(RANKS), range(3))))
