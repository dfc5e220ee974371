from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import (
    AXES,
    DEFAULT_PLACEMENT,
    RINGS_ADJACENT,
    TEAMS_ADJACENT,
    Grid,
    divisors,
    factorisations,
)
from megatron_wallfacer.schedule.plan import RING_VARIANTS, Plan
from megatron_wallfacer.schedule.schemes import PLACEMENTS, SCHEMES, make_plan, total_volume
from tests.schedule.cases import published
from tests.schedule.test_formulas import counted

HEADS = [(8, 8), (8, 4), (8, 2), (8, 1), (64, 1)]
NAMES = (
    "auto, wallfacer, team-ring, ring, double-ring, ulysses, usp, loongtrain, all-gather, lss, mesh, tokenring, burst"
)


def volume_of(plan: Plan, heads: tuple[int, int]) -> float:
    """Volume of the busiest rank in query shards, forward and backward, counted from its schedules."""
    return sum(counted(plan, heads))


def least_volume(grids: Iterable[Grid], heads: tuple[int, int]) -> float:
    """Return the least volume of all grids with all ring variants.

    The variant of one pass makes no difference to the other pass. So the best variants of a grid are the best of each
    pass, and both passes are counted twice instead of four times.
    """
    both = (
        [counted(Plan(grid, forward=variant, backward=variant), heads) for variant in RING_VARIANTS] for grid in grids
    )
    return min(sum(map(min, zip(*found, strict=True))) for found in both)


# --- names ---


def test_every_corner_that_is_named_is_built() -> None:
    assert set(NAMES.split(", ")) <= set(SCHEMES)


@pytest.mark.parametrize(
    ("scheme", "options", "axes"),
    [
        ("ring", {}, {"ring_outer": 16}),
        ("ring", {"head_size": 1, "team_size": 1, "kv_team_size": 1, "ring_inner_size": 1}, {"ring_outer": 16}),
        ("tokenring", {}, {"ring_outer": 16}),
        ("double-ring", {}, {"ring_outer": 4, "ring_inner": 4}),
        ("double-ring", {"ring_inner_size": 2}, {"ring_outer": 8, "ring_inner": 2}),
        ("double-ring", {"ring_inner_size": 16}, {"ring_inner": 16}),
        ("burst", {"ring_inner_size": 8}, {"ring_outer": 2, "ring_inner": 8}),
        ("ulysses", {}, {"head": 16}),
        ("ulysses", {"head_size": 16}, {"head": 16}),
        ("usp", {"head_size": 4}, {"head": 4, "ring_outer": 4}),
        ("usp", {"head_size": 16}, {"head": 16}),
        ("usp", {"q_heads": 8, "kv_heads": 8}, {"head": 8, "ring_outer": 2}),
        ("usp", {"q_heads": 4, "kv_heads": 4}, {"head": 4, "ring_outer": 4}),
        ("loongtrain", {"head_size": 2}, {"head": 2, "ring_outer": 4, "ring_inner": 2}),
        ("loongtrain", {"head_size": 2, "ring_inner_size": 4}, {"head": 2, "ring_outer": 2, "ring_inner": 4}),
        ("loongtrain", {"q_heads": 8, "kv_heads": 8}, {"head": 4, "ring_outer": 2, "ring_inner": 2}),
        ("all-gather", {}, {"kv_team": 16}),
        ("all-gather", {"team_size": 1, "kv_team_size": 16}, {"kv_team": 16}),
        ("lss", {}, {"kv_team": 16}),
        ("mesh", {}, {"team": 4, "kv_team": 4}),
        ("mesh", {"kappa": 1 / 4}, {"team": 2, "kv_team": 8}),
        ("mesh", {"team_size": 8}, {"team": 8, "kv_team": 2}),
        ("mesh", {"kv_team_size": 16}, {"kv_team": 16}),
        ("team-ring", {"team_size": 2}, {"team": 2, "ring_outer": 8}),
        ("team-ring", {"team_size": 2, "kv_team_size": 4}, {"team": 2, "kv_team": 4, "ring_outer": 2}),
        ("team-ring", {"team_size": 2, "ring_inner_size": 2}, {"team": 2, "ring_outer": 4, "ring_inner": 2}),
        ("team-ring", {"head_size": 4, "team_size": 2}, {"head": 4, "team": 2, "ring_outer": 2}),
        (
            "team-ring",
            {"head_size": 2, "team_size": 2, "kv_team_size": 2, "ring_inner_size": 2},
            {"head": 2, "team": 2, "kv_team": 2, "ring_inner": 2},
        ),
        ("wallfacer", {"team_size": 2}, {"team": 2, "kv_team": 2, "ring_outer": 4}),
        ("wallfacer", {"team_size": 4}, {"team": 4, "kv_team": 4}),
        ("wallfacer", {"team_size": 2, "kv_team_size": 2}, {"team": 2, "kv_team": 2, "ring_outer": 4}),
        ("wallfacer", {"kv_team_size": 4}, {"team": 4, "kv_team": 4}),
        ("auto", {"team_size": 8}, {"team": 8, "ring_outer": 2}),
    ],
)
def test_axes_of_a_scheme(scheme: str, options: dict[str, int], axes: dict[str, int]) -> None:
    assert make_plan(scheme, 16, **options).grid == Grid(**axes)


