"""Pictures: the data behind them is right, they are PNGs, and no text leaves the page or lies on another."""

import importlib
import struct
import sys
from collections import Counter
from itertools import combinations, pairwise, product
from math import dist, inf, nan

import pytest

from megatron_wallfacer.cli.pictures import grid, loss
from megatron_wallfacer.cli.pictures.square import who_computes
from megatron_wallfacer.cli.pictures.wheels import NODE, permutation, place, rings
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.schedule.schedule import forward_schedule
from megatron_wallfacer.schedule.schemes import make_plan

PLANS = {
    "one rank": make_plan("ring", 1),
    "ring 5": make_plan("ring", 5),
    "ring 16": make_plan("ring", 16),
    "all-gather 6": make_plan("all-gather", 6),
    "team-ring 8": make_plan("team-ring", 8, team_size=2),
    "team-ring 12": make_plan("team-ring", 12, team_size=3, placement="rings-adjacent"),
    "team x kv_team": make_plan("team-ring", 8, team_size=4, kv_team_size=2),
    "team x kv_team x ring": make_plan("team-ring", 8, team_size=2, kv_team_size=2),
    "wallfacer 4": make_plan("wallfacer", 4, team_size=2),
    "wallfacer 8": make_plan("wallfacer", 8, team_size=2),
    "wallfacer 16": make_plan("wallfacer", 16, team_size=2, placement="rings-adjacent"),
    "wallfacer 9": make_plan("wallfacer", 9, team_size=3),
    "wallfacer 64": make_plan("wallfacer", 64, team_size=4),
}

all_plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def check_png(path, width, height):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    assert struct.unpack(">II", data[16:24]) == (width, height)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved meanwhile."""
    figures = []
    for module in (grid, loss):
        save = module.save
        monkeypatch.setattr(
            module, "save", lambda figure, path, save=save: (figures.append(figure), save(figure, path))
        )
    return figures


def check_texts(figure):
    """Every text is on the page, and none lies on another."""
    from matplotlib.text import Text

    texts = {text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()}
    # Matplotlib keeps ticks beyond the limits, and does not draw them.
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            if not low <= tick.get_loc() <= high:
                texts -= {tick.label1, tick.label2}
    boxes = {text: text.get_window_extent() for text in texts}
    for text, box in boxes.items():
        assert figure.bbox.x0 <= box.x0, text
        assert box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0, text
        assert box.y1 <= figure.bbox.y1, text
    for (one, box), (other, other_box) in combinations(boxes.items(), 2):
        across = min(box.x1, other_box.x1) - max(box.x0, other_box.x0)
        along = min(box.y1, other_box.y1) - max(box.y0, other_box.y0)
        assert across <= 0.5 or along <= 0.5, (one, other)  # in dots


@all_plans
def test_the_square_is_covered_once_and_evenly(plan):
    size = plan.grid.cp_size
    who = who_computes(plan)
    assert set(who) == set(product(range(size), repeat=2))
    assert {len(work) for work in who.values()} == {1}
    # Zig-zag: half of a shard's 2 x 2 chunk squares are live, whichever two shards meet.
    assert {work.area for (work,) in who.values()} == {2.0}
    assert Counter(work.rank for (work,) in who.values()) == dict.fromkeys(range(size), size)
    steps = Counter((work.rank, work.step) for (work,) in who.values())
    assert set(steps.values()) == {size // plan.grid.ring}


@all_plans
def test_rings_follow_the_hops(plan):
    schedules = [forward_schedule(plan, rank) for rank in range(plan.grid.cp_size)]
    found = rings(schedules)
    assert sorted(rank for ring in found for rank in ring) == list(range(plan.grid.cp_size))
    assert {len(ring) for ring in found} == {plan.grid.ring}
    for ring in found:
        for rank, after in pairwise((*ring, ring[0]) if len(ring) > 1 else ring):
            assert schedules[rank].steps[0].hop.send_to == after


@all_plans
def test_ranks_do_not_touch(plan):
    places = place(plan.grid).places
    assert all(dist(one, other) > 2 * NODE for one, other in combinations(places, 2))


def test_only_the_published_scheme_jumps():
    jumps = {
        name: bool(permutation(forward_schedule(plan, 1))) for name, plan in PLANS.items() if plan.grid.cp_size > 1
    }
    assert jumps == {name: name.startswith("wallfacer") for name in jumps}


@all_plans
def test_grid_is_drawn(plan, tmp_path, drawn):
    path = tmp_path / "made" / "grid.png"
    grid.draw_grid(plan, path)
    check_png(path, 1950, 1230)
    check_texts(drawn[0])


@pytest.mark.parametrize(
    "runs",
    [
        {"cp 1": [3.0, 2.0]},
        {"cp 1": [3.0, 2.0, 1.5], "cp 4": [3.0, 2.0, 1.5]},
        {"cp 1": [3.0, 2.0, 1.5], "cp 4": [3.0, 2.00001]},
        {"cp 1": [9.0 - i / 200 for i in range(1000)], "cp 4": [9.0 - i / 199 for i in range(1000)]},
        {"stock": [3.0, 2.0], "a": [3.0, 2.1], "b": [3.1, nan], "c": [3.0, inf], "d": [2.0, 2.0]},
    ],
    ids=["one", "equal", "shorter", "far", "broken"],
)
def test_losses_are_drawn(runs, tmp_path, drawn):
    path = tmp_path / "losses.png"
    loss.draw_losses(runs, path, "Tiny GPT on CPU")
    check_png(path, 1650, 1080)
    check_texts(drawn[0])


@pytest.mark.parametrize("runs", [{}, {"cp 1": []}])
def test_losses_need_losses(runs, tmp_path):
    with pytest.raises(ValueError, match="must be one or more"):
        loss.draw_losses(runs, tmp_path / "losses.png", "nothing")


def test_differences():
    assert loss.differences([2.0, 4.0, 0.0, 0.0], [2.0, 3.0, 0.0, 1.0]) == [0.0, 0.25, 0.0, inf]


def test_missing_matplotlib_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("megatron_wallfacer.cli.pictures")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(WallfacerError, match="pip install matplotlib"):
        importlib.import_module("megatron_wallfacer.cli.pictures.grid")
