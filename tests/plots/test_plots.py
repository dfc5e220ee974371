"""Plots: their data are right, they are PNGs, and no text leaves the figure or overlaps another."""

import importlib
import struct
import sys
from collections import Counter
from itertools import combinations, pairwise, product
from math import dist, inf, nan

import pytest

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.plots import grid, loss
from megatron_wallfacer.plots.grid_layout import RADIUS, layout_of
from megatron_wallfacer.plots.grid_rings import (
    gathered,
    is_bidirectional,
    kv_team_of,
    permutation_target,
    rings,
    step_axis,
)
from megatron_wallfacer.plots.shard_pairs import pairs_of, work_by_pair
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.ring import ring_steps
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
    "wallfacer 16, permuted": make_plan("wallfacer", 16, team_size=2, kv_order="permuted"),
    "tokenring 4": make_plan("tokenring", 4),
    "team-ring 8, pass-q": make_plan("team-ring", 8, team_size=2, forward="pass-q", backward="pass-q"),
    "ring 5, both ways": make_plan("ring", 5, bidirectional=True),
    "ring 2, both ways": make_plan("ring", 2, bidirectional=True),
    "double-ring 8": make_plan("double-ring", 8),
    "burst 16": make_plan("burst", 16),
    "ulysses 8": make_plan("ulysses", 8),
    "ulysses 5": make_plan("ulysses", 5),
    "usp 8": make_plan("usp", 8),
    "loongtrain 16": make_plan("loongtrain", 16),
    "mesh 12": make_plan("mesh", 12),
    "lss 4": make_plan("lss", 4),
    "head x team x kv_team": Plan(Grid(head=2, team=2, kv_team=2), forward="pass-q"),
    "head x team x ring": Plan(Grid(head=2, team=2, ring_inner=3), head_groups=3),
    "every axis": Plan(Grid(head=2, team=2, kv_team=2, ring_outer=2, ring_inner=2), "every axis", backward="pass-q"),
}

all_plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def check_png(path, width, height):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    assert struct.unpack(">II", data[16:24]) == (width, height)


@pytest.fixture
def drawn(monkeypatch):
    """Return the list of figures that the test saves."""
    figures = []
    for module in (grid, loss):
        save = module.save
        monkeypatch.setattr(
            module, "save", lambda figure, path, save=save: (figures.append(figure), save(figure, path))
        )
    return figures


def check_texts(figure):
    """Check that every text is inside the figure, and that no two overlap."""
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


def schedules_of(plan):
    return [forward_schedule(plan, rank) for rank in range(plan.grid.cp_size)]


@all_plans
def test_each_pair_is_computed_once_and_evenly(plan):
    size, heads = plan.grid.cp_size, plan.grid.head
    who = work_by_pair(plan)
    assert set(who) == set(product(range(size), repeat=2))
    for works in who.values():
        # Once for each head slice, by ranks with the same tokens.
        assert tuple(sorted(work.rank for work in works)) == tuple(sorted(plan.grid.neighbours(works[0].rank, "head")))
        # Zig-zag: half of the 2 x 2 chunk pairs of two shards are unmasked.
        assert {work.area for work in works} == {2.0}
    everything = [work for works in who.values() for work in works]
    assert Counter(work.rank for work in everything) == dict.fromkeys(range(size), size * heads)
    assert {work.ring_step for work in everything} == set(range(plan.grid.ring))
    visits = Counter((work.rank, work.ring_step) for work in everything)
    assert set(visits.values()) == {size * heads // plan.grid.ring}


@all_plans
def test_ring_steps_are_those_of_the_ring(plan):
    """The block of rank 0 at a ring step is that of its cells with this number."""
    if plan.kv_order != "native":
        return
    side = 1 if plan.forward == "pass-kv" else 0
    shared_axis = {"pass-kv": "kv_team", "pass-q": "team"}[plan.forward]
    pairs = pairs_of(plan)
    for number, visit in enumerate(ring_steps(plan.grid, 0, bidirectional=plan.bidirectional)):
        block = {
            rank
            for member in plan.grid.neighbours(visit.origin, shared_axis)
            for rank in plan.grid.neighbours(member, "head")
        }
        cells = {
            pair[side] for pair, works in pairs.items() for work in works if (work.rank, work.ring_step) == (0, number)
        }
        assert cells == block


def test_a_pair_that_is_computed_twice_is_an_error(monkeypatch):
    from megatron_wallfacer.plots import shard_pairs

    plan = make_plan("ring", 3)
    who = work_by_pair(plan)
    who[0, 1].append(who[0, 1][0]._replace(rank=2))
    monkeypatch.setattr(shard_pairs, "work_by_pair", lambda _: who)
    with pytest.raises(ValueError, match=r"\(0, 1\) is computed by ranks"):
        pairs_of(plan)


@all_plans
def test_rings_follow_the_hops(plan):
    schedules, grid = schedules_of(plan), plan.grid
    axis = step_axis(grid)
    found = rings(schedules, axis)
    assert sorted(rank for ring in found for rank in ring) == list(range(grid.cp_size))
    for ring in found:
        assert len(ring) == grid.size_of(axis)
        assert set(ring) == set(grid.neighbours(ring[0], axis))
        for rank, after in pairwise((*ring, ring[0]) if len(ring) > 1 else ring):
            assert (grid.coordinates(rank)[axis] + 1) % len(ring) == grid.coordinates(after)[axis]
    # On a ring of two both directions are one.
    assert is_bidirectional(schedules[0], axis) == (plan.bidirectional and len(found[0]) > 2)


@all_plans
def test_gathered_tensors_are_found(plan):
    schedule, grid = forward_schedule(plan, 0), plan.grid
    assert set(gathered(schedule, "team")) == (
        set() if grid.team == 1 else set("qkv") if plan.kv_order == "paper" else {"q"}
    )
    shares = grid.kv_team > 1 and plan.kv_order != "paper"
    assert set(kv_team_of(schedule)) == (set(grid.neighbours(0, "kv_team")) if shares else set())
    assert set(gathered(schedule, "kv_team")) == (set("kv") if shares else set())


@all_plans
def test_ranks_do_not_touch(plan):
    positions = layout_of(plan.grid).positions
    assert all(dist(one, other) > 2 * RADIUS for one, other in combinations(positions, 2))


def test_only_the_papers_scheme_permutes():
    several = {name: plan for name, plan in PLANS.items() if plan.grid.cp_size > 1}
    targets = {name: permutation_target(forward_schedule(plan, 1)) for name, plan in several.items()}
    assert {name: target is not None for name, target in targets.items()} == {
        name: name.startswith("wallfacer") for name in targets
    }


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
    for name in [name for name in sys.modules if name.startswith("megatron_wallfacer.plots")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(WallfacerError, match="pip install matplotlib"):
        importlib.import_module("megatron_wallfacer.plots.grid")