@pytest.mark.parametrize("cp_size", range(1, 65))
def test_a_window_is_the_largest_divisor_up_to_the_square_root(cp_size: int) -> None:
    inner = max(d for d in divisors(cp_size) if d * d <= cp_size)
    for scheme in ("double-ring", "burst"):
        assert make_plan(scheme, cp_size).grid == Grid(ring_outer=cp_size // inner, ring_inner=inner)


def test_wallfacer_is_the_published_arrangement() -> None:
    assert make_plan("wallfacer", 32, team_size=2, head_groups=1) == published(32, 2)


def test_the_cheap_order_is_chosen_by_name() -> None:
    plan = make_plan("wallfacer", 32, team_size=2, kv_order="permuted", head_groups=1)
    assert plan == published(32, 2, order="permuted")
    assert volume_of(plan, (8, 8)) < volume_of(make_plan("wallfacer", 32, team_size=2), (8, 8))


def test_a_team_ring_may_have_the_published_order() -> None:
    plan = make_plan("team-ring", 32, head_size=2, team_size=2, kv_order="paper", backward="pass-q")
    assert plan.grid == Grid(head=2, team=2, kv_team=2, ring_outer=4)
    assert plan.kv_order == "paper"


@pytest.mark.parametrize("scheme", sorted(set(SCHEMES) - {"wallfacer"}))
def test_other_schemes_are_native(scheme: str) -> None:
    assert make_plan(scheme, 16).kv_order == "native"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_works_on_one_rank(scheme: str) -> None:
    assert make_plan(scheme, 1).grid == Grid()


@pytest.mark.parametrize("scheme", sorted(set(SCHEMES) - {"ulysses"}))
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (12, 3), (1, 1)])
@pytest.mark.parametrize("cp_size", [2, 6, 7, 16, 36])
def test_a_chosen_head_axis_fits_the_heads(scheme: str, heads: tuple[int, int], cp_size: int) -> None:
    plan = make_plan(scheme, cp_size, q_heads=heads[0], kv_heads=heads[1])
    assert plan.grid.cp_size == cp_size
    assert heads[0] % plan.grid.head == 0
    assert heads[1] % plan.grid.head == 0 or plan.grid.head % heads[1] == 0


# --- ring variants ---


@pytest.mark.parametrize(
    ("scheme", "kappa", "forward", "backward"),
    [
        ("ring", 1, "pass-kv", "pass-kv"),
        ("double-ring", 1, "pass-kv", "pass-kv"),
        ("usp", 1, "pass-kv", "pass-kv"),
        ("loongtrain", 1, "pass-kv", "pass-kv"),
        ("burst", 1, "pass-kv", "pass-q"),
        ("burst", 1 / 8, "pass-kv", "pass-q"),
        ("wallfacer", 1, "pass-kv", "pass-q"),
        ("wallfacer", 1 / 8, "pass-kv", "pass-q"),
        ("tokenring", 1, "pass-q", "pass-q"),
        ("tokenring", 1 / 2, "pass-q", "pass-kv"),
        ("team-ring", 1, "pass-kv", "pass-kv"),
    ],
)
def test_ring_variants_are_as_published_or_the_cheaper(scheme: str, kappa: float, forward: str, backward: str) -> None:
    plan = make_plan(scheme, 16, kappa=kappa)
    assert (plan.forward, plan.backward) == (forward, backward)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("forward", RING_VARIANTS)
@pytest.mark.parametrize("backward", RING_VARIANTS)
def test_any_ring_variant_may_be_given(scheme: str, forward: str, backward: str) -> None:
    plan = make_plan(scheme, 16, forward=forward, backward=backward)
    assert (plan.forward, plan.backward) == (forward, backward)


@pytest.mark.parametrize(("kappa", "backward"), [(1, "pass-q"), (3 / 4, "pass-kv"), (1 / 2, "pass-kv")])
def test_team_ring_takes_the_cheaper_variant_of_a_ring(kappa: float, backward: str) -> None:
    """Q, dO and dQ are three tensors, K, V, dK and dV four; equal volume goes to pass-KV."""
    assert make_plan("team-ring", 8, team_size=1, kappa=kappa).backward == backward


# --- the other choices ---


@pytest.mark.parametrize(
    ("placement", "order"),
    [
        (None, DEFAULT_PLACEMENT),
        ("teams-adjacent", TEAMS_ADJACENT),
        ("rings-adjacent", RINGS_ADJACENT),
        ("head-first", ("head", "ring_inner", "ring_outer", "team", "kv_team")),
        ("ring-first", ("ring_inner", "ring_outer", "head", "team", "kv_team")),
        ("kv_team,ring,team,head", ("kv_team", "ring_inner", "ring_outer", "team", "head")),
        ("kv_team, ring_outer, team, ring_inner, head", ("kv_team", "ring_outer", "team", "ring_inner", "head")),
        (("kv_team", "ring", "team", "head"), ("kv_team", "ring_inner", "ring_outer", "team", "head")),
    ],
)
def test_placement_by_name_or_by_order(placement: object, order: tuple[str, ...]) -> None:
    sizes = {"head_size": 2, "team_size": 2, "kv_team_size": 2, "ring_inner_size": 2}
    assert make_plan("team-ring", 32, placement=placement, **sizes).grid.placement == order


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_placement_serves_every_scheme(scheme: str, placement: str) -> None:
    plan = make_plan(scheme, 16, placement=placement)
    assert plan.grid == replace(make_plan(scheme, 16).grid, placement=PLACEMENTS[placement])


def test_axes_of_one_rank_may_be_left_out_of_a_placement() -> None:
    assert make_plan("ring", 4, placement="ring").grid == make_plan("ring", 4).grid
    assert make_plan("team-ring", 8, team_size=2, placement="ring,team").grid.placement == ("ring_outer", "team")


def test_loongtrain_is_head_first_unless_told_otherwise() -> None:
    sizes = {"head_size": 2, "ring_inner_size": 2}
    assert make_plan("loongtrain", 8, **sizes) == make_plan("loongtrain", 8, placement="head-first", **sizes)
    ring_first = make_plan("loongtrain", 8, placement="ring-first", **sizes).grid
    assert ring_first.placement == ("ring_inner", "ring_outer", "head")


@pytest.mark.parametrize(
    ("scheme", "groups"), [("ring", 1), ("double-ring", 1), ("all-gather", 1), ("ulysses", 2), ("mesh", 2), ("usp", 2)]
)
def test_heads_are_pipelined_where_something_is_gathered(scheme: str, groups: int) -> None:
    assert make_plan(scheme, 16).head_groups == groups
    assert make_plan(scheme, 16, head_groups=3).head_groups == 3


@pytest.mark.parametrize(
    ("tokens", "q_heads", "groups"), [(2048, 32, 1), (16384, 32, 2), (16383, 32, 1), (16384, 4, 1), (65536, 4, 2)]
)
def test_heads_are_split_only_where_both_groups_have_enough_work(tokens: int, q_heads: int, groups: int) -> None:
    heads = {"q_heads": q_heads, "kv_heads": q_heads}
    assert make_plan("mesh", 16, tokens=tokens, **heads).head_groups == groups
    assert make_plan("mesh", 16, tokens=tokens, head_groups=2, **heads).head_groups == 2


def test_both_directions_of_a_single_ring() -> None:
    assert make_plan("ring", 8, bidirectional=True).bidirectional
    assert make_plan("team-ring", 8, bidirectional=True) == replace(make_plan("team-ring", 8), bidirectional=True)


# --- the choice by volume ---


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 256), st.sampled_from(HEADS))
def test_auto_has_the_least_volume_of_all_team_rings(cp_size: int, heads: tuple[int, int]) -> None:
    chosen = make_plan("auto", cp_size, kappa=heads[1] / heads[0])
    rings = [Grid(team=team, ring_outer=cp_size // team) for team in divisors(cp_size)]
    assert volume_of(chosen, heads) == pytest.approx(least_volume(rings, heads))
    assert chosen.scheme == "team-ring"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 16), st.sampled_from([2, 3, 4]), st.sampled_from(HEADS))
def test_auto_chooses_beside_a_given_kv_team(rest: int, kv_team: int, heads: tuple[int, int]) -> None:
    cp_size = rest * kv_team
    chosen = make_plan("auto", cp_size, kv_team_size=kv_team, kappa=heads[1] / heads[0])
    others = [Grid(team=team, kv_team=kv_team, ring_outer=rest // team) for team in divisors(rest)]
    assert chosen.grid.kv_team == kv_team
    assert volume_of(chosen, heads) == pytest.approx(least_volume(others, heads))


@pytest.mark.parametrize(
    "grid", [Grid(ring_outer=8), Grid(team=4, ring_outer=4), Grid(team=2, kv_team=2, ring_outer=3)]
)
def test_the_variant_of_one_pass_makes_no_difference_to_the_other(grid: Grid) -> None:
    found = {
        variants: counted(Plan(grid, forward=variants[0], backward=variants[1]), (8, 2))
        for variants in product(RING_VARIANTS, repeat=2)
    }
    for (forward, backward), (forward_volume, backward_volume) in found.items():
        assert forward_volume == found[forward, forward][0]
        assert backward_volume == found[backward, backward][1]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 8, 9, 12, 16, 18, 32, 36, 64, 72])
def test_wallfacer_chooses_the_least_volume_of_all_its_teams(cp_size: int, heads: tuple[int, int]) -> None:
    chosen = make_plan("wallfacer", cp_size, kappa=heads[1] / heads[0])
    others = [published(cp_size, team) for team in divisors(cp_size) if cp_size % team**2 == 0]
    assert volume_of(chosen, heads) == pytest.approx(min(volume_of(plan, heads) for plan in others))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 8, 9, 12, 16, 36, 64, 72])
def test_mesh_chooses_the_least_volume_of_all_its_teams(cp_size: int, heads: tuple[int, int]) -> None:
    chosen = make_plan("mesh", cp_size, kappa=heads[1] / heads[0])
    others = [Plan(Grid(team=team, kv_team=cp_size // team)) for team in divisors(cp_size)]
    assert chosen.grid.ring == 1
    assert volume_of(chosen, heads) == pytest.approx(min(volume_of(plan, heads) for plan in others))


def test_total_volume_is_that_of_both_passes() -> None:
    plan = make_plan("team-ring", 16)
    assert total_volume(plan, 1.0) == pytest.approx(volume_of(plan, (8, 8))) == 33


@given(st.integers(1, 100_000))
def test_divisors(number: int) -> None:
    assert divisors(number) == tuple(d for d in range(1, number + 1) if number % d == 0)


@given(st.integers(1, 64))
def test_factorisations(number: int) -> None:
    found = list(factorisations(number, AXES))
    assert all(Grid(**sizes).cp_size == number for sizes in found)
    assert len({tuple(sizes.values()) for sizes in found}) == len(found)
    pairs = [(sizes["a"], sizes["b"]) for sizes in factorisations(number, ("a", "b"))]
    assert pairs == [(d, number // d) for d in divisors(number)]


# --- errors ---

_ANY_OF_8 = "one of 1, 2, 4, 8 with scheme team-ring, cp size 8"
_SQUARE = "; team = kv_team = C, and C^2 divides cp size"
_TEAMS_OF_8 = f"one of 1, 2 with scheme wallfacer, cp size 8{_SQUARE}"
REJECTED = [
    ("team-ring", 0, {}, "cp_size", 0, "a positive number of ranks"),
    ("concentric", 8, {}, "scheme", "concentric", f"one of {', '.join(SCHEMES)}"),
    ("grid", 8, {}, "scheme", "grid", f"one of {', '.join(SCHEMES)}"),
    ("ring", 8, {"team_size": 2}, "team_size", 2, "1 with scheme ring, cp size 8"),
    ("ring", 8, {"kv_team_size": 8}, "kv_team_size", 8, "1 with scheme ring, cp size 8"),
    ("ring", 8, {"head_size": 2}, "head_size", 2, "1 with scheme ring, cp size 8"),
    ("ring", 8, {"ring_inner_size": 2}, "ring_inner_size", 2, "1 with scheme ring, cp size 8"),
    ("tokenring", 8, {"ring_inner_size": 2}, "ring_inner_size", 2, "1 with scheme tokenring, cp size 8"),
    (
        "double-ring",
        8,
        {"ring_inner_size": 3},
        "ring_inner_size",
        3,
        "one of 1, 2, 4, 8 with scheme double-ring, cp size 8",
    ),
    ("double-ring", 8, {"head_size": 2}, "head_size", 2, "1 with scheme double-ring, cp size 8"),
    ("burst", 8, {"team_size": 2}, "team_size", 2, "1 with scheme burst, cp size 8"),
    ("all-gather", 8, {"team_size": 8}, "team_size", 8, "1 with scheme all-gather, cp size 8"),
    ("all-gather", 8, {"kv_team_size": 4}, "kv_team_size", 4, "8 with scheme all-gather, cp size 8"),
    ("lss", 8, {"kv_team_size": 4}, "kv_team_size", 4, "8 with scheme lss, cp size 8"),
    ("ulysses", 8, {"head_size": 4}, "head_size", 4, "8 with scheme ulysses, cp size 8"),
    ("usp", 8, {"ring_inner_size": 2}, "ring_inner_size", 2, "1 with scheme usp, cp size 8"),
    ("usp", 8, {"head_size": 3}, "head_size", 3, "one of 1, 2, 4, 8 with scheme usp, cp size 8"),
    (
        "loongtrain",
        8,
        {"head_size": 4, "ring_inner_size": 4},
        "ring_inner_size",
        4,
        "one of 1, 2 with scheme loongtrain, cp size 8, head 4",
    ),
    ("mesh", 8, {"team_size": 2, "kv_team_size": 2}, "kv_team_size", 2, "4 with scheme mesh, cp size 8, team 2"),
    ("team-ring", 8, {"team_size": 3}, "team_size", 3, _ANY_OF_8),
    ("team-ring", 8, {"team_size": 0}, "team_size", 0, _ANY_OF_8),
    ("team-ring", 8, {"team_size": -2}, "team_size", -2, _ANY_OF_8),
    ("team-ring", 8, {"team_size": 16}, "team_size", 16, _ANY_OF_8),
    ("team-ring", 8, {"kv_team_size": 3}, "kv_team_size", 3, _ANY_OF_8),
    ("team-ring", 8, {"head_size": 3}, "head_size", 3, _ANY_OF_8),
    ("team-ring", 8, {"ring_inner_size": 0}, "ring_inner_size", 0, _ANY_OF_8),
    ("auto", 8, {"kv_team_size": 0}, "kv_team_size", 0, "one of 1, 2, 4, 8 with scheme auto, cp size 8"),
    (
        "team-ring",
        8,
        {"team_size": 4, "kv_team_size": 4},
        "kv_team_size",
        4,
        "one of 1, 2 with scheme team-ring, cp size 8, team 4",
    ),
    (
        "team-ring",
        8,
        {"head_size": 2, "team_size": 2, "kv_team_size": 2, "ring_inner_size": 2},
        "ring_inner_size",
        2,
        "1 with scheme team-ring, cp size 8, head 2, team 2, kv_team 2",
    ),
    (
        "team-ring",
        8,
        {"team_size": 2, "kv_team_size": 1, "kv_order": "paper"},
        "kv_team_size",
        1,
        "2 with scheme team-ring, cp size 8, team 2",
    ),
    ("wallfacer", 8, {"team_size": 4}, "team_size", 4, _TEAMS_OF_8),
    ("wallfacer", 8, {"team_size": 3}, "team_size", 3, _TEAMS_OF_8),
    ("wallfacer", 8, {"team_size": 0}, "team_size", 0, _TEAMS_OF_8),
    ("wallfacer", 8, {"head_size": 2}, "head_size", 2, f"1 with scheme wallfacer, cp size 8{_SQUARE}"),
    (
        "wallfacer",
        8,
        {"team_size": 2, "kv_team_size": 1},
        "kv_team_size",
        1,
        f"2 with scheme wallfacer, cp size 8, team 2{_SQUARE}",
    ),
    ("wallfacer", 8, {"kv_order": "native"}, "kv_order", "native", "paper or permuted with scheme wallfacer"),
    ("ring", 8, {"kv_order": "paper"}, "kv_order", "paper", "native with scheme ring"),
    ("team-ring", 8, {"kv_order": "odd"}, "kv_order", "odd", "native, paper or permuted with scheme team-ring"),
    ("ring", 8, {"placement": "node-first"}, "placement", "node-first", "an order of ring_outer, each once"),
    ("ring", 8, {"placement": "team"}, "placement", "team", "an order of ring_outer, each once"),
    ("ring", 8, {"placement": "ring,ring_outer"}, "placement", "ring,ring_outer", "an order of ring_outer, each once"),
    (
        "team-ring",
        8,
        {"team_size": 2, "placement": ("ring", "ring", "team")},
        "placement",
        "ring,ring,team",
        "an order of team, ring_outer, each once",
    ),
    ("ring", 8, {"forward": "both"}, "forward", "both", "auto, pass-kv or pass-q"),
    ("ring", 8, {"backward": "both"}, "backward", "both", "auto, pass-kv or pass-q"),
    ("ring", 8, {"head_groups": 0}, "head_groups", 0, "a positive number"),
    (
        "ulysses",
        16,
        {"q_heads": 8, "kv_heads": 2},
        "head_size",
        16,
        "one of 1, 2, 4, 8 for 8 query and 2 kv heads",
    ),
    (
        "usp",
        12,
        {"head_size": 3, "q_heads": 8, "kv_heads": 8},
        "head_size",
        3,
        "one of 1, 2, 4, 8 for 8 query and 8 kv heads",
    ),
    ("usp", 8, {"q_heads": 8}, "kv_heads", None, "given if q_heads is given, and left out otherwise"),
]


@pytest.mark.parametrize(("scheme", "cp_size", "options", "option", "value", "allowed"), REJECTED)
def test_error_names_option_value_and_what_is_allowed(
    scheme: str, cp_size: int, options: dict[str, object], option: str, value: object, allowed: str
) -> None:
    with pytest.raises(OptionError) as error:
        make_plan(scheme, cp_size, **options)
    assert (error.value.option, error.value.value, error.value.allowed) == (option, value, allowed)
    assert str(error.value) == f"{option}={value}: must be {allowed}"


@pytest.mark.parametrize("scheme", ["double-ring", "burst", "loongtrain"])
def test_both_directions_of_a_double_ring_are_rejected(scheme: str) -> None:
    with pytest.raises(OptionError, match="a single ring"):
        make_plan(scheme, 16, bidirectional=True)
